"""`ptrl segment`: corpus -> asr.jsonl and msr.jsonl, prompts for `ptrl rl`.

    list_inputs  ->  parts  ->  signatures of each part  ->  near-duplicates of all      (where they are looked for)
                            ->  Punkt's parameters, the evaluation files' runs of words
                            ->  segment_stage on each part  ->  its prompts and rejects, put together at the end

OUTPUT/plan.json says which corpus and settings the output belongs to. The same command continues after a kill, with the
part that was broken off, and the bytes in the end are the same; on Slurm it submits what can be done next and returns.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy

from megatron_ptrl.config import SegmentConfig
from megatron_ptrl.data.input_parts import Part, begin, list_inputs, make_parts
from megatron_ptrl.errors import InputError
from megatron_ptrl.executors import PartStep, execute
from megatron_ptrl.segmenting.decontaminate import index_runs
from megatron_ptrl.segmenting.files import KINDS, Files, load_array, only_writer, save_array, write_whole
from megatron_ptrl.segmenting.near_duplicates import SIGNATURE, find_duplicates
from megatron_ptrl.segmenting.prompts import PromptMaker, load_template
from megatron_ptrl.segmenting.segment_stage import SegmentPart, write_signatures
from megatron_ptrl.segmenting.segments import make_cut


def run(config: SegmentConfig) -> None:
    """Write the prompts of `config.input` to `config.output`; prints a summary.

    Raises InputError for bad input, GeneratorUnusable when the scoring servers are gone; what is done is kept.
    """
    if not config.output:
        raise InputError("output is empty; expected a folder")
    files = Files(Path(config.output))
    parts = make_parts(list_inputs(config.input, files.output), config.part_megabytes)
    PromptMaker(config.task)
    runs, texts, short = index_runs(config.clean.decontaminate, config.clean.decontaminate_words)
    begin(files.output, _plan(config, parts, runs))
    try:
        with only_writer(files):
            if not files.summary.exists() and not _segment(config, files, parts, runs):
                return
            shutil.rmtree(files.parts, ignore_errors=True)
            shutil.rmtree(files.clean, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{files.output}: {error}; what is done is kept, repeat the command when that is mended"
        ) from error
    print("\n".join(_told(files.output, _read_summary(config, files))))
    if config.clean.decontaminate and short:
        print(f"evaluation texts too short to be looked for: {short:,} of {texts:,}")


def _segment(config: SegmentConfig, files: Files, parts: list[Part], runs: numpy.ndarray) -> bool:
    """Do what is left; whether all is done, which on Slurm it is not until the jobs are."""
    if config.clean.near_duplicates and not files.duplicates.exists():
        left = [number for number in range(len(parts)) if not files.signatures(number).exists()]
        if not _all_done(config, files, SignStep(config, parts, left), len(parts)):
            return False
        rows = [load_array(files.signatures(number), SIGNATURE) for number in range(len(parts))]
        save_array(files.duplicates, find_duplicates(rows))
    if config.clean.decontaminate:
        save_array(files.evaluation_runs, runs)
    _find_punkt(config, files, parts)
    left = [number for number in range(len(parts)) if not files.counts(number).exists()]
    if not _all_done(config, files, SegmentStep(config, parts, left), len(parts)):
        return False
    _put_together(config, files, len(parts))
    return True


def _find_punkt(config: SegmentConfig, files: Files, parts: list[Part]) -> None:
    split = config.split
    of_sentences = split.unit == "sentence" or (split.unit == "steps" and split.step_of == "sentences")
    if of_sentences and split.sentences == "punkt" and not files.punkt.exists():
        from megatron_ptrl.segmenting.punkt import find_parameters

        inputs = [file for part in parts for file in part]
        found = find_parameters(split, inputs, config.text_field, config.seed)
        write_whole(files.punkt, json.dumps(found, ensure_ascii=False).encode() + b"\n")
    make_cut(split, files.punkt)


def _all_done(config: SegmentConfig, files: Files, step: PartStep, parts: int) -> bool:
    if not step.left:
        return True
    server = config.quality.server
    execute(step, config.executor, files.output / "logs", job_name="ptrl_segment", key_env=server.api_key_env)
    if config.executor.kind == "slurm":
        print(
            f"{files.output}: {step.name}, {len(step.left)} of {parts} parts submitted; "
            "repeat the command when they are done"
        )
        return False
    return True


class SignStep(PartStep):
    """Signatures of the documents, to find near-duplicates by."""

    name = "signatures"

    def __init__(self, config: SegmentConfig, parts: list[Part], left: list[int]) -> None:
        super().__init__(left)
        self._config, self._parts = config, parts

    def work(self, share: list[int]) -> None:
        """One file of them for each part."""
        for number in share:
            path = Files(Path(self._config.output)).signatures(number)
            if not path.exists():
                write_signatures(self._config, self._parts[number], path)


class SegmentStep(PartStep):
    """Prompts and rejects."""

    name = "segments"

    def __init__(self, config: SegmentConfig, parts: list[Part], left: list[int]) -> None:
        super().__init__(left)
        self._config, self._parts = config, parts

    def work(self, share: list[int]) -> None:
        """Those of each part."""
        files = Files(Path(self._config.output))
        segment = SegmentPart(self._config, files, self._parts)
        for number in share:
            if not files.counts(number).exists():
                segment.run(number)


def _put_together(config: SegmentConfig, files: Files, parts: int) -> None:
    for kind in KINDS:
        sources = [files.of_part(kind, number) for number in range(parts)]
        if kind in (*config.task.tasks, "rejects"):
            _concatenate(sources, files.output / f"{kind}.jsonl")
    counts = sum((Counter(json.loads(files.counts(number).read_text())) for number in range(parts)), Counter())
    punkt = json.loads(files.punkt.read_text()) if files.punkt.exists() else {"source": None, "sample": None}
    summary = {
        "parts": parts,
        "sentences_by": {"splitter": config.split.sentences, "source": punkt["source"], "sample": punkt["sample"]},
        "counts": dict(sorted(counts.items())),
    }
    write_whole(files.summary, json.dumps(summary, indent=1).encode() + b"\n")


def _concatenate(sources: Iterable[Path], target: Path) -> None:
    temporary = target.with_suffix(".tmp")
    with temporary.open("wb") as output:
        for source in sources:
            with source.open("rb") as stream:
                shutil.copyfileobj(stream, output, 1 << 20)
    temporary.replace(target)


def _read_summary(config: SegmentConfig, files: Files) -> dict[str, Any]:
    try:
        summary = dict(json.loads(files.summary.read_bytes()))
        gone = [f"{kind}.jsonl" for kind in config.task.tasks if not (files.output / f"{kind}.jsonl").is_file()]
        if gone or not {"counts", "sentences_by"} <= summary.keys():
            raise ValueError(f"no {', '.join(gone) or 'counts'}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{files.output} is damaged ({error}); remove it and repeat the command") from error
    return summary


def _told(output: Path, summary: dict[str, Any]) -> list[str]:
    counts, by = summary["counts"], summary["sentences_by"]

    def those(prefix: str) -> str:
        found = {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}
        return ", ".join(f"{count:,} {name}" for name, count in found.items()) or "none"

    return [
        f"{output}: {counts.get('documents', 0):,} documents, prompts: {those('prompts.')}",
        f"rejected documents: {those('rejected.')}; masked: {counts.get('masked', 0):,}",
        f"segments: {those('segments.')}; without a prompt: {those('skipped.')}",
        f"sentences by {by['splitter']}, {by['source'] or 'without parameters'}",
    ]


def _plan(config: SegmentConfig, parts: list[Part], runs: numpy.ndarray) -> dict[str, Any]:
    """What the output depends on."""
    same = asdict(config)
    for name in ("input", "output", "executor"):
        del same[name]
    quality = same["quality"]
    quality["server"] = {name: quality["server"][name] for name in ("model", "extra_body")}
    quality["servers"] = bool(quality["servers"])
    # By what is in them, as they may lie elsewhere on the machine that continues.
    same["clean"]["decontaminate"] = hashlib.sha256(runs.tobytes()).hexdigest() if len(runs) else None
    for part, name in (("task", "tokenizer"), ("split", "punkt")):
        path = same[part][name]
        try:
            same[part][name] = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
        except OSError as error:
            raise InputError(f"{part}.{name} {path}: {error.strerror}") from error
    prompts = {"task.asr_prompt": ("asr", config.task.asr_prompt), "task.msr_prompt": ("msr", config.task.msr_prompt)}
    if config.quality.servers:
        prompts["quality.prompt"] = ("quality", config.quality.prompt)
    for name, (task, given) in prompts.items():
        part, field = name.split(".")
        same[part][field] = hashlib.sha256(load_template(task, given).encode()).hexdigest()
    inputs = json.dumps([[(file.label, file.size) for file in part] for part in parts])
    splitter = {"punkt": "nltk", "sentencex": "sentencex"}[config.split.sentences]
    flat = {"input": hashlib.sha256(inputs.encode()).hexdigest(), "split.version": f"{splitter} {_version(splitter)}"}
    for name, value in same.items():
        flat |= {f"{name}.{inner}": of for inner, of in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError as error:
        extra = "seg" if package == "nltk" else package
        raise InputError(f"split.sentences needs {package}; pip install megatron-ptrl[{extra}]") from error
