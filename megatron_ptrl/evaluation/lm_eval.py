"""lm-evaluation-harness on a checkpoint: its tasks ask, our own model answers, under any layout of the ranks.

    Instance  --tokenize-->  rows  --Scorer---------->  log-probability, whether each token is the most probable one
                                   --RolloutEngine--->  text up to a stop sequence

All ranks run the harness on the same questions, because they share the model; what is asked of the model is split
among the data-parallel ranks here.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ptrl.config import HarnessConfig, PretrainConfig
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.data.windows import Windows
from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.pass_at_k import Figure
from megatron_ptrl.rollout.engine import Request, RolloutEngine, rollout_seed
from megatron_ptrl.training.measure_text import from_all_ranks
from megatron_ptrl.training.scorer import Scorer

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise InputError(f"harness.tasks needs {error.name}; pip install megatron-ptrl[lm_eval]") from error

logger = logging.getLogger(__name__)

_NORMAL_95 = 1.96
_OF_CHOICE = ("logprob", "target_in_head")


class _Rows:
    """Token lists as a `Scorer` reads documents."""

    path_prefix = "the harness's requests"

    def __init__(self, rows: Sequence[list[int]]) -> None:
        self._rows = [numpy.array(row, numpy.int64) for row in rows]

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        return self._rows[idx][offset : None if length is None else offset + length]


class HarnessModel(TemplateLM):
    """A `TemplateLM` on this rank's share of a frozen model.

    settings: as for a `Scorer`, the loss's top_k 1, so that its head is the most probable token
    chunk: rows, about, that a data-parallel rank scores before all exchange what they have
    """

    def __init__(
        self,
        settings: PretrainConfig,
        chunks: list[torch.nn.Module],
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        harness: HarnessConfig,
        *,
        chunk: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert settings.loss.top_k == 1
        self._settings, self._chunks, self._engine, self._tokenizer = settings, chunks, engine, tokenizer
        self._window, self._chunk, self._seed = settings.data.seq_length, chunk, seed
        self._max_gen_tokens = harness.max_gen_tokens
        self._has_cut = False

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of the text alone: our tokenizers add nothing."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **options: Any) -> list[Any]:
        """(log-probability of the continuation in nats, whether greedy decoding writes it) for each request.

        A context loses its beginning where the window cannot hold it. Raises InputError for a continuation that is
        longer than the window.
        """
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self._window:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens; expected at most the window, {self._window}"
                )
            rows.append((context + continuation)[-(self._window + 1) :])
        found = iter(self._values(rows))
        answers = []
        for row, (_, _, continuation) in zip(rows, requests, strict=True):
            logprob, greedy = next(found)[:, len(row) - len(continuation) :]
            answers.append((float(logprob.sum(dtype=float)), bool(greedy.all())))
        return answers

    def _values(self, rows: list[list[int]]) -> list[numpy.ndarray]:
        """(2, tokens) for each row: log-probability, and 1 where the token is the most probable one. Collective."""
        if not rows:
            return []
        lengths = numpy.array([len(row) for row in rows], numpy.int64)
        windows = Windows(lengths, window=self._window, overlap=0, chunk=self._chunk)
        scorer = Scorer(self._settings, self._chunks, _Rows(rows), windows, _OF_CHOICE)
        scorer.score_first_tokens(self._tokenizer.eod, self._tokenizer.vocab_size)
        parts = from_all_ranks(scorer, self._settings, list(range(len(windows))), lambda number, values: values)
        whole = numpy.concatenate([values for part in parts for values in part], axis=1)
        return numpy.split(whole, lengths.cumsum()[:-1], axis=1)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each text, whole, its windows disjoint as the harness cuts them."""
        pairs: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._window, 1)
            cut = [make_disjoint_window(window) for window in windows]
            pairs += [(None, context, continuation) for context, continuation in cut]
            counts.append(len(cut))
        values = iter(self._loglikelihood_tokens(pairs))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes to each context, up to the first of the request's stop sequences."""
        options = [request.args[1] for request in requests]
        made = [self._request(number, request.args[0], options[number]) for number, request in enumerate(requests)]
        rank, dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = range(rank, len(requests), dp)
        written: dict[int, str] = {}
        for heat in sorted({_heat(each) for each in options}):
            numbers = [number for number in mine if _heat(options[number]) == heat]
            if numbers:
                asked = [made[number] for number in numbers]
                for number, answer in zip(
                    numbers, self._engine.generate(asked, temperature=heat[0], top_p=heat[1]), strict=True
                ):
                    ids = [token for token in answer.token_ids if token != self._tokenizer.eod]
                    written[number] = _cut(self._tokenizer.decode(ids), options[number].get("until") or [])
        every: list[Any] = [None] * dp
        dist.all_gather_object(every, written, group=parallel_state.get_data_parallel_group())
        together = {number: text for part in every for number, text in part.items()}
        return [together[number] for number in range(len(requests))]

    def _request(self, number: int, context: str, options: dict[str, Any]) -> Request:
        most = int(options.get("max_gen_toks", self._max_gen_tokens))
        if most >= self._window:
            raise InputError(
                f"a task asks for responses of {most} tokens, and the model has room for {self._window}, prompt "
                "included (data.seq_length); take a task file of your own with a smaller max_gen_toks "
                "(harness.include_path)"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if len(ids) > self._window - most and not self._has_cut:
            self._has_cut = True
            logger.warning(
                "a prompt of %d tokens loses its beginning, as the harness's own models do it: %d of the model's %d "
                "are for the response (told once)",
                *(len(ids), most, self._window),
            )
        return Request(ids[-(self._window - most) :], most, rollout_seed(self._seed, number, 0))


def _heat(options: dict[str, Any]) -> tuple[float, float]:
    """(temperature, top_p); greedy unless the task asks for a draw."""
    if not options.get("do_sample", False):
        return 0.0, 1.0
    return float(options.get("temperature", 1.0)), float(options.get("top_p", 1.0))


def _cut(text: str, until: str | list[str]) -> str:
    stops = [until] if isinstance(until, str) else until
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


def evaluate(model: HarnessModel, harness: HarnessConfig, *, bootstrap: int) -> dict[str, Figure]:
    """The figures of the tasks, by `TASK/METRIC`, with the harness's standard error as a 95 % interval.

    Collective over all ranks; a rank whose LOCAL_RANK is not 0 gets none.
    Raises InputError for a task that the harness does not know.
    """
    manager = TaskManager(include_path=harness.include_path, include_defaults=harness.include_path is None)
    unknown = [name for name in harness.tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"harness.tasks: there is no task {', '.join(unknown)}; see `lm-eval ls tasks`")
    results = lm_eval.simple_evaluate(
        model,
        tasks=list(harness.tasks),
        num_fewshot=harness.num_fewshot,
        limit=harness.limit,
        task_manager=manager,
        bootstrap_iters=bootstrap,
        log_samples=False,
    )
    return {} if results is None else _figures(results)


def _figures(results: Any) -> dict[str, Figure]:
    found = {}
    for task, measured in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in measured.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measured.get(f"{name}_stderr,{filter_name}")
            half = _NORMAL_95 * error if isinstance(error, int | float) else None
            low, high = (None, None) if half is None else (value - half, value + half)
            shown = name if filter_name == "none" else f"{name},{filter_name}"
            found[f"{task}/{shown}"] = Figure(float(value), low, high, int(count))
    return found
