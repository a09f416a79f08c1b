"""The exact backend: one packed transformers forward, and the vocabulary head only where a token was written."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.errors import ConfigurationError, DataError
from opd.ports import AtIds, LastHidden, ScoreRequest, TopK, WrittenToken
from opd.types import HiddenScores, RemoteRows, TokenScores, TopKScores
from teacher_service.config import TeacherConfig

Store = Callable[[np.ndarray], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStats:
    """What a teacher did so far."""

    requests: int
    tokens: int
    busy_s: float


class TorchTeacher:
    """Reads completions in their context, exactly and in any order (`opd.ports.LogprobTeacher`).

    Log-probabilities are those of the full softmax at temperature 1, in float32. `store` puts an array where the
    learner can fetch it, and returns its handle. Calls are served one after another.
    """

    def __init__(self, config: TeacherConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._lock = asyncio.Lock()
        self._model: Any = None
        self._stats = TeacherStats(requests=0, tokens=0, busy_s=0.0)

    async def ready(self) -> None:
        """Load the model; returns when it can score."""
        async with self._lock:
            if self._model is None:
                await asyncio.to_thread(self._load)

    async def stats(self) -> TeacherStats:
        """Requests, tokens and seconds so far."""
        return self._stats

    async def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """Testimony per request, in order; see `opd.ports.Want` for what may be asked.

        Raises:
            DataError: a request has ids outside the vocabulary, is too long, or the model's output is not finite.
        """
        await self.ready()
        async with self._lock:
            return await asyncio.to_thread(self._score, list(requests))

    def _load(self) -> None:
        from teacher_service.packed_model import load_packed  # transformers takes seconds; the driver needs none

        self._device = self._config.torch_device()
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        model = load_packed(self._config.path, self._config.torch_dtype(self._device), self._device)
        self._head: Tensor = model.get_output_embeddings().weight
        self._longest = int(model.config.get_text_config().max_position_embeddings)
        self._model = model

    @torch.inference_mode()
    def _score(self, requests: list[ScoreRequest]) -> list[TokenScores]:
        began = perf_counter()
        for number, request in enumerate(requests):
            self._check(number, request)
        answers: list[TokenScores | None] = [None] * len(requests)
        for members in self._microbatches(requests):
            for i, answer in zip(members, self._read([requests[i] for i in members]), strict=True):
                answers[i] = answer
        self._stats = TeacherStats(
            requests=self._stats.requests + len(requests),
            tokens=self._stats.tokens + sum(_length(r) for r in requests),
            busy_s=self._stats.busy_s + perf_counter() - began,
        )
        return [answer for answer in answers if answer is not None]

    def _check(self, number: int, request: ScoreRequest) -> None:
        """Refuse what would be read wrongly, before anything is computed."""
        vocabulary, config = len(self._head), self._config
        ids = [request.context_ids, request.token_ids]
        if isinstance(request.want, AtIds):
            ids.append(request.want.ids.ravel())
            if request.want.ids.shape[0] != len(request.token_ids):
                raise DataError(
                    f"score request {number}: ids are asked for {request.want.ids.shape[0]} positions of {len(request.token_ids)}"
                )
        if min(len(request.context_ids), len(request.token_ids)) == 0:
            raise DataError(f"score request {number}: context and completion need at least one token each")
        if any(((part < 0) | (part >= vocabulary)).any() for part in ids):
            raise DataError(
                f"score request {number}: a token id is outside the teacher's vocabulary of {vocabulary}; student and "
                "teacher do not share a tokenizer"
            )
        width = request.want.k if isinstance(request.want, TopK) else ids[-1].size // max(1, len(request.token_ids))
        if isinstance(request.want, TopK | AtIds) and not 1 <= width <= min(config.max_k, vocabulary):
            raise ConfigurationError(
                f"score request {number}: a support of {width} tokens was asked for, allowed are 1 to "
                f"{min(config.max_k, vocabulary)}; lower k or raise teacher.max_k"
            )
        if _length(request) > min(self._longest, config.max_batch_tokens):
            raise ConfigurationError(
                f"score request {number}: {_length(request)} tokens exceed what the teacher can read at once "
                f"(context {self._longest}, teacher.max_batch_tokens {config.max_batch_tokens}); shorten the prompts"
            )

    def _microbatches(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        """Neighbours in length together, under the token budget; the result does not depend on the cut."""
        order = sorted(range(len(requests)), key=lambda i: (_length(requests[i]), i))
        batches: list[list[int]] = []
        room = 0
        for i in order:
            if _length(requests[i]) > room:
                batches.append([])
                room = self._config.max_batch_tokens
            batches[-1].append(i)
            room -= _length(requests[i])
        return batches

    def _read(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """One forward pass. Rows are the written tokens of all requests, one request after another."""
        hidden = self._hidden(requests)
        written = torch.from_numpy(np.concatenate([r.token_ids for r in requests])).long().to(self._device)
        bounds = np.cumsum([0, *(len(r.token_ids) for r in requests)])
        logprobs = np.empty(len(written), dtype=np.float32)
        answers: list[TokenScores] = []
        supports: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {i: [] for i in range(len(requests))}
        for start in range(0, len(written), self._config.head_chunk):
            stop = min(start + self._config.head_chunk, len(written))
            full = (hidden[start:stop] @ self._head.T).float().log_softmax(-1)
            if not torch.isfinite(full).all():
                raise DataError("the teacher's logits are not finite; its checkpoint or dtype is broken")
            logprobs[start:stop] = full.gather(-1, written[start:stop, None])[:, 0].cpu().numpy()
            for i, request in enumerate(requests):
                first, last = max(start, bounds[i]), min(stop, bounds[i + 1])
                if first < last and isinstance(request.want, TopK | AtIds):
                    rows = full[first - start : last - start]
                    supports[i].append(_support(rows, request.want, first - bounds[i], last - bounds[i]))
        handle = None
        if any(isinstance(r.want, LastHidden) for r in requests):
            handle = self._store(_as_numpy(hidden))
        for i, request in enumerate(requests):
            own = logprobs[bounds[i] : bounds[i + 1]]
            answers.append(_answer(request, own, supports[i], handle, np.arange(bounds[i], bounds[i + 1])))
        return answers

    def _hidden(self, requests: Sequence[ScoreRequest]) -> Tensor:
        """Hidden states `[rows, H]` that predict the written tokens."""
        from teacher_service.packed_model import hidden_states

        sequences = [np.concatenate([r.context_ids, r.token_ids[:-1]]) for r in requests]
        lengths = [len(s) for s in sequences]
        starts = np.cumsum([0, *lengths])
        ids = torch.from_numpy(np.concatenate(sequences)).long().to(self._device)
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(self._device)
        states = hidden_states(self._model, ids, positions, torch.from_numpy(starts))
        at = np.concatenate(
            [np.arange(starts[i] + len(r.context_ids) - 1, starts[i + 1]) for i, r in enumerate(requests)]
        )
        return states[torch.from_numpy(at).to(self._device)]


def _length(request: ScoreRequest) -> int:
    return len(request.context_ids) + len(request.token_ids) - 1


def _support(rows: Tensor, want: TopK | AtIds, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of the asked support at the completion's positions `first:last`."""
    if isinstance(want, TopK):
        values, ids = rows.topk(want.k, dim=-1)
        return ids.to(torch.int32).cpu().numpy(), values.cpu().numpy()
    asked = want.ids[first:last]
    at = torch.from_numpy(asked).long().to(rows.device)
    return asked, rows.gather(-1, at).cpu().numpy()


def _answer(
    request: ScoreRequest,
    logprobs: np.ndarray,
    support: list[tuple[np.ndarray, np.ndarray]],
    handle: Any,
    rows: np.ndarray,
) -> TokenScores:
    match request.want:
        case WrittenToken():
            return TokenScores(logprobs=logprobs)
        case LastHidden():
            return HiddenScores(logprobs=logprobs, hidden=RemoteRows(pieces=((handle, rows),)))
        case TopK() | AtIds():
            ids, values = zip(*support, strict=True)
            return TopKScores(logprobs=logprobs, topk_ids=np.concatenate(ids), topk_logprobs=np.concatenate(values))


def _as_numpy(hidden: Tensor) -> np.ndarray:
    """float32 as it is, bfloat16 as its bits (numpy has no bfloat16)."""
    here = hidden.contiguous().cpu()
    return here.view(torch.uint16).numpy() if here.dtype == torch.bfloat16 else here.numpy()
