"""Thinking -> `.bin/.idx`: every thought is in the training data or in the rejects, the same bytes whatever happens."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from thoughts import prose, rejected, thought, write_thoughts
from tiny import run_tiny, tiny_config

from megatron_ptrl.__main__ import main
from megatron_ptrl.config import AssembleConfig, ThinkingFilterConfig
from megatron_ptrl.data.indexed import read_meta
from megatron_ptrl.data.indexed_output import PUBLISHED
from megatron_ptrl.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Thought
from megatron_ptrl.thinking import assemble_stage
from megatron_ptrl.thinking.assemble_stage import run

ODD_TEXTS = ["naïve – 東京 🙂\r\n", "a\x00b\tc", "before<|endoftext|>after", "  x  ", "x", "🙂" * 50]
THOUGHTS = [thought(seed) for seed in range(400)] + [thought(500 + i, text=text) for i, text in enumerate(ODD_TEXTS)]
ALL_BUT_TEXT = ThinkingFilterConfig(truncated="keep", refusals=False, max_compression=0, max_copied=1, languages=[])


def whole(item: Thought) -> str:
    return f"{item.text}\n\n<think>{item.thinking}</think>"


def documents_of(prefix: str) -> list[str]:
    """Every document as Megatron-Core reads it back, decoded, without its EOD."""
    tokenizer = Tokenizer(prefix + ".tokenizer.json")
    found = []
    for ids in IndexedDataset(prefix):
        assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
        found.append(tokenizer.decode(ids[:-1]))
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    train_tokenizer((whole(item) for item in THOUGHTS), path, 500)
    return str(path)


def assembled(folder: Path, thoughts: list[Thought | str], **settings) -> str:
    """Prefix of what was assembled of the thoughts."""
    source = write_thoughts(folder / "thoughts" / "00000.jsonl", thoughts)
    prefix = str(folder / "train")
    run(AssembleConfig(input=[str(source)], output=prefix, **settings))
    return prefix


@pytest.fixture(scope="module")
def single(tmp_path_factory, tokenizer) -> str:
    return assembled(tmp_path_factory.mktemp("single"), mixed(), tokenizer=tokenizer)


def mixed() -> list[Thought | str]:
    """More than a worker's batches, with every third one bad."""
    empty, truncated = thought(1, thinking="", id="empty"), thought(2, finish_reason="length")
    bad: list[Thought | str] = ["{broken", "[]", empty, truncated]
    items: list[Thought | str] = []
    for i, item in enumerate(THOUGHTS * 4):
        items += [item, bad[i // 2 % len(bad)]] if i % 2 else [item]
    return items


def test_documents_are_followed_by_their_thinking_token_by_token(single, tokenizer):
    ids = Tokenizer(tokenizer)
    expected = [ids.encode(whole(item)) + [ids.eod] for item in THOUGHTS * 4]
    assert [list(document) for document in IndexedDataset(single)] == expected
    assert documents_of(single)[:406] == [whole(item) for item in THOUGHTS]
    meta, counts = read_meta(single), {}
    for _, reason in rejected(single + ".rejects.jsonl"):
        counts[reason] = counts.get(reason, 0) + 1
    assert meta.rejected == counts and set(counts) == {"not_a_thought", "empty_thinking", "truncated"}
    assert meta.documents + sum(counts.values()) == len(mixed())
    assert (meta.documents, meta.tokens) == (len(expected), sum(map(len, expected)))
    assert not list(Path(single).parent.glob("*.tmp"))


def test_every_reject_has_its_line_as_it_came(single):
    lines = Path(single).parent.joinpath("thoughts", "00000.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, Path(single + ".rejects.jsonl").read_text(encoding="utf-8").splitlines()):
        assert set(record) == {"id", "reason", "detail", "stage", "file", "line", "document"}
        line = lines[record["line"] - 1]
        assert record["document"] == (line if line == "{broken" else json.loads(line))


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(workers, single, tokenizer, tmp_path):
    prefix = assembled(tmp_path, mixed(), tokenizer=tokenizer, workers=workers)
    for suffix in (*PUBLISHED, ".rejects.jsonl"):
        expected = Path(single + suffix).read_bytes().replace(str(Path(single).parent).encode(), b"")
        assert Path(prefix + suffix).read_bytes().replace(str(tmp_path).encode(), b"") == expected


def test_a_training_run_takes_it_with_the_tokenizer_made_here(ranks, tmp_path):
    prefix = assembled(tmp_path, [*THOUGHTS], vocab_size=400)
    assert read_meta(prefix).vocab_size == 400 and documents_of(prefix) == [whole(item) for item in THOUGHTS]
    metrics = run_tiny(ranks, 1, tiny_config(prefix, tmp_path / "run", train__steps=3))
    assert len(metrics) == 3 and all(numpy.isfinite(row["loss"]) for row in metrics)


def test_cut_and_windows(tokenizer, tmp_path):
    long = thought(900, text=prose(1, 3000), thinking=prose(2, 100))
    odd = thought(901, text="🙂东京 " * 300, thinking=prose(3, 50))
    ids, short = Tokenizer(tokenizer), THOUGHTS[3]
    items = [short, long, odd]
    settings = {"tokenizer": tokenizer, "window_tokens": 200}
    cut = documents_of(assembled(tmp_path / "cut", items, document="cut", **settings))
    assert cut[0] == whole(short) and len(cut) == 3
    windows = documents_of(assembled(tmp_path / "windows", items, document="windows", **settings))
    assert windows[:2] == cut[:2] and len(windows) > 20
    at = windows.index(cut[2])
    for item, parts in ((long, windows[1:at]), (odd, windows[at:])):
        behind = f"\n\n<think>{item.thinking}</think>"
        assert parts[0].endswith(behind)
        stored = [parts[0].removesuffix(behind), *parts[1:]]
        assert "".join(stored) == item.text
        # Where a word is cut its halves can be a token or two more than it was.
        assert all(abs(len(ids.encode(part)) - 200) <= 3 for part in stored[:-1])
        assert len(ids.encode(stored[-1])) <= 203


@pytest.mark.parametrize("text", ["a b c d e f " * 400, "🙂" * 40, "x" * 999, ""])
def test_where_tokens_end_does_not_depend_on_how_much_was_looked_at(text, tokenizer):
    ids = Tokenizer(tokenizer)
    for tokens in (1, 7, 100):
        end = ids.end_of_tokens(text, tokens)
        offsets = ids._tokenizer.encode(text, add_special_tokens=False).offsets
        assert end == (len(text) if len(offsets) <= tokens else max(1, min(offsets[tokens - 1][1], offsets[tokens][0])))


def test_format_is_a_choice(tokenizer, tmp_path):
    settings = {"separator": "\n[thinking]\n", "opening": "<t>", "closing": "</t>", "append_eod": False}
    items = [thought(1), thought(2, text="has <think> inside"), thought(3, text="has <t> inside")]
    prefix = assembled(tmp_path, items, tokenizer=tokenizer, **settings)
    ids = Tokenizer(tokenizer)
    expected = [f"{item.text}\n[thinking]\n<t>{item.thinking}</t>" for item in items[:2]]
    assert [list(document) for document in IndexedDataset(prefix)] == [ids.encode(text) for text in expected]
    assert rejected(prefix + ".rejects.jsonl") == [(items[2].id, "tag_in_document")]


def test_truncated_thinking_is_closed_when_it_is_kept(tokenizer, tmp_path):
    item = thought(1, finish_reason="length")
    prefix = assembled(tmp_path, [item], tokenizer=tokenizer, filters=ThinkingFilterConfig(truncated="keep"))
    assert documents_of(prefix) == [whole(item)] and not Path(prefix + ".rejects.jsonl").exists()


def test_every_kind_of_line_is_either_trained_on_or_rejected(tokenizer, tmp_path):
    good, large = thought(1), thought(2, text=prose(5, 200_000) * 10)
    line = thought(3).to_line().decode()
    lines = [
        "{broken",
        "[" * 100_000,
        "{}",
        json.dumps({"id": "unknown field", "colour": 1}),
        line.replace('"thinking": "', '"thinking": 7, "x": "'),
        json.dumps(json.loads(line) | {"thinking": ["a", "list"]}),
        thought(3, text="\ud800").to_line().decode(),
        "",
        "  ",
        good.to_line().decode(),
    ]
    folder = tmp_path / "thoughts"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines)).encode()))
    write_thoughts(folder / "b.jsonl", [large])
    (folder / "c.jsonl").write_bytes(b'\xff{"id": 1}\n')
    prefix = str(tmp_path / "train")
    run(AssembleConfig(input=[str(folder)], output=prefix, tokenizer=tokenizer, workers=2))
    assert documents_of(prefix) == [whole(good), whole(large)]
    found = rejected(prefix + ".rejects.jsonl")
    assert [reason for _, reason in found] == ["not_a_thought"] * 6 + ["bad_text", "not_a_thought"]
    assert found[3][0] == "unknown field" and found[0][0] is None


