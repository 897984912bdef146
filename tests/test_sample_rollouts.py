"""The page of sample rollouts: which are shown, that nothing in them is HTML, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.sample_rollouts import read_sample_rollouts, write_sample_rollouts


def line(place: int, index: int, **changes: Any) -> dict[str, Any]:
    known = {"step": 1, "place": place, "prompt_id": f"p{place}", "task": "asr", "target": "The end.", "index": index}
    known |= {
        "messages": [{"role": "user", "content": f"Continue {place}."}],
        "finish_reason": "stop",
        "reason": "judged",
    }
    return (
        known
        | {"token_ids": [1, 2], "reward": 1.0, "prediction": "", "text": f"r{place}.{index}", "advantage": 0.5}
        | changes
    )


def dump(run: Path, step: int, lines: list[dict[str, Any]]) -> Path:
    path = run / "rollouts" / f"step_{step:08d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [*lines, {"step": step, "next_place": 9, "passes": 1, "responses": len(lines)}]
    path.write_text("".join(json.dumps(each) + "\n" for each in whole))
    return path


def test_the_first_prompts_of_three_steps(tmp_path):
    for step in (1, 2, 3, 4, 10):
        dump(tmp_path, step, [line(p, i) for p in (5, 3, 4, 8) for i in range(10)])
    groups = read_sample_rollouts(tmp_path)
    assert [(g.step, g.responses[0]["place"]) for g in groups] == [(s, p) for s in (1, 3, 10) for p in (5, 3, 4)]
    assert all(len(group.responses) == 8 and group.left_out == 2 for group in groups)
    assert read_sample_rollouts(tmp_path / "other") == []
    assert write_sample_rollouts({"a": tmp_path / "other"}, tmp_path) is None


def test_text_stays_text(tmp_path):
    evil = '<script>alert("x")</script>\n</div>'
    shown = {"text": evil, "prediction": evil, "reason": evil, "target": evil, "prompt_id": evil, "task": evil}
    messages = [{"role": evil, "content": evil}]
    dump(tmp_path / "run", 1, [line(0, 0, messages=messages, **shown), line(0, 1, text="half \ud83d")])
    path = write_sample_rollouts({evil: tmp_path / "run"}, tmp_path / "out")
    assert path == tmp_path / "out" / "rollouts.html"
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and page.count("</div>") == 3 and "src=" not in page
    assert page.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;") == 9


def test_what_a_response_was_worth(tmp_path):
    lines = [
        line(0, 0, prediction="guess"),
        line(0, 1, reward=0.0, reason="too_short", advantage=-1.5, finish_reason="length"),
        line(0, 2, reward=None, reason="deadline"),
    ]
    dump(tmp_path, 3, lines)
    path = write_sample_rollouts({"run": tmp_path}, tmp_path)
    assert path is not None
    page = path.read_text()
    assert '<details class="right"><summary>reward 1, judged, advantage +0.500, 2 tokens; prediction: guess<' in page
    assert '<details class="wrong"><summary>reward 0, too_short, advantage -1.500, 2 tokens, cut off<' in page
    assert '<details class=""><summary>reward none, deadline' in page
    assert "Step 3, asr p0: mean reward 0.500" in page and "user: Continue 0." in page


@pytest.mark.parametrize(
    ("change", "said"),
    [({"text": 3}, "has text 3; expected text"), ({"reward": "1"}, "has reward"), ({"place": None}, "has place null")],
)
def test_lines_that_are_no_responses(tmp_path, change, said):
    path = dump(tmp_path, 1, [line(0, 0), line(0, 1) | change])
    with pytest.raises(InputError, match=f"{path}:2 {said}"):
        read_sample_rollouts(tmp_path)
    # A line that a crash cut off is no error.
    path.write_text(json.dumps(line(0, 0)) + "\n" + json.dumps(line(0, 1))[:30])
    assert len(read_sample_rollouts(tmp_path)[0].responses) == 1
