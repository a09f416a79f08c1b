"""A teacher as a plain forward pass: exact, any ids, any k; the vocabulary only where it is asked."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opd.devices import resolve_device, resolve_dtype
from opd.errors import DataError, OpdError
from opd.ports import AtIds, LastHidden, ScoreRequest, TopK
from opd.types import HiddenScores, RemoteRows, TokenScores, TopKScores
from teacher_service.config import TeacherConfig
from teacher_service.identity import check_checkpoint

if TYPE_CHECKING:
    from teacher_service.packed_model import PackedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStats:
    """Since the start: requests, completion tokens scored, tokens read (contexts too), seconds of both."""

    requests: int
    scored: int
    read: int
    busy_s: float


class TorchTeacher:
    """Scores completions with a Hugging Face model in this process (`opd.ports.LogprobTeacher`).

    `store` puts an array where the learner can fetch it and returns its handle; hidden states go that way.
    Calls may overlap; their forwards run one after the other.
    """

    def __init__(self, config: TeacherConfig, store: Callable[[np.ndarray], Any]) -> None:
        self._config = config
        self._store = store
        self._lock = threading.Lock()
        self._model: "PackedModel | None" = None
        self._requests = self._scored = self._read = 0
        self._busy_s = 0.0

    async def ready(self) -> None:
        """Return when the model is loaded. Raises `ConfigurationError` if it cannot be used."""
        await self._within(asyncio.to_thread(self._loaded), "loading its model")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """Testimony per request, in order: float32 logprobs under the full softmax at temperature 1.

        What is said of a request does not depend on which others it came with (up to float rounding). Raises
        `DataError` for a request that cannot be read, and for a model that answers with NaN or infinity.
        """
        return await self._within(asyncio.to_thread(self._scores, requests), f"scoring {len(requests)} completions")

    async def stats(self) -> TeacherStats:
        """What this teacher has done so far."""
        return TeacherStats(requests=self._requests, scored=self._scored, read=self._read, busy_s=self._busy_s)

    async def _within(self, work: Any, what: str) -> Any:
        try:
            return await asyncio.wait_for(work, self._config.deadline_s)
        except TimeoutError as error:
            raise OpdError(
                f"the teacher did not finish {what} within {self._config.deadline_s:.0f} s; raise "
                "teacher.deadline_s, or add teacher.replicas"
            ) from error

    def _loaded(self) -> "PackedModel":
        with self._lock:
            if self._model is None:
                self._model = _load(self._config)
            return self._model

    @torch.inference_mode()
    def _scores(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        model = self._loaded()
        for number, request in enumerate(requests):
            _check(request, number, model, self._config)
        answers: list[TokenScores | None] = [None] * len(requests)
        with self._lock:
            start = perf_counter()
            for members in microbatches([_length(r) for r in requests], self._config.max_batch_tokens):
                chosen = [requests[i] for i in members]
                for i, answer in zip(members, self._microbatch(model, chosen), strict=True):
                    answers[i] = answer
                self._read += sum(_length(r) for r in chosen)
            self._busy_s += perf_counter() - start
            self._requests += len(requests)
            self._scored += sum(len(r.token_ids) for r in requests)
        return [answer for answer in answers if answer is not None]

    def _microbatch(self, model: "PackedModel", requests: Sequence[ScoreRequest]) -> Iterator[TokenScores]:
        hidden = _completion_rows(model, requests)
        testimony = _Testimony(requests)
        for at in range(0, len(hidden), self._config.head_chunk):
            testimony.add(at, _logprobs(model, hidden[at : at + self._config.head_chunk]))
        return testimony.answers(self._kept(requests, hidden))

    def _kept(self, requests: Sequence[ScoreRequest], hidden: Float[Tensor, "rows H"]) -> Iterator[RemoteRows]:
        """Where the hidden states of the requests that want them are; one stored array for all."""
        wanted = np.concatenate([np.full(len(r.token_ids), isinstance(r.want, LastHidden)) for r in requests])
        if not wanted.any():
            return
        kept = hidden[torch.from_numpy(wanted).to(hidden.device)].cpu().contiguous()
        handle = self._store((kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy())
        start = 0
        for request in requests:
            if isinstance(request.want, LastHidden):
                stop = start + len(request.token_ids)
                yield RemoteRows(pieces=((handle, np.arange(start, stop)),))
                start = stop


class _Testimony:
    """Collects the answers to a micro-batch while its completion tokens come by in chunks of logprobs."""

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests = requests
        self._stops = np.cumsum([len(r.token_ids) for r in requests])
        self._written = torch.from_numpy(np.concatenate([r.token_ids for r in requests])).long()
        self._logprobs = np.empty(len(self._written), dtype=np.float32)
        widths = [_width(r) for r in requests]
        sizes = list(zip((len(r.token_ids) for r in requests), widths, strict=True))
        self._topk_logprobs = [np.empty(size, dtype=np.float32) for size in sizes]
        self._topk_ids = [np.empty(size, dtype=np.int32) for size in sizes]

    def add(self, at: int, logprobs: Float[Tensor, "rows V"]) -> None:
        """The completion tokens `at .. at + rows` of the micro-batch."""
        end = at + len(logprobs)
        written = self._written[at:end, None].to(logprobs.device)
        self._logprobs[at:end] = logprobs.gather(1, written)[:, 0].cpu().numpy()
        touched = range(int(np.searchsorted(self._stops, at, "right")), len(self._requests))
        present = [i for i in touched if self._stops[i] - len(self._requests[i].token_ids) < end]
        deepest = max((w.k for i in present if isinstance(w := self._requests[i].want, TopK)), default=0)
        best = logprobs.topk(deepest) if deepest else None
        for i in present:
            first = int(self._stops[i]) - len(self._requests[i].token_ids)
            low, high = max(first, at), min(int(self._stops[i]), end)
            mine, here = slice(low - first, high - first), slice(low - at, high - at)
            match self._requests[i].want:
                case TopK(k=k) if best is not None:
                    self._topk_logprobs[i][mine] = best.values[here, :k].cpu().numpy()
                    self._topk_ids[i][mine] = best.indices[here, :k].cpu().numpy()
                case AtIds(ids=ids):
                    asked = torch.from_numpy(ids[mine]).long().to(logprobs.device)
                    self._topk_logprobs[i][mine] = logprobs[here].gather(1, asked).cpu().numpy()
                    self._topk_ids[i][mine] = ids[mine]

    def answers(self, kept: Iterator[RemoteRows]) -> Iterator[TokenScores]:
        """One answer per request; `kept` are the hidden states of those that want them, in order."""
        for i, request in enumerate(self._requests):
            stop = int(self._stops[i])
            logprobs = self._logprobs[stop - len(request.token_ids) : stop]
            match request.want:
                case TopK() | AtIds():
                    yield TopKScores(
                        logprobs=logprobs, topk_ids=self._topk_ids[i], topk_logprobs=self._topk_logprobs[i]
                    )
                case LastHidden():
                    yield HiddenScores(logprobs=logprobs, hidden=next(kept))
                case _:
                    yield TokenScores(logprobs=logprobs)


def microbatches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Positions in groups whose padded size (members times the longest) stays within `budget`, longest first.

    Neighbours in length go together, since attention pads to the longest of a group.
    """
    group: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and lengths[group[0]] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def _width(request: ScoreRequest) -> int:
    match request.want:
        case TopK(k=k):
            return k
        case AtIds(ids=ids):
            return ids.shape[1]
        case _:
            return 0


