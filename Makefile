# Each target sets up what it needs in .venv; a second call starts at once.
#
#   PYTHON     interpreter that makes .venv, 3.10 or newer       make quickstart PYTHON=python3.12
#   WORK_DIR   where the quickstart keeps its data and runs      make quickstart WORK_DIR=/tmp/first
#   ARGS       handed to what the target runs                    make test ARGS='-k report'
#   MAX_JOBS   compilers at once while the kernels are built

PYTHON ?= python3
WORK_DIR ?= .quickstart
ARGS ?=
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS

BIN := .venv/bin
# -qq leaves errors, with the compiler's output among them, and drops everything else.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# A short run of every kernel: the sanitizer's take a hundred times as long.
SANITIZED := not_finite or same_bits or (one_pass_and_two_agree and 5000 and bfloat16)
SOURCES := Makefile pyproject.toml constraints.txt $(wildcard setup.py csrc/*)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test lint bench docs gpu

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

quickstart: .venv/.ready ## Set up, then go from real text to a small trained GPT
	@$(BIN)/python examples/quickstart/run.py --work_dir $(WORK_DIR) $(ARGS)

# Hundreds of processes start, each of which would compile the package's sources anew: a sixth of a start.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/.ready-dev ## Run the tests
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.ready-dev ## Check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror csrc/* tests/cuda_emulation/*

bench: .venv/.ready ## Measure the loss, a training step and the data stages on this machine
	@$(BIN)/python benchmarks/loss.py
	@$(BIN)/python benchmarks/linear_head.py
	@$(BIN)/python benchmarks/training.py
	@$(BIN)/python benchmarks/score.py
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/rollout.py
	@$(BIN)/python benchmarks/segment.py

docs: .venv/.ready-dev ## Build the documentation into site/, with links and anchors checked
	@$(BIN)/python -m mkdocs build --strict --quiet --site-dir site $(ARGS)
	@echo "site/index.html"

gpu: .venv/.ready-dev ## With a CUDA device: run the tests that need one, measure the loss on it
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no CUDA device")'
	@$(BIN)/python -m megatron_ptrl doctor
	@$(BIN)/python -m pytest -q -m gpu $(ARGS)
	@for tool in memcheck racecheck; do command -v compute-sanitizer >/dev/null || { echo "skipped: compute-sanitizer is not there"; break; }; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -q -m gpu -k '$(SANITIZED)' || exit 1; done
	@$(BIN)/python benchmarks/loss.py --device cuda --output benchmarks/results
	@$(BIN)/python benchmarks/linear_head.py --device cuda --output benchmarks/results

# torch goes first: without build isolation the kernels compile against the very torch they will be loaded into.
# The old kernels go first, because a build that fails is no error to pip and would leave them behind.
# The stamps are written last, so an interrupted set-up starts over and finds what pip had finished.
define set_up
@$(PYTHON) -c 'import sys; sys.exit(f"$(PYTHON) is Python {sys.version.split()[0]}; expected 3.10 or newer, set PYTHON" if sys.version_info < (3, 10) else 0)'
@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "[1/3] making .venv"; $(PYTHON) -m venv .venv; }
@command -v nvidia-smi >/dev/null || $(BIN)/python -c 'import torch' 2>/dev/null || \
	echo "      no NVIDIA driver here: if pip's index offers only CUDA builds of torch (several GB)," \
	"stop and set PIP_EXTRA_INDEX_URL to PyTorch's CPU index"
@echo "[2/3] installing torch (the first time: minutes)"
@$(INSTALL) torch setuptools wheel ninja
@echo "[3/3] installing the rest, building the kernels"
@rm -f megatron_ptrl/_C.so
@$(INSTALL) --no-build-isolation -e '.$(1)'
@test -e megatron_ptrl/_C.so || { \
	echo "      the kernels did not build, without them the loss runs in plain torch, slower; to see why:"; \
	echo "      $(BIN)/python -m pip install -v --no-deps --no-build-isolation -e ."; $(2); }
endef

.venv/.ready: $(SOURCES)
	$(call set_up,,true)
	@touch $@

# The development packages come on top of the plain set-up and include it. Tests that quietly ran without the
# kernels would say nothing, so here a failed build is an error.
.venv/.ready-dev: $(SOURCES)
	$(call set_up,[dev],false)
	@touch .venv/.ready $@
