"""`ptrl think_report`: counts and lengths against those of the thoughts, one by one."""

import json
import statistics
from pathlib import Path

import pytest
from thoughts import prose, thought, write_thoughts

from megatron_ptrl.__main__ import main
from megatron_ptrl.config import AssembleConfig, ThinkReportConfig
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking import analysis
from megatron_ptrl.thinking.assemble_stage import run as assemble

DEPTHS = ("none", "some", "advanced")


def nested(seed: int) -> dict:
    return {"domain": ("mathematics", "law")[seed % 2], "labels": {"depth": DEPTHS[seed % 3]}, "audience": {}}


THOUGHTS = [
    thought(seed, metadata=nested(seed), thinking=prose(5000 + seed, 40 + 5 * (seed % 30))) for seed in range(300)
]
BAD = [thought(1000 + i, thinking="") for i in range(7)] + [thought(2000, finish_reason="length")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What `ptrl think` leaves: two parts, rejects of both stages, the training set."""
    folder = tmp_path_factory.mktemp("think")
    write_thoughts(folder / "thoughts" / "00000.jsonl", [*BAD, *THOUGHTS[:100]])
    write_thoughts(folder / "thoughts" / "00001.jsonl", THOUGHTS[100:])
    (folder / "rejects").mkdir()
    line = {"id": "x", "reason": "timeout", "detail": "", "stage": "generate", "document": {}}
    (folder / "rejects" / "generate-00000.jsonl").write_text((json.dumps(line) + "\n") * 5)
    assemble(AssembleConfig(input=[str(folder / "thoughts")], output=str(folder / "train"), vocab_size=400))
    return folder


def test_everything_is_counted_and_measured(folder):
    found = analysis.analyse(folder, ThinkReportConfig(reasoning_field="labels.depth"))
    assert found.thoughts == 308 and found.rejected["generate"] == {"timeout": 5}
    assert found.rejected["assemble"] == {"empty_thinking": 7, "truncated": 1}
    tokenizer = Tokenizer(str(folder / "train.tokenizer.json"))
    assert [(item.document_tokens, item.thinking_tokens) for item in found.measured] == [
        (len(tokenizer.encode(item.text)), len(tokenizer.encode(item.thinking))) for item in THOUGHTS
    ]
    groups = analysis.by_group(found.measured, "reasoning")
    assert {name: len(values) for name, values in groups.items()} == dict.fromkeys(DEPTHS, 100)
    means = [statistics.fmean(values) for values in groups.values()]
    assert means == sorted(means, reverse=True)
    assert groups["none"] == [len(tokenizer.encode(item.thinking)) for item in THOUGHTS[::3]]
    assert analysis.by_group(found.measured, "audience") == {}  # an object is no label


def test_a_sample_is_a_stable_part_of_all(folder):
    some = analysis.analyse(folder, ThinkReportConfig(sample=100))
    assert 60 < len(some.measured) < 140 and some == analysis.analyse(folder, ThinkReportConfig(sample=100))
    everything = analysis.analyse(folder, ThinkReportConfig(sample=308)).measured
    assert len(everything) == 300 and all(item in everything for item in some.measured)


def test_table_and_plots(folder, capsys):
    assert main(["think_report", str(folder), "--reasoning_field", "labels.depth"]) == 0
    text = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := [c.strip() for c in line.split("|")[1:-1]])}
    assert rows["documents"] == ["313", "100.00%"] and rows["trained on"] == ["300", "95.85%"]
    assert rows["generate: timeout"] == ["5", "1.60%"] and rows["assemble: empty_thinking"] == ["7", "2.24%"]
    assert rows["law"][0] == rows["mathematics"][0] == "150" and set(DEPTHS) < set(rows)
    assert float(rows["thinking per document token"][0]) > 0.5
    names = {"lengths.png", "by_domain.png", "by_reasoning.png", "outcomes.png"}
    assert {path.name for path in (folder / "plots").iterdir()} == {*names, "summary.md"}
    assert all((folder / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert (folder / "plots" / "summary.md").read_text() in text


def test_what_is_missing_is_named(folder, tmp_path):
    cases = {"no folder thoughts": tmp_path, r"train\.json: no such file; assemble": tmp_path / "raw"}
    write_thoughts(tmp_path / "raw" / "thoughts" / "00000.jsonl", THOUGHTS[:2])
    for message, place in cases.items():
        with pytest.raises(InputError, match=message):
            analysis.run(ThinkReportConfig(runs=[str(place)]))
    with pytest.raises(InputError, match="2 directories and one output folder"):
        analysis.run(ThinkReportConfig(runs=["a", "b"], output="c"))
    with pytest.raises(InputError, match="no directory was given"):
        analysis.run(ThinkReportConfig())
