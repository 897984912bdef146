"""`ptrl segment` on a real Slurm: the bytes of a run without it, by the same command three times."""

import json
from pathlib import Path

import nltk
from slurm_cluster import PARTITION
from test_segment import contents, prose

from megatron_ptrl.__main__ import main


def segment(output: str, *arguments: str) -> int:
    """The command, for two parts."""
    flags = ["--input", "in", "--output", output, "--part_megabytes", "1e-6", "--executor.tasks", "2"]
    return main(["segment", *flags, *arguments])


def test_slurm_writes_what_one_process_does(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("NLTK_DATA", "")
    Path("in").mkdir()
    for number in range(2):
        records = [{"id": f"{number}.{i}", "text": prose(i + 5 * number)} for i in range(9)]
        Path(f"in/{number}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert segment("here") == 0
    capsys.readouterr()
    for step in ("signatures", "segments"):
        arguments = ("--executor.kind", "slurm", "--executor.partition", PARTITION, "--executor.workers", "2")
        assert segment("out dir", *arguments) == 0
        said = f"out dir: {step}, 2 of 2 parts submitted; repeat the command when they are done"
        assert said in capsys.readouterr().out
        slurm.wait_until_empty()
    assert segment("out dir", *arguments) == 0
    assert "out dir: 18 documents" in capsys.readouterr().out
    assert contents(Path("out dir")) == contents(Path("here"))
    rejects = [json.loads(line) for line in Path("out dir/rejects.jsonl").open()]
    assert [reject["reason"] for reject in rejects] == ["near_duplicate"] * 4