def test_nothing_left_or_not_thinking_is_told_in_one_line(tokenizer, tmp_path):
    for given in (None, tokenizer):
        with pytest.raises(InputError, match=r"no thinking to train on; rejected: 2 empty_thinking, see .*rejects"):
            assembled(tmp_path, [thought(1, thinking=""), thought(2, thinking=" ")], tokenizer=given)
        assert len(rejected(str(tmp_path / "train.rejects.jsonl"))) == 2 and not (tmp_path / "train.idx").exists()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(999))[:-9])
    for name, message in {"a.txt": "not a file of thinking", "cut.jsonl.gz": "damaged archive"}.items():
        with pytest.raises(InputError, match=message):
            run(AssembleConfig(input=[str(tmp_path / name)], output=str(tmp_path / "x"), tokenizer=tokenizer))
    assert not list(tmp_path.glob("*.tmp")), "neither of what failed in the middle"


def test_a_thought_that_spells_the_eod_as_a_word_is_put_aside_whole(tmp_path):
    import tokenizers

    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "END": 1}, unk_token="a"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.save(str(tmp_path / "t.json"))
    # The last window of the second one would be fine by itself.
    items = [thought(i, text=text, thinking="why not") for i, text in enumerate(["a b", "a END c d e f", "g h"])]
    settings = {"tokenizer": str(tmp_path / "t.json"), "eod_token": "END", "document": "windows", "window_tokens": 2}
    prefix = assembled(tmp_path, items, filters=ALL_BUT_TEXT, **settings)
    assert rejected(prefix + ".rejects.jsonl") == [(items[1].id, "eod_in_text")]
    assert [ids.tolist() for ids in IndexedDataset(prefix)] == [[0] * 4 + [1]] * 2