def _length(request: ScoreRequest) -> int:
    return len(request.context_ids) + len(request.token_ids) - 1  # nothing follows the last token


def _completion_rows(model: "PackedModel", requests: Sequence[ScoreRequest]) -> Float[Tensor, "rows H"]:
    """The hidden states that predict the completion tokens of `requests`, one request after the other."""
    sequences = [np.concatenate([r.context_ids, r.token_ids[:-1]]) for r in requests]
    everywhere = model.hidden([torch.from_numpy(s) for s in sequences])
    ends = np.cumsum([len(s) for s in sequences])
    rows = np.concatenate([np.arange(e - len(r.token_ids), e) for e, r in zip(ends, requests, strict=True)])
    return everywhere[torch.from_numpy(rows).to(everywhere.device)]


def _logprobs(model: "PackedModel", hidden: Float[Tensor, "rows H"]) -> Float[Tensor, "rows V"]:
    logits = model.logits(hidden)
    total = logits.logsumexp(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise DataError(
            "the teacher's logits are not finite; its checkpoint is damaged or its dtype too narrow: check "
            "the file, or set teacher.dtype=FLOAT32"
        )
    return logits.sub_(total)


def _load(config: TeacherConfig) -> "PackedModel":
    check_checkpoint(config.path, "teacher")
    from teacher_service.packed_model import (
        load_packed,
    )  # seconds of transformers, which the driver can spare

    device = resolve_device(config.device, "teacher")
    return load_packed(config.path, resolve_dtype(config.dtype, device), device)


def _check(request: ScoreRequest, number: int, model: "PackedModel", config: TeacherConfig) -> None:
    problem = _problem(request, model, config)
    if problem:
        raise DataError(f"score request {number} cannot be read by the teacher: {problem}")


def _problem(request: ScoreRequest, model: "PackedModel", config: TeacherConfig) -> str:
    if not len(request.context_ids) or not len(request.token_ids):
        return (
            f"it has {len(request.context_ids)} context and {len(request.token_ids)} completion tokens, but "
            "both need at least one; check the prompt source"
        )
    longest = min(config.max_batch_tokens, model.positions or config.max_batch_tokens)
    if _length(request) > longest:
        return (
            f"it has {_length(request)} tokens, more than the {longest} of one forward (the smaller of the "
            "model's positions and teacher.max_batch_tokens); shorten it or raise the limit"
        )
    vocabulary = model.vocabulary
    for what, ids in (("context", request.context_ids), ("completion", request.token_ids)):
        if ids.min() < 0 or ids.max() >= vocabulary:
            return f"its {what} has ids outside the vocabulary of {vocabulary}; check that tokenizers agree"
    match request.want:
        case TopK(k=k) if not 1 <= k <= min(config.max_k, vocabulary):
            most = min(config.max_k, vocabulary)
            return f"k={k} is not within 1 and {most} (teacher.max_k, vocabulary); correct it"
        case AtIds(ids=ids):
            return _problem_at(ids, len(request.token_ids), vocabulary, config)
    return ""


def _problem_at(ids: np.ndarray, tokens: int, vocabulary: int, config: TeacherConfig) -> str:
    if ids.ndim != 2 or len(ids) != tokens or not 1 <= ids.shape[1] <= config.max_k:
        return (
            f"it asks at ids of shape {ids.shape}, but that must be ({tokens}, K) with K from 1 to "
            f"{config.max_k} (teacher.max_k); correct the scorer"
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        return f"it asks at ids outside the vocabulary of {vocabulary}; check that tokenizers agree"
    return ""
