"""Prompts and responses for tests of the judges."""

from typing import Any

from megatron_ptrl.config import GateConfig, JudgeConfig, ServerConfig
from megatron_ptrl.records import Prompt
from megatron_ptrl.rollout.gate import CLOSE_TAG, OPEN_TAG

CONTEXT = "Anna and Tom went to the market on a cold morning. Tom had 12 apples in his basket."
TARGET = "He gave 3 of them to Anna because she was hungry."
AFTER = "Now he has 9 apples left. They walked home along the river."


def prompt(
    target: str = TARGET, after: str = AFTER, context: str = CONTEXT, task: str = "asr", id: str = "p", shown: str = ""
) -> Prompt:
    """shown: the segment that follows the mask of an msr prompt"""
    asked = f"{context}\n\n<MASK>\n{shown}" if shown else f"Complete the text.\n\n### Context\n\n{context}"
    reference = target if task != "asr" else f"{target} {after}".strip()
    message = {"role": "user", "content": asked}
    return Prompt(id=id, task=task, messages=[message], target=target, reference=reference)


def answer(prediction: str) -> str:
    """A response as a policy writes it that has learnt the tags."""
    return f"The text goes on with what Tom does.\n{OPEN_TAG}{prediction}{CLOSE_TAG}"


def openai_config(servers: list[str], **changed: Any) -> JudgeConfig:
    """Impatient settings; `server` holds changes of its ServerConfig."""
    server = ServerConfig(
        **{"timeout": 60.0, "attempts": 2, "backoff": 0.001, "patience": 10.0} | changed.pop("server", {})
    )
    gate = GateConfig(min_words=1, min_share=0.0, copied_share=0.0)
    return JudgeConfig(**{"kind": "openai", "servers": servers, "server": server, "gate": gate} | changed)
