"""`ptrl think`: corpus -> thoughts and rejects -> training set.

    list_inputs  ->  parts of about as many megabytes  ->  datatrove's executor, a share of the parts for each task
                 ->  generate_stage, one part after the other
                 ->  assemble_stage, when all parts are there

OUTPUT/plan.json says which corpus and settings the output belongs to. The same command continues after a kill; where
all is done it asks for nothing, and makes the training set anew. Another corpus or other settings are refused, since
what they would give is something else.
"""

import asyncio
import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_ptrl.config import ThinkConfig
from megatron_ptrl.data.input_parts import Part, begin, list_inputs, make_parts
from megatron_ptrl.errors import InputError
from megatron_ptrl.executors import PartStep, execute
from megatron_ptrl.thinking.generate_stage import Think
from megatron_ptrl.thinking.generators import check_generator, make_generator
from megatron_ptrl.thinking.journal import Journal
from megatron_ptrl.thinking.prompts import load_template, make_cut
from megatron_ptrl.thinking.same_corpus import check_unchanged


def run(config: ThinkConfig) -> None:
    """Write the thoughts of `config.input`, and the training set of them, to `config.output`; prints a summary.

    Raises InputError for bad input, and GeneratorUnusable when no request can succeed; what is done is kept.
    """
    if not config.output:
        raise InputError("output is empty; expected a folder")
    check_generator(config)
    output = Path(config.output)
    parts = make_parts(list_inputs(config.input, output), config.part_megabytes)
    template = load_template(config.prompt)
    make_cut(config.prompt_tokens, config.tokenizer)
    begin(output, _plan(config, parts, template.name))
    journals = [Journal(output, number) for number in range(len(parts))]
    left = [number for number, journal in enumerate(journals) if not journal.is_finished]
    for number in sorted(set(range(len(parts))) - set(left)):
        check_unchanged(parts[number], journals[number], config.text_field)
    if left:
        execute(
            ThinkStep(config, parts, left),
            config.executor,
            output / "logs",
            job_name="ptrl_think",
            key_env=config.server.api_key_env,
        )
    if config.executor.kind == "slurm" and left:
        print(f"{output}: {len(left)} of {len(parts)} parts submitted; repeat the command when they are done")
        return
    for journal in journals:
        journal.drop_leftover()
    counts = sum((journal.counts() for journal in journals), Counter())
    thoughts = counts.pop("thoughts", 0)
    where = f", see {output / 'rejects'}" if counts else ""
    print(f"{output}: {thoughts:,} thoughts in {len(parts):,} parts, rejected: {_told(counts)}{where}")
    if config.then_assemble:
        if not thoughts:
            raise InputError(f"{output}: no document has thinking, so there is nothing to train on")
        _assemble(config, output)


def _assemble(config: ThinkConfig, output: Path) -> None:
    from megatron_ptrl.thinking import assemble_stage

    assemble_stage.run(
        replace(
            config.assemble,
            input=[str(output / "thoughts")],
            output=str(output / "train"),
            tokenizer=config.assemble.tokenizer or config.tokenizer,
        )
    )


def _told(rejected: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items())) or "none"


def _plan(config: ThinkConfig, parts: list[Part], template: str) -> dict[str, Any]:
    inputs = json.dumps([[(file.label, file.size) for file in part] for part in parts])
    tokenizer = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest() if config.tokenizer else None
    same = ("text_field", "id_field", "prompt_tokens", "generator", "checkpoint", "seed", "part_megabytes")
    return {
        "input": hashlib.sha256(inputs.encode()).hexdigest(),
        "prompt": template,
        "tokenizer": tokenizer,
        "server.model": config.server.model,
        "server.extra_body": config.server.extra_body,
        "sampling": asdict(config.sampling),
        **{name: getattr(config, name) for name in same},
    }


class ThinkStep(PartStep):
    """One task's share of the parts."""

    def __init__(self, config: ThinkConfig, parts: list[Part], left: list[int]) -> None:
        super().__init__(left)
        self._config, self._parts = config, parts

    def work(self, share: list[int]) -> None:
        """Their thoughts and rejects."""
        asyncio.run(self._run(share))

    async def _run(self, share: list[int]) -> None:
        config = self._config
        generator, tasks = make_generator(config)
        cut = make_cut(config.prompt_tokens, config.tokenizer)
        think = Think(config, load_template(config.prompt), cut, generator, tasks)
        try:
            for number in share:
                with Journal(Path(config.output), number) as journal:
                    if not journal.is_finished:
                        journal.publish(await think.run(self._parts[number], journal))
        finally:
            await generator.close()
