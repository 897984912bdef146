"""RLPT (arXiv:2509.19249) at toy size: a model learns to work out what a text says next, from the text alone.

    make_data -> tokenize, segment -> pretrain -> sft (cold start) -> rl, over seeds:
        RLPT                    next and masked sentences, the paper's prefix reward
        RLPT, strict reward     the same, the prediction held against one sentence
        RLVR                    questions with a number for an answer
        RLPT + RLVR             the same questions, from the end of RLPT on
    -> evaluate on stories that no training has seen -> compare, report

    python examples/rlpt/run.py [--work_dir .rlpt] [--seeds 3] [--methods rlpt rlvr ...] [--small]

All runs start from one cold start; a seed changes the order of the prompts and what is drawn. The judge is the lexical
one, which is enough where a sentence can be said in one way only. Nothing is downloaded, no GPU is needed. A second
call goes on from where the first one came to; delete the work directory to start over. `--small` only shows that every
stage works: its models learn nothing.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from commands import PTRL, Stages, Words, run, run_side_by_side, timed

HERE = Path(__file__).parent
NAMES = {"rlpt": "RLPT", "strict": "RLPT, strict reward", "rlvr": "RLVR", "rlpt-rlvr": "RLPT + RLVR"}

SMALL: dict[str, Words] = {
    "make_data": ["--pretrain", 100, "--cold_start", 8, "--rl", 8, "--held_out", 2],
    "pretrain": ["--train.steps", 4, "--optimizer.warmup_steps", 1],
    "segment": [],
    "sft": ["--train.steps", 2, "--optimizer.warmup_steps", 1],
    "rl": [
        *("--train.steps", 5, "--optimizer.warmup_steps", 1),
        *("--rollout.prompts", 2, "--rollout.samples", 2, "--rollout.max_tokens", 8),
    ],
    "evaluate": ["--rollout.samples", 2, "--rollout.max_tokens", 8, "--k", 1],
    # Its rewards are all 0, which no law can be fitted to.
    "report": ["--bootstrap", 20, "--scaling", "[prompt_tokens_mean]"],
}


@dataclass(frozen=True)
class Example:
    """Everything lies in `work`."""

    work: Path
    seeds: int
    methods: list[str]
    stages: Stages

    def run(self) -> None:
        """All stages, one after the other."""
        flags, ranks = self.stages.flags, self.stages.ranks
        data, tokenizer = self.work / "data", self.work / "data" / "tokenizer.json"
        if not tokenizer.exists():
            run([HERE / "make_data.py", data, *flags("make_data")])
        if not (data / "pretrain.idx").exists():
            source: Words = ["--input", data / "pretrain.jsonl", "--tokenizer", tokenizer]
            run([*PTRL, "tokenize", *source, "--output", data / "pretrain"])
        prompts = {}
        for name in ("cold_start", "rl", "held_out"):
            segmented = self.work / "prompts" / name
            prompts[name] = [segmented / "asr.jsonl", segmented / "msr.jsonl", data / name / "questions.jsonl"]
        run_side_by_side([self.segment(data, name) for name in prompts])

        pretrained, cold = self.work / "pretrained", self.work / "cold_start_run"
        source = ["--data.train", data / "pretrain"]
        run([*ranks, *PTRL, "pretrain", *flags("pretrain", "pretrain.yaml"), *source, "--run_dir", pretrained])
        chats = self.work / "chats.jsonl"
        run([HERE / "chats.py", chats, *prompts["cold_start"]])
        source = ["--data.tokenizer", tokenizer, "--checkpoint.load", pretrained, "--data.train", chats]
        run([*ranks, *PTRL, "sft", *flags("sft", "sft.yaml"), *source, "--run_dir", cold])

        asr, msr, questions = prompts["rl"]
        segments: Words = ["--prompts.files", f"[0.5,{asr},0.5,{msr}]"]
        problems: Words = ["--prompts.files", f"[{questions}]"]
        strict: Words = [*segments, "--judge.reward", "strict"]
        files = {"rlpt": segments, "strict": strict, "rlvr": problems, "rlpt-rlvr": problems}
        runs = {name: [self.work / f"{name}-{seed + 1}" for seed in range(self.seeds)] for name in self.methods}
        common: Words = [*PTRL, "rl", *flags("rl", "rl.yaml"), "--data.tokenizer", tokenizer]
        first: list[Words] = []
        then: list[Words] = []
        for name, run_dirs in runs.items():
            for seed, run_dir in enumerate(run_dirs, start=1):
                on_top = name == "rlpt-rlvr"
                start = runs["rlpt"][seed - 1] if on_top else cold
                words = [*common, *files[name], "--checkpoint.load", start, "--train.seed", seed, "--run_dir", run_dir]
                (then if on_top else first).append(words)
        run_side_by_side(first)
        run_side_by_side(then)

        every = [cold, *(run_dir for run_dirs in runs.values() for run_dir in run_dirs)]
        common = [*PTRL, "evaluate", *flags("evaluate", "evaluate.yaml"), "--tokenizer", tokenizer]
        common += ["--prompts", f"[{','.join(map(str, prompts['held_out']))}]"]
        run_side_by_side([[*common, "--checkpoint", run_dir, "--output", run_dir / "held_out"] for run_dir in every])

        named = [f"{NAMES[name]}={','.join(map(str, run_dirs))}" for name, run_dirs in runs.items()]
        run([HERE / "compare.py", f"cold start={cold}", *named, "--output", self.work])
        words = ["--scaling", "[reward]", "--output", self.work / "report", *flags("report")]
        run([*PTRL, "report", *(run_dirs[0] for run_dirs in runs.values()), *words])
        print(f"{self.work / 'comparison.png'} and {self.work / 'report'} show it")

    def segment(self, data: Path, name: str) -> Words:
        """The command that makes prompts of the stories of that name."""
        words: Words = ["--input", data / f"{name}.jsonl", "--output", self.work / "prompts" / name]
        for task in ("asr", "msr"):
            words += [f"--task.{task}_prompt", HERE / "prompts" / f"{task}.txt"]
        return [*PTRL, "segment", *self.stages.flags("segment", "segment.yaml"), *words]


def main() -> None:
    """Parse the command line and run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(".rlpt"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes, and nothing is learnt")
    arguments = parser.parse_args()
    if "rlpt-rlvr" in arguments.methods and "rlpt" not in arguments.methods:
        parser.error("rlpt-rlvr goes on from rlpt; name both")
    stages = Stages(HERE / "configs", SMALL if arguments.small else None)
    with timed():
        Example(arguments.work_dir, arguments.seeds, arguments.methods, stages).run()


if __name__ == "__main__":
    main()
