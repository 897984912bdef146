"""`ptrl evaluate` on the ranks of the pool, with a judge that counts letters."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from ranks import Ranks
from rl_runs import Letters
from tiny import Settings, parsed

from megatron_ptrl.records import Judgement, Prompt


class FirstLetter(Letters):
    """The answer is the response's first character; right is a letter."""

    def judge(self, prompt: Prompt, response: str) -> Judgement:
        answer = response.strip()[:1]
        return Judgement(reward=float(answer.isalpha()), reason="judged", prediction=answer, seconds=0.0)


def settings_of(checkpoint: str, output: Path | str, **overrides: Any) -> Settings:
    known: Settings = {"checkpoint": checkpoint, "output": str(output), "micro_batch": 2, "chunk": 2, "bootstrap": 50}
    known |= {"rollout.samples": 4, "rollout.max_tokens": 8, "rollout.batch": 8, "k": [1, 2]}
    return known | {name.replace("__", "."): value for name, value in overrides.items()}


def evaluate(
    rank: int, world_size: int, settings: Settings, rewarder: Any = None, stop_after: int | None = None
) -> str:
    """A whole evaluation on this rank; what it printed. stop_after: raise KeyboardInterrupt behind that many writes."""
    config = parsed(settings, "EvaluateConfig")
    from megatron_ptrl.evaluation.lines import Lines
    from megatron_ptrl.training import evaluate as module

    class Judged(module.Evaluation):
        def _make_rewarder(self) -> Any:
            return rewarder or FirstLetter()

    add, left = Lines.add, [stop_after]

    def counted(self: Lines, lines: Any) -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        add(self, lines)

    Lines.add = counted  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            Judged(config).run()
    except KeyboardInterrupt:
        return "stopped"
    finally:
        Lines.add = add  # type: ignore[method-assign]
    return output.getvalue()


def run_evaluation(ranks: Ranks, world_size: int, settings: Settings, rewarder: Any = None) -> str:
    """What rank 0 printed; the others print nothing."""
    printed = ranks.run(world_size, evaluate, settings, rewarder)
    assert printed[1:] == [""] * (world_size - 1)
    return printed[0]


def read(output: Path | str, name: str = "results.json") -> Any:
    """results.json, or the lines of a JSONL file."""
    path = Path(output) / name
    return json.loads(path.read_text()) if path.suffix == ".json" else [json.loads(x) for x in path.open()]
