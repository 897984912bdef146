"""The loop of ReMiT (arXiv:2602.03075) at toy size: what reinforcement taught one model, the next learns from its text.

    make_data -> tokenize -> pretrain -> rl_tune -> score -> mid-training by each method, over seeds -> compare, report

    python examples/flywheel/run.py [--work_dir .flywheel] [--seeds 3] [--methods vanilla remit rho1] [--small]

Mid-training starts from the pre-trained weights, and every method sees the same tokens in the same order; a seed
changes that order. Nothing is downloaded, no GPU is needed. A second call goes on from where the first one came to;
delete the work directory to start over. `--small` only shows that every stage works: its models learn nothing.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from commands import PTRL, Stages, Words, run, run_side_by_side, timed

HERE = Path(__file__).parent
WEIGHTINGS = {"vanilla": "none", "remit": "remit", "rho1": "rho1"}

SMALL: dict[str, Words] = {
    "make_data": ["--pretrain", 400, "--midtrain", 200, "--prompts", 32, "--held_out", 8],
    "pretrain": ["--train.steps", 6, "--optimizer.warmup_steps", 1, "--train.eval_samples", 8],
    "rl_tune": ["--train.steps", 2, "--train.global_batch", 16, "--optimizer.warmup_steps", 0, "--new_tokens", 8],
    "midtrain": ["--train.steps", 4, "--optimizer.warmup_steps", 1, "--train.eval_samples", 8, "--data.split", "80,20"],
    "compare": ["--new_tokens", 8],
}


@dataclass(frozen=True)
class Flywheel:
    """Everything lies in `work`."""

    work: Path
    seeds: int
    methods: list[str]
    stages: Stages

    def run(self) -> None:
        """All stages, one after the other."""
        flags, ranks = self.stages.flags, self.stages.ranks
        data, pretrained, rl_tuned = self.work / "data", self.work / "pretrained", self.work / "rl_tuned"
        pretraining, midtraining, sidecar = data / "pretrain", data / "midtrain", data / "midtrain.logprob"
        tokenizer, prompts = data / "tokenizer.json", data / "prompts.jsonl"

        if not tokenizer.exists():
            run([HERE / "make_data.py", data, *flags("make_data")])
        for prefix in (pretraining, midtraining):
            if not prefix.with_suffix(".idx").exists():
                source = ["--input", f"{prefix}.jsonl", "--tokenizer", tokenizer]
                run([*PTRL, "tokenize", *source, "--output", prefix])

        source = ["--data.train", pretraining]
        run([*ranks, *PTRL, "pretrain", *flags("pretrain", "pretrain.yaml"), *source, "--run_dir", pretrained])
        source += ["--prompts", prompts, "--checkpoint.load", pretrained]
        run([*ranks, HERE / "rl_tune.py", *flags("rl_tune", "rl.yaml"), *source, "--run_dir", rl_tuned])
        run([*ranks, *PTRL, "score", "--checkpoint", rl_tuned, "--data", midtraining, "--output", sidecar])

        runs = {method: [self.work / f"{method}-{seed + 1}" for seed in range(self.seeds)] for method in self.methods}
        source = ["--data.train", midtraining, "--checkpoint.load", pretrained]
        commands: list[Words] = []
        for method, run_dirs in runs.items():
            weighting: Words = ["--remit.weighting", WEIGHTINGS[method]]
            weighting += ["--remit.sidecar", sidecar] if method != "vanilla" else []
            for seed, run_dir in enumerate(run_dirs, start=1):
                words = [*flags("midtrain", "midtrain.yaml"), *source, *weighting, "--train.seed", seed]
                commands.append([*PTRL, "pretrain", *words, "--run_dir", run_dir])
        run_side_by_side(commands)

        named = {"pre-trained": [pretrained], "RL-tuned": [rl_tuned], **runs}
        words = [f"{name}={','.join(map(str, run_dirs))}" for name, run_dirs in named.items()]
        words += ["--problems", data / "held_out.jsonl", "--prose", data / "held_out_prose.jsonl"]
        run([HERE / "compare.py", *words, *flags("compare"), "--output", self.work / "table.md"])
        run([*PTRL, "report", *(run_dirs[0] for run_dirs in runs.values()), "--output", self.work / "report"])


def main() -> None:
    """Parse the command line and run the loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(".flywheel"))
    parser.add_argument("--seeds", type=int, default=3, help="mid-training runs of each method (default 3)")
    parser.add_argument("--methods", nargs="+", choices=WEIGHTINGS, default=list(WEIGHTINGS))
    parser.add_argument("--small", action="store_true", help="a minute instead of minutes, and nothing is learnt")
    arguments = parser.parse_args()
    stages = Stages(HERE / "configs", SMALL if arguments.small else None)
    with timed():
        Flywheel(arguments.work_dir, arguments.seeds, arguments.methods, stages).run()


if __name__ == "__main__":
    main()