def test_killed_at_any_time_and_repeated_by_the_same_command(single, tokenizer, tmp_path):
    source = write_thoughts(tmp_path / "thoughts" / "00000.jsonl", mixed() * 3)
    prefix = str(tmp_path / "train")
    words = ["--input", str(source), "--output", prefix, "--tokenizer", tokenizer, "--workers", "2"]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_ptrl", "assemble", *words]
    for moment in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        written = tmp_path / ("train.bin.tmp" if moment else "train.rejects.jsonl.tmp")
        while not (written.exists() and (moment == 0 or written.stat().st_size > 200_000)):
            assert process.poll() is None
            time.sleep(0.005)
        with pytest.raises(InputError, match="another process is writing it"):
            run(AssembleConfig(input=[str(source)], output=prefix, tokenizer=tokenizer))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not {path.name for path in tmp_path.iterdir()} & {"train.bin", "train.idx", "train.json"}
    run(AssembleConfig(input=[str(source)], output=prefix, tokenizer=tokenizer))
    once, thrice = IndexedDataset(single), IndexedDataset(prefix)
    assert len(thrice) == 3 * len(once)
    bin_file = Path(single + ".bin").read_bytes()
    assert Path(prefix + ".bin").read_bytes() == bin_file * 3 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("seed", range(2))
def test_lines_come_back_in_order_and_with_their_numbers(seed, tmp_path):
    chosen = random.Random(seed)
    lines = [chosen.choice(["", "  ", f"line {i}"]) for i in range(50)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    heard: list[int] = []
    found = list(assemble_stage.read_lines([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], heard.append))
    expected = [(number, text) for number, text in enumerate(lines, start=1) if text.strip()]
    assert [(line.number, line.content.decode().rstrip("\n")) for line in found] == expected * 2
    assert heard == sorted(heard) and heard[-1] == 2 * (tmp_path / "a.jsonl").stat().st_size


# Too little for the tokenizer, and for the tokens.
@pytest.mark.parametrize("largest", [1_000, 60_000])
def test_a_full_disk_is_told_in_one_line(largest, tokenizer, tmp_path, capfd):
    source = write_thoughts(tmp_path / "thoughts" / "00000.jsonl", THOUGHTS)
    words = ["assemble", "--input", str(source), "--output", str(tmp_path / "train"), "--tokenizer", tokenizer]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capfd.readouterr().err
    assert told.startswith("ptrl assemble: ") and "make room and start the same command again" in told, told
    assert told.count("\n") == 1 and not list(tmp_path.glob("train.*")), "of what failed nothing is left"
    assert main(words) == 0
