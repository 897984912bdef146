"""SGLang's native HTTP interface: /generate with token ids, /update_weights_from_disk.

Every reply of /generate tells the weight version, and so does a probe. SGLang draws by `sampling_seed` only when it was
started with --enable-deterministic-inference, and ignores it otherwise.
"""

from typing import Any

from megatron_ptrl.rollout.engine import Request
from megatron_ptrl.rollout.http_api import UNTOUCHED, Ask, Malformed, Reply


class SGLang:
    """How SGLang is asked."""

    name = "sglang"
    generate_path = "/generate"

    def generation(self, request: Request, temperature: float, top_p: float, eod: int) -> dict[str, Any]:
        """Body of the request for one response."""
        return {
            "input_ids": request.prompt_ids,
            "sampling_params": {
                **UNTOUCHED,
                "temperature": temperature,
                "top_p": top_p,
                "max_new_tokens": request.max_tokens,
                "stop_token_ids": [eod],
                "skip_special_tokens": False,
                "no_stop_trim": True,
                "sampling_seed": request.seed % 2**31,
            },
            "return_logprob": True,
        }

    def read(self, body: Any) -> Reply:
        """A response. Raises Malformed."""
        meta = _meta(body)
        told = meta.get("output_token_logprobs")
        if not told:
            raise Malformed("it has no meta_info.output_token_logprobs, so neither token ids nor log-probabilities")
        tokens, logprobs = [entry[1] for entry in told], [entry[0] for entry in told]
        reason = (meta.get("finish_reason") or {}).get("type", "none")
        return Reply(tokens, logprobs, reason, _version(meta))

    def scoring(self, ids: list[int]) -> dict[str, Any]:
        """Body of the request for the log-probabilities of a text."""
        return {
            "input_ids": ids,
            "sampling_params": {**UNTOUCHED, "temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }

    def read_scores(self, body: Any, ids: list[int]) -> list[float]:
        """Those of all tokens but the first. Raises Malformed."""
        told = _meta(body).get("input_token_logprobs")
        if not told:
            raise Malformed("it has no meta_info.input_token_logprobs")
        if [entry[1] for entry in told][-len(ids) + 1 :] != ids[1:]:
            raise Malformed("its meta_info.input_token_logprobs are of other tokens than were sent")
        return [entry[0] for entry in told][-len(ids) + 1 :]

    async def load(self, ask: Ask, folder: str, version: str) -> None:
        """Take the weights of `folder`, drop what was cached with others."""
        body = {"model_path": folder, "load_format": "auto", "weight_version": version, "flush_cache": True}
        told = await ask("/update_weights_from_disk", body)
        if not isinstance(told, dict) or told.get("success") is not True:
            raise Malformed(f"/update_weights_from_disk says {told}")

    async def version(self, ask: Ask) -> str | None:
        """Of the weights that the server has."""
        body = await ask(self.generate_path, {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}})
        return _version(_meta(body))


def _meta(body: Any) -> dict[str, Any]:
    meta = body.get("meta_info") if isinstance(body, dict) else None
    if not isinstance(meta, dict):
        raise Malformed("it has no meta_info")
    return meta


def _version(meta: dict[str, Any]) -> str | None:
    version = meta.get("weight_version")
    return None if version is None else str(version)
