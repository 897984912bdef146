"""vLLM's HTTP interface: /v1/completions with token ids, weights through its development endpoints.

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs

It has no endpoint for weights from disk: the workers are told to load another folder, what was cached with the old
weights is dropped, and only then is the version set.
"""

from typing import Any

from megatron_ptrl.rollout.engine import Request
from megatron_ptrl.rollout.http_api import UNTOUCHED, Ask, Malformed, Reply


class VLLM:
    """How vLLM is asked."""

    name = "vllm"
    generate_path = "/v1/completions"

    def generation(self, request: Request, temperature: float, top_p: float, eod: int) -> dict[str, Any]:
        """Body of the request for one response."""
        return {
            **UNTOUCHED,
            "prompt": request.prompt_ids,
            "max_tokens": request.max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": request.seed,
            "stop_token_ids": [eod],
            "ignore_eos": True,  # of the folder it was started with, which may name other tokens
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def read(self, body: Any) -> Reply:
        """A response. Raises Malformed."""
        choice = _choice(body)
        tokens = choice.get("token_ids")
        if not tokens:
            raise Malformed("it has no choices[0].token_ids; expected a vLLM that knows return_token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        return Reply(tokens, logprobs, choice.get("finish_reason") or "none", None)

    def scoring(self, ids: list[int]) -> dict[str, Any]:
        """Body of the request for the log-probabilities of a text."""
        return {**UNTOUCHED, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}

    def read_scores(self, body: Any, ids: list[int]) -> list[float]:
        """Those of all tokens but the first. Raises Malformed."""
        told = _choice(body).get("prompt_logprobs")
        if not isinstance(told, list) or len(told) != len(ids):
            raise Malformed("it has no choices[0].prompt_logprobs for every token of the prompt")
        try:
            return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], told[1:], strict=True)]
        except (KeyError, TypeError):
            raise Malformed("its choices[0].prompt_logprobs are of other tokens than were sent") from None

    async def load(self, ask: Ask, folder: str, version: str) -> None:
        """Take the weights of `folder`, drop what was cached with others, name their version."""
        await ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        dropped = await ask("/reset_prefix_cache", {})
        if isinstance(dropped, dict) and dropped.get("success") is False:
            raise Malformed("/reset_prefix_cache could not drop what was cached with the old weights")
        await ask("/update_weight_version", {"new_version": version})

    async def version(self, ask: Ask) -> str | None:
        """Of the weights that the server has."""
        told = await ask("/weight_info", None)
        version = told.get("weight_version") if isinstance(told, dict) else None
        return None if version is None else str(version)


def _choice(body: Any) -> dict[str, Any]:
    try:
        choice = body["choices"][0]
    except (LookupError, TypeError):
        choice = None
    if not isinstance(choice, dict):
        raise Malformed("it has no choices")
    return choice
