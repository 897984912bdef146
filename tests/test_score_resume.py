"""A scoring that was killed at any moment gives the same bytes; one that is of something else is refused."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from ranks import RankError
from scoring import reference_settings, score
from test_indexed import tokenized
from tiny import Settings, flags, run_tiny

from megatron_ptrl.config import ModelConfig, ParallelConfig, PretrainConfig, ScoreConfig
from megatron_ptrl.data.indexed import open_indexed
from megatron_ptrl.data.scored_chunks import ScoredChunks
from megatron_ptrl.data.windows import Windows, pack
from megatron_ptrl.errors import InputError
from megatron_ptrl.training.frozen import check_padding
from megatron_ptrl.training.score import run

DEADLINE = 120.0
OVERLAP, CHUNK, BLOCKED = 24, 4, 5


def settings(reference: Settings, data: str, output: Path, **overrides: object) -> Settings:
    known = {"checkpoint": reference["run_dir"], "data": data, "output": str(output)}
    return known | {"overlap": OVERLAP, "micro_batch": 2, "chunk": CHUNK} | overrides


@contextlib.contextmanager
def launched(wanted: Settings) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_ptrl", "score", *flags(wanted)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE)


def kill_when(wanted: Settings, moment: Callable[[], bool]) -> None:
    """kill -9 once `moment` has come and the process is blocked where a pipe stands in place of a file."""
    end = time.monotonic() + DEADLINE
    with launched(wanted) as process:
        while not moment():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "that moment did not come in time"
            time.sleep(0.01)


def test_killed_in_a_chunk_and_in_the_merge_the_same_command_gives_the_same_bytes(ranks, reference, unscored, tmp_path):
    ranks.run(1, score, settings(reference, unscored, tmp_path / "whole"))
    wanted, parts = settings(reference, unscored, tmp_path / "s"), tmp_path / "s.parts"

    parts.mkdir()
    # Opening a pipe that nobody reads blocks: the process stays in the middle of writing this chunk.
    os.mkfifo(parts / f"chunk_{BLOCKED:08d}.bin.tmp")
    kill_when(wanted, lambda: len(list(parts.glob("chunk_*.bin"))) == BLOCKED)
    os.remove(parts / f"chunk_{BLOCKED:08d}.bin.tmp")
    (parts / f"chunk_{BLOCKED:08d}.bin.tmp").write_bytes(b"half")
    # And what a disk may lose: a file that is short, one with a wrong byte.
    names = sorted(path.name for path in parts.glob("chunk_*.bin"))
    assert names == [f"chunk_{number:08d}.bin" for number in range(BLOCKED)]
    (parts / names[1]).write_bytes((parts / names[1]).read_bytes()[:-7])
    content = (parts / names[3]).read_bytes()
    (parts / names[3]).write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    kept = {name: (parts / name).stat().st_mtime_ns for name in (names[0], names[2], names[4])}

    os.mkfifo(tmp_path / "s.idx.tmp")
    kill_when(wanted, lambda: (tmp_path / "s.bin").exists())
    os.remove(tmp_path / "s.idx.tmp")
    assert not (tmp_path / "s.json").exists() and not (tmp_path / "s.idx").exists()
    assert {name: (parts / name).stat().st_mtime_ns for name in kept} == kept, "whole chunks were scored again"

    with launched(wanted) as process:
        printed = process.communicate(timeout=DEADLINE)[0]
        assert process.returncode == 0, printed
    windows = open_windows(unscored)
    assert f"{len(windows)} of {len(windows)} chunks are there already" in printed
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"s{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not parts.exists() and not list(tmp_path.glob("*.tmp"))


def open_windows(data: str, chunk: int = CHUNK) -> Windows:
    indexed, _ = open_indexed(data)
    return Windows(indexed.sequence_lengths.copy(), window=64, overlap=OVERLAP, chunk=chunk)


def test_a_finished_one_is_left_and_another_is_refused(ranks, reference, unscored, tmp_path):
    wanted = settings(reference, unscored, tmp_path / "s")
    ranks.run(1, score, wanted)
    before = (tmp_path / "s.bin").stat().st_mtime_ns
    (tmp_path / "s.parts").mkdir()
    again, on_two = ranks.run(1, score, wanted)[0], ranks.run(2, score, wanted)[0]
    assert again == on_two == f"{tmp_path / 's'} is finished; nothing to do\n"
    assert (tmp_path / "s.bin").stat().st_mtime_ns == before and not (tmp_path / "s.parts").exists()
    refused(ranks, {**wanted, "overlap": 8}, r"s\.json is of a side-car with another overlap; remove it")
    (tmp_path / "s.json").unlink()
    refused(ranks, wanted, r"s\.bin exists and is of no scoring")
    (tmp_path / "s.parts").mkdir()
    (tmp_path / "s.parts" / "plan.json").write_text("{}")
    refused(ranks, wanted, r"s\.parts is of a scoring with another format, storage, data, .*, chunk; remove it")


@pytest.mark.parametrize("text", ["", "[]", "null"])
def test_a_plan_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json: not the plan of a scoring; remove"):
        ScoredChunks(tmp_path, "fp32").begin({"chunk": 4})


def test_only_one_scoring_writes_to_an_output(tmp_path):
    # Two in the merge would cut one another's file, and one that died there would leave zeros: probabilities of 1.
    chunks = ScoredChunks(tmp_path / "s.parts", "fp32")
    with chunks.begin({"chunk": 4}), pytest.raises(InputError, match="another `ptrl score` is writing to .*s.parts"):
        chunks.begin({"chunk": 4})
    chunks.begin({"chunk": 4}).close()


def refused(ranks: Any, wanted: Settings, message: str, change: Any = None, world_size: int = 1) -> None:
    with pytest.raises(RankError, match=message) as caught:
        ranks.run(world_size, score, wanted, change)
    assert "InputError" in str(caught.value)


@contextlib.contextmanager
def data_changed_meanwhile(module: Any) -> Iterator[None]:
    scored = module.Scoring._score

    def change_and_score(self: Any, missing: list[int]) -> float:
        rate = scored(self, missing)
        path = Path(self.config.data + ".bin")
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)
        return rate

    module.Scoring._score = change_and_score
    try:
        yield
    finally:
        module.Scoring._score = scored


def test_data_that_change_meanwhile_get_no_side_car(ranks, reference, unscored, tmp_path):
    for file in Path(unscored).parent.glob("data.*"):
        shutil.copy(file, tmp_path)
    wanted = settings(reference, str(tmp_path / "data"), tmp_path / "s")
    refused(ranks, wanted, r"data has changed while it was scored", data_changed_meanwhile)
    assert not list(tmp_path.glob("s.*n"))
    refused(ranks, wanted, r"s\.parts is of a scoring with another data, data_sha256; remove it")


BAD_CELL = 7


@contextlib.contextmanager
def an_infinite_value(module: Any) -> Iterator[None]:
    from megatron_ptrl.training import scorer

    right = scorer._stats

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        found[0, 0, BAD_CELL] = -numpy.inf
        return found

    with mock.patch.object(scorer, "_stats", wrong):
        yield


def test_a_value_that_is_not_finite_is_named(ranks, reference, unscored, tmp_path):
    pieces = [piece for piece in open_windows(unscored).pieces(0) if piece.inputs]
    found = [
        (piece.document, piece.begin + BAD_CELL - column + 1)
        for piece, (row, column) in zip(pieces, pack([p.inputs for p in pieces], 64), strict=True)
        if row % 2 == 0 and column <= BAD_CELL < column + piece.inputs
    ]
    document, token = found[0]
    message = rf"data, document {document}, token {token}: the reference gives it the log-probability -inf"
    refused(ranks, settings(reference, unscored, tmp_path / "s"), message, an_infinite_value)
    assert not (tmp_path / "s.parts" / "chunk_00000000.bin").exists()


@contextlib.contextmanager
def no_room_for_rows(module: Any) -> Iterator[None]:
    """The pass for the first tokens fits, that of the rows asks torch for more than there are addresses."""
    from megatron_ptrl.training import scorer

    right = scorer._forward_step

    def greedy(*arguments: Any) -> Any:
        torch.empty(1 << 50)
        return right(*arguments)

    with mock.patch.object(scorer, "_forward_step", greedy):
        yield


def test_a_window_that_memory_cannot_hold_is_told_and_leaves_the_output_free(ranks, reference, unscored, tmp_path):
    wide = settings(reference, unscored, tmp_path / "s", window=20_000_000)
    told = r"window is 20000000, and memory cannot hold .* 1 x 20000000 tokens, .* 400,000,000,000,000 bytes .*; "
    refused(ranks, wide, told + "lower window\n")
    told = r"window is 64, and memory cannot hold .* 2 x 64 tokens, .* 8,192 bytes .*; lower window, or micro_batch, "
    refused(ranks, settings(reference, unscored, tmp_path / "s"), told + "which is 2\n", no_room_for_rows)
    assert not (tmp_path / "s.parts").exists()
    ranks.run(1, score, settings(reference, unscored, tmp_path / "s"))


def test_bad_input_is_refused(ranks, reference, unscored, tmp_path):
    other = tokenized(tmp_path, "other", ["some words"] * 9, vocab_size=290)
    output = tmp_path / "s"
    cases = {
        r"step_00000003 was trained with another tokenizer \(.*lary 512\) than .*other.* 265\)": {"data": other},
        r"checkpoint is nowhere, and there is no such folder": {"checkpoint": "nowhere"},
        r"nothing\.bin: no such file": {"data": str(tmp_path / "nothing")},
        r"overlap is 64; expected less than the window, 64": {"overlap": 64},
        r"1 ranks do not divide by parallel.tp 2": {"parallel.tp": 2},
    }
    for message, change in cases.items():
        refused(ranks, {**settings(reference, unscored, output), **change}, message)
    beyond = tmp_path / "beyond"
    for suffix in (".bin", ".idx", ".json", ".tokenizer.json"):
        shutil.copy(unscored + suffix, str(beyond) + suffix)
    tokens = numpy.fromfile(f"{beyond}.bin", numpy.uint16)
    tokens[2 + 3] = 600
    tokens.tofile(f"{beyond}.bin")
    message = r"beyond, document \d, token \d+: its id is not one of the 512"
    refused(ranks, settings(reference, str(beyond), output), message)
    assert not list(tmp_path.glob("s.[bij]*"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"overlap": -1}, "overlap is -1"),
        ({"window": 1}, "window is 1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"parallel": ParallelConfig(cp=2)}, "parallel.cp is 2; scoring does not cut rows over ranks"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ScoreConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data": "x"}, "checkpoint is empty; expected a run directory"),
        ({"checkpoint": "x"}, "data is empty; expected the prefix"),
        ({"checkpoint": "x", "data": "y", "output": "y"}, "output y is the data themselves"),
    ],
)
def test_empty_names_and_an_output_over_the_data_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        run(ScoreConfig(**fields))


def test_experts_over_data_parallel_ranks_give_the_same(ranks, prefix, unscored, tmp_path):
    """The second rank has no chunk in the last round; it must run forward all the same."""
    experts = {"model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 32}
    trained = {**reference_settings(prefix, tmp_path / "run"), **experts}
    run_tiny(ranks, 1, trained)
    one, two = (settings(trained, unscored, tmp_path / name, storage="fp32", chunk=14) for name in ("one", "two"))
    ranks.run(1, score, one)
    assert len(open_windows(unscored, 14)) == 3
    ranks.run(2, score, {**two, "parallel.ep": 2})
    found, expected = (numpy.fromfile(tmp_path / f"{name}.bin", numpy.float32) for name in ("two", "one"))
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_layout_that_pads_the_vocabulary_otherwise_is_refused(tmp_path):
    manifest = {"vocab_size": 511, "layout": {"tp": 1}}
    config = PretrainConfig(model=ModelConfig(make_vocab_size_divisible_by=1), parallel=ParallelConfig(tp=2))
    with pytest.raises(InputError, match=r"checkpoint: x has .* 511 padded to 511, and parallel.tp 2 .* to 512"):
        check_padding(Path("x"), manifest, config, "checkpoint")
    check_padding(Path("x"), {**manifest, "layout": {"tp": 2}}, config, "checkpoint")
