"""The adapter to lm-evaluation-harness: forward passes in fp64 say the same, in every layout; a task of files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluating import read, run_evaluation, settings_of
from scoring import WINDOW, direct
from stub_rollout_server import StubRollouts
from tiny import Settings, parsed

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install megatron-ptrl[lm_eval]")

TEXTS = ["import os\n", "def parse(self):\n    return ", "class A", "first = second = third", "for each in range(10): "]
ENDS = [" print(1)", "self.x", "(object):\n    pass", " = y" * 20, " and then" * 9]
LAYOUTS = {"alone": (1, {}), "tp 2": (2, {"parallel.tp": 2}), "pp 2": (2, {"parallel.pp": 2}), "dp 2": (2, {})}

TASK = """
task: which_end
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: bits_per_byte
"""


def ask(rank: int, world_size: int, settings: Settings) -> list[Any]:
    """Log-likelihoods of (text, end), rolling ones of the texts, and greedy continuations."""
    config = parsed(settings, "EvaluateConfig")
    from megatron_ptrl.evaluation.lm_eval import HarnessModel
    from megatron_ptrl.training.evaluate import Evaluation

    evaluation = Evaluation(config)
    model = HarnessModel(
        evaluation.settings, evaluation.model, evaluation.engine, evaluation.tokenizer, config.harness, chunk=1
    )
    pairs = [SimpleNamespace(args=pair) for pair in zip(TEXTS, ENDS, strict=True)]
    whole = [SimpleNamespace(args=(text,)) for text in [" ".join(ENDS) * 3, TEXTS[0]]]
    until = [SimpleNamespace(args=(text, {"until": [" e", "\n"], "max_gen_toks": 5})) for text in TEXTS]
    return [model.loglikelihood(pairs), model.loglikelihood_rolling(whole), model.generate_until(until)]


@pytest.fixture(scope="module")
def settings(reference: Settings, tmp_path_factory: Any) -> Settings:
    output = tmp_path_factory.mktemp("harness") / "e"
    return settings_of(reference["run_dir"], output, harness__tasks=["which_end"])


@pytest.fixture(scope="module")
def alone(ranks: Any, settings: Settings) -> list[Any]:
    return ranks.run(1, ask, settings)[0]


def test_servers_continue_as_the_weights_do(ranks: Any, settings: Settings, alone: list[Any], tmp_path: Any) -> None:
    with StubRollouts() as stub:
        servers = {"rollout.engine": "sglang", "rollout.servers": [stub.url], "output": str(tmp_path / "e")}
        found = ranks.run(1, ask, settings | servers)[0]
        assert stub.set()["/generate"] == len(TEXTS) + 2  # its version, and the probe
    assert found == alone and any(found[2])


def test_it_equals_forward_passes_in_fp64(ranks, reference, settings, alone, prefix, tmp_path):
    from megatron_ptrl.config import TokenizeConfig
    from megatron_ptrl.data.tokenize_stage import run as tokenize
    from megatron_ptrl.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(prefix + ".tokenizer.json")
    source = tmp_path / "t.jsonl"
    source.write_text("".join(json.dumps({"text": t + e}) + "\n" for t, e in zip(TEXTS, ENDS, strict=True)))
    tokenize(TokenizeConfig(input=[str(source)], output=str(tmp_path / "t"), tokenizer=prefix + ".tokenizer.json"))
    sizes = [len(tokenizer.encode(t + e)) for t, e in zip(TEXTS, ENDS, strict=True)]
    assert max(sizes) > WINDOW + 1  # one loses its beginning
    wanted = [[i, max(size - WINDOW - 1, 0), size] for i, size in enumerate(sizes)]
    values = ranks.run(1, direct, reference, str(tmp_path / "t"), wanted)[0]
    for text, end, found, (logprob, greedy) in zip(TEXTS, ENDS, values, alone[0], strict=True):
        # White space at the end of the text is the continuation's, as the harness has them.
        count = len(tokenizer.encode(text + end)) - len(tokenizer.encode(text.rstrip()))
        assert logprob == pytest.approx(sum(found[-count:]), abs=1e-4) and not greedy


def test_rolling_covers_every_token_once(alone, prefix):
    from megatron_ptrl.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(prefix + ".tokenizer.json")
    tokens = len(tokenizer.encode(" ".join(ENDS) * 3))
    assert tokens > 2 * WINDOW
    # A model with an opinion is still nearer to ln 512 a token than to half or twice that.
    assert 0.5 < -alone[1][0] / tokens / torch.log(torch.tensor(512.0)) < 2.5
    assert -alone[1][0] > -alone[1][1] > 0


def test_texts_end_before_a_stop_sequence(alone):
    texts = alone[2]
    assert len(texts) == len(TEXTS) and all(" e" not in text and "\n" not in text for text in texts)
    assert any(texts)


def test_a_response_as_long_as_the_window_is_refused(caplog):
    from megatron_ptrl.config import HarnessConfig, PretrainConfig
    from megatron_ptrl.config.loss import LossConfig
    from megatron_ptrl.config.pretrain import DataConfig
    from megatron_ptrl.errors import InputError
    from megatron_ptrl.evaluation.lm_eval import HarnessModel

    settings: Any = PretrainConfig(data=DataConfig(seq_length=64), loss=LossConfig(top_k=1))
    tokenizer: Any = SimpleNamespace(encode=lambda text: list(range(len(text.split()))), eod=0)
    engine: Any = None
    model = HarnessModel(settings, [], engine, tokenizer, HarnessConfig(), chunk=1)
    assert model._request(0, "word " * 50, {"max_gen_toks": 14}).prompt_ids == list(range(50)) and not caplog.text
    assert model._request(0, "word " * 50, {"max_gen_toks": 60}).prompt_ids == list(range(46, 50))
    assert "a prompt of 50 tokens loses its beginning" in caplog.text
    with pytest.raises(InputError, match="responses of 64 tokens, and the model has room for 64"):
        model._request(0, "word", {"max_gen_toks": 64})


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "alone"])
def test_every_layout_answers_the_same(ranks, settings, alone, tmp_path, name):
    world_size, layout = LAYOUTS[name]
    for found in ranks.run(world_size, ask, settings | layout):
        assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in alone[0]]
        assert [value for value, _ in found[0]] == pytest.approx([value for value, _ in alone[0]], abs=1e-4)
        assert found[1] == pytest.approx(alone[1], abs=1e-3) and found[2] == alone[2]


def test_a_task_of_files(ranks, settings, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "ends.jsonl"
    lines = [{"start": t, "ends": ENDS, "right": i} for i, t in enumerate(TEXTS)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "which.yaml").write_text(TASK.format(data=data))
    here = settings | {"harness.include_path": str(tmp_path / "tasks"), "output": str(tmp_path / "e")}
    printed = run_evaluation(ranks, 1, here)
    figures = read(tmp_path / "e")["figures"]
    assert figures["which_end/acc"]["value"] in [i / 5 for i in range(6)] and figures["which_end/acc"]["problems"] == 5
    assert figures["which_end/acc"]["low"] is not None and "| which_end/acc " in printed
    assert Path(tmp_path / "e" / "harness.json").is_file()
    with pytest.raises(AssertionError, match="there is no task other"):
        run_evaluation(ranks, 1, here | {"harness.tasks": ["other"], "output": str(tmp_path / "f")})
