"""examples/tpt: the whole of it at its smallest, and the parts that decide what its table means."""

import json
import random
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_examples import run_small

FOLDER = Path(__file__).parents[1] / "examples" / "tpt"
sys.path.insert(0, str(FOLDER))

from sums import draw_sum, is_held_out, is_right, think  # noqa: E402
from think_server import complete  # noqa: E402


@pytest.mark.slow
def test_it_runs_from_seeds_to_a_table_and_a_plot(tmp_path: Path) -> None:
    rows = run_small("tpt", tmp_path)
    told = f"\nTPT, right after thinking, run by run: {rows[3][3]}\n"
    assert (tmp_path / "table.md").read_text().endswith(told)
    assert rows[0] == ["", "seeds", "directly", "after thinking", "CE documents", "CE totals"]
    assert [row[:2] for row in rows[2:]] == [["vanilla", "1"], ["TPT", "1"]]
    assert rows[2][4:] != rows[3][4:] and all(float(cell) > 0 for row in rows[2:] for cell in row[4:])
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    # Every document came through, and both methods saw as many tokens.
    documents, thought = (json.loads((tmp_path / "data" / name).read_text()) for name in META)
    assert documents["documents"] == thought["documents"] == 60 and thought["tokens"] > 2 * documents["tokens"]
    logged = {name: (tmp_path / f"{name}-1" / "metrics.jsonl").read_text().splitlines() for name in ("vanilla", "tpt")}
    assert len(logged["vanilla"]) == len(logged["tpt"]) > 1


def test_an_example_of_another_size_is_not_gone_on_with(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--documents", "70", "--work_dir", str(tmp_path)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "documents.jsonl").write_text("{}\n" * 60)
    (tmp_path / "data" / "tokenizer.json").touch()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "has 60 documents, not 70; choose another --work_dir" in done.stderr


META = ("documents.json", "thought/train.json")


@pytest.mark.parametrize("stated", [True, False])
def test_thinking_is_true_step_by_step_and_ends_in_the_total(stated: bool) -> None:
    rng = random.Random(0)
    for _ in range(500):
        one = draw_sum(rng, held_out=rng.random() < 0.5)
        text = one.text(stated=stated)
        thinking = think(text, random.Random(1))
        assert thinking is not None and is_right(thinking, one.total) and not is_right(thinking, one.total + 1)
        a, b = map(int, re.findall(r"\d+", text)[:2])
        assert a + b == one.total and (str(one.total) in text) == (stated or one.total in (a, b))
        steps = re.findall(r"([\d+]+)=(\d+)", thinking)
        assert len(steps) == 2 and all(eval(left) == int(right) for left, right in steps)
        # The last step and the last digit of the first one are the total.
        assert int(steps[1][1] + steps[0][1][-1]) == one.total


def test_thinking_does_not_look_at_the_total_that_the_document_states() -> None:
    one = draw_sum(random.Random(2), held_out=False)
    stated = one.text(stated=True)
    wrong = stated.replace(str(one.total), "1")
    assert think(wrong, random.Random(3)) == think(stated, random.Random(3))
    assert one.up_to_total + f" {one.total} {one.things}." == stated
    assert think("Nothing to add here.", random.Random(3)) is None


def test_held_out_operands_occur_in_no_training_document() -> None:
    rng = random.Random(4)
    for held_out in (True, False):
        drawn = (re.findall(r"\d+", draw_sum(rng, held_out=held_out).beginning) for _ in range(500))
        assert all(is_held_out(int(a), int(b)) == held_out for a, b in drawn)
    # Their totals are like those of training, or a model would learn from training to avoid them.
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b)]
    assert len(pairs) / 90**2 == pytest.approx(1 / 8, abs=0.01)
    for modulus in (2, 3, 4, 5, 7, 8, 9, 10):
        counts = Counter((a + b) % modulus for a, b in pairs)
        assert max(counts.values()) < 1.3 * len(pairs) / modulus and len(counts) == modulus


@pytest.mark.parametrize("text", ["", "Together", "Together 12", "Together 12 0.", "12."])
def test_thinking_without_the_total_at_its_end_is_not_right(text: str) -> None:
    assert is_right("1+1+0=2. Together 12.", 12) and not is_right(text, 12)
    assert not is_right("Together 12. Together 13.", 12)


def test_the_server_thinks_about_the_document_in_the_prompt_and_by_the_seed() -> None:
    document = draw_sum(random.Random(5), held_out=False).text(stated=True)
    command = [sys.executable, str(FOLDER / "think_server.py")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        replies = [ask(url, f"{document}\n\n## End of the context ##\n\nThink.", seed) for seed in (1, 2, 1)]
        empty = ask(url, "Nothing to add here.", 1)
    finally:
        server.kill()
        server.wait()
        if server.stdout:
            server.stdout.close()
    thoughts = [reply["choices"][0]["message"]["reasoning_content"] for reply in replies]
    assert thoughts[0] == think(document, random.Random(1)) == thoughts[2]
    assert replies[1]["choices"] == complete({"messages": [{"content": document}], "seed": 2})["choices"]
    assert empty["choices"][0]["message"]["reasoning_content"] is None


def ask(url: str, prompt: str, seed: int) -> Any:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], "seed": seed}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply)
