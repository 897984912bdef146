"""Checkpoints that were cut, damaged or half written: passed over or told by name, never a start from nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from ranks import RankError
from saved_run import SAVED, STEPS, copy_until
from tiny import read_metrics, run_tiny, tiny_config


def data_file(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> str:
    file = data_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} has {file.stat().st_size} bytes of {file.stat().st_size + 1}"


def remove_a_file(checkpoint: Path) -> str:
    file = data_file(checkpoint)
    file.unlink()
    return f"{file.name} is missing"


def remove_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "run.json").unlink()
    return "run.json cannot be read"


def cut_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "run.json").write_text("{")
    return "run.json cannot be read"


def empty_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "run.json").write_text("[]")
    return "run.json names no files"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x55
    file.write_bytes(content)


def flip_in_the_index(checkpoint: Path, name: str = ".metadata") -> str:
    flip(checkpoint / name, 60)
    return f"{name} has changed since it was written"


def flip_in_what_all_ranks_share(checkpoint: Path) -> str:
    return flip_in_the_index(checkpoint, "common.pt")


DAMAGES = [truncate, remove_a_file, remove_the_manifest, cut_the_manifest, empty_the_manifest]
DAMAGES += [flip_in_the_index, flip_in_what_all_ranks_share]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_passed_over_by_name_and_training_repeated(ranks, prefix, tmp_path, saved_run, damage):
    folder = copy_until(saved_run, tmp_path / "run", STEPS)
    defect = damage(folder / "checkpoints" / f"step_{STEPS:08d}")
    (folder / "checkpoints" / f".step_{STEPS:08d}.partial").mkdir()
    run_tiny(ranks, 2, tiny_config(prefix, folder, train__steps=STEPS, parallel__tp=2, checkpoint__keep_last=1))
    log = (folder / "log.txt").read_text()
    assert f"not loaded: {folder / 'checkpoints' / f'step_{STEPS:08d}'}: {defect}" in log
    assert f"not loaded: {folder / 'checkpoints' / f'.step_{STEPS:08d}.partial'}: its save was cut short" in log
    assert f"continuing from {folder / 'checkpoints' / f'step_{SAVED:08d}'}" in log
    assert read_metrics(folder) == read_metrics(saved_run)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{STEPS:08d}"]


def test_tensors_that_cannot_be_read_are_told_by_file_with_the_checkpoint_before(ranks, prefix, tmp_path, saved_run):
    folder = copy_until(saved_run, tmp_path / "run", STEPS)
    newest, before = (folder / "checkpoints" / f"step_{step:08d}" for step in (STEPS, SAVED))
    flip(data_file(newest), 0)
    settings = {"train__steps": STEPS, "parallel__tp": 2}
    told = f"InputError: {data_file(newest)} is damaged (at byte 0: archive/data.pkl is not as it was written); "
    told += f"remove {newest}, the one before it is {before}"
    with pytest.raises(RankError, match=re.escape(told)):
        run_tiny(ranks, 2, tiny_config(prefix, folder, **settings))
    shutil.rmtree(before)
    with pytest.raises(RankError, match=re.escape(f"remove {newest}, there is none before it")):
        run_tiny(ranks, 2, tiny_config(prefix, tmp_path / "new", **settings, checkpoint__load=str(newest)))


def test_a_save_before_a_broken_later_one_is_kept(ranks, prefix, tmp_path, saved_run):
    """Step 8 is broken, the run goes back to 4 and saves 6: that one is now the newest whole one and must stay."""
    folder = copy_until(saved_run, tmp_path / "run", STEPS)
    truncate(folder / "checkpoints" / f"step_{STEPS:08d}")
    options = {"train__steps": 6, "optimizer__decay_steps": STEPS, "checkpoint__keep_last": 1}
    run_tiny(ranks, 2, tiny_config(prefix, folder, parallel__tp=2, **options))
    assert json.loads((folder / "checkpoints" / "step_00000006" / "run.json").read_text())["step"] == 6


def test_a_run_whose_checkpoints_are_all_broken_stops_and_lists_them(ranks, prefix, tmp_path, saved_run):
    folder = copy_until(saved_run, tmp_path / "run", STEPS)
    defects = [damage(folder / "checkpoints" / f"step_{s:08d}") for s, damage in ((4, truncate), (8, remove_a_file))]
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RankError, match="InputError.*no whole checkpoint") as caught:
        run_tiny(ranks, 2, tiny_config(prefix, folder, train__steps=STEPS, parallel__tp=2))
    assert all(defect in str(caught.value) for defect in defects)
    assert (folder / "metrics.jsonl").read_bytes() == before, "the figures of the lost steps are gone"


def test_a_save_that_was_cut_short_before_any_other_starts_over(ranks, prefix, tmp_path):
    (tmp_path / "checkpoints" / ".step_00000002.partial").mkdir(parents=True)
    assert len(run_tiny(ranks, 1, tiny_config(prefix, tmp_path, train__steps=3))) == 3
