"""The pages of docs/: their blocks run or say what they need, what they quote and name is there, the site builds."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import ROOT, Block, blocks, run_shell
from test_guide import BLOCKS as GUIDE

from megatron_ptrl import __main__ as stages
from megatron_ptrl import cli, config
from megatron_ptrl.config import RunConfig

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
HERE = "run by tests/test_docs.py"


def named(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_says_who_runs_it(page: Path) -> None:
    for block in blocks(page):
        other = re.fullmatch(r"run by (tests/test_\w+\.py)(, .*)?", block.mark)
        runs_it = block.mark == HERE or block in GUIDE  # whose own test checks that the mark is true
        if other and not runs_it:
            runs_it = page.name in (ROOT / other[1]).read_text()
        assert runs_it or block.mark.startswith("needs: "), f"unmarked block, or nobody runs it:\n{block}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks_run(page: Path) -> None:
    torch.manual_seed(0)
    names: dict = {}
    for mark, language, code in blocks(page):
        if language == "python" and mark == HERE:
            assert "assert" in code, f"a block that states nothing cannot fail:\n{code}"
            exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_shell_blocks_run(page: Path, tmp_path: Path) -> None:
    for mark, language, code in blocks(page):
        if language == "bash" and mark == HERE:
            run_shell(code, tmp_path)


def unknown_flags(block: Block) -> list[str]:
    """Flags of the block's `ptrl` commands that their stage does not have."""
    wrong = []
    for line in re.sub(r"\\\n", " ", block.code).splitlines():
        found = re.search(r"(?:\bptrl|-m megatron_ptrl) (\w+)( .*)?$", line.partition(" #")[0])
        stage = stages._STAGES.get(found[1]) if found else None
        if found and stage is None:
            wrong.append(found[1])
        elif found and stage:
            settings = getattr(config, stage.config)
            known = cli._fields_of_type("", cli._with_megatron_fields(settings)) | {"config", "print_config"}
            wrong += [flag for flag in re.findall(r" --([\w.]+)", found[2] or "") if flag not in known]
    return wrong


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page: Path) -> None:
    assert [flag for block in blocks(page) if block.language == "bash" for flag in unknown_flags(block)] == []


def test_a_flag_that_does_not_exist_is_found() -> None:
    code = "torchrun --nproc-per-node 2 -m megatron_ptrl rl --loss.beta 0 \\\n  --policy.clip 1\nptrl train --x 1\n"
    assert unknown_flags(Block("", "bash", code)) == ["policy.clip", "train"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_named_files_and_settings_exist(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    code = re.findall(r"`([^`]+)`", prose)
    paths = [
        word
        for word in code
        if re.fullmatch(r"(?:megatron_ptrl|csrc|examples|benchmarks|launch|tests)/[\w./*-]+", word)
    ]
    assert [path for path in paths if not list(ROOT.glob(path))] == []
    fields = set()
    for stage in stages._STAGES.values():
        settings = getattr(config, stage.config)
        whole = cli._with_megatron_fields(settings) if issubclass(settings, RunConfig) else settings
        fields |= cli._fields_of_type("", whole)
    groups = {field.partition(".")[0] for field in fields if "." in field}
    for word in code:
        setting = re.match(r"(?:--)?((\w+)\.[\w.]*\w)", word)
        if setting and setting[2] in groups and not re.search(r"\.(bin|idx|jsonl?|txt)$", word):
            # A setting, by the end of its name too, or a group of settings.
            assert any(f".{setting[1]}." in f".{field}." for field in fields), word


def messages() -> list[str]:
    """Every text in the package's source but its docstrings, with `...` where a value goes."""
    found = []
    for file in (ROOT / "megatron_ptrl").rglob("*.py"):
        tree = ast.parse(file.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def pattern(quote: str) -> str:
    """What a quote matches: its words in their order, anything in the line where it has `...`."""
    return ".*".join(re.escape(part) for part in quote.removeprefix("...").removesuffix("...").split("..."))


def quotes() -> list[str]:
    """What the page on troubleshooting quotes of this package."""
    ours = (DOCS / "troubleshooting.md").read_text().partition("\n## From torch")[0]
    return [" ".join(quote.split()) for quote in re.findall(r"^- `([^`]+)`", ours, flags=re.MULTILINE)]


def test_quoted_messages_are_the_sources() -> None:
    every = messages()
    assert len(quotes()) > 50
    for quote in quotes():
        assert max(map(len, quote.split("..."))) > 12, f"too little of it is literal to be found: {quote}"
    assert [quote for quote in quotes() if not any(re.search(pattern(quote), text) for text in every)] == []


def test_the_configuration_page_is_what_the_dataclasses_say() -> None:
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    page = module.render()
    assert page == (DOCS / "configuration.md").read_text(), "run python docs/make_configuration.py"
    rows = re.findall(r"^\| (.*) \|$", page, flags=re.MULTILINE)
    assert [row for row in rows if re.search(r"\|\s*$", row)] == [], "a field without its meaning"


def test_a_taken_port_says_what_the_page_quotes() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError) as error:
        torch.distributed.TCPStore("127.0.0.1", store.port, is_master=True, wait_for_workers=False)
    (quote,) = re.findall(r"`(The server socket [^`]*)`", (DOCS / "troubleshooting.md").read_text())
    assert re.search(pattern(" ".join(quote.split())), str(error.value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; a link or an anchor that leads nowhere ends its build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_fetches_nothing(site: Path) -> None:
    pages = {str(page.relative_to(site).with_suffix("")) for page in site.rglob("*.html")} - {"404"}
    assert pages == {named(page).removesuffix(".md") for page in PAGES} | {"readme", "changelog"}
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*?(?:src|href)=\"([^\"]*)\"", page.read_text())
        assert [address for address in loaded if "//" in address] == []
    assert (site / "benchmarks" / "results").is_dir(), "what pages link to is beside them"


def test_what_a_block_needs_is_shown(site: Path) -> None:
    page = (site / "papers" / "tpt.html").read_text()
    assert "needs: servers of a model that reasons" in page and "<!-- needs" not in page
