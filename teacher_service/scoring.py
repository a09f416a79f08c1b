"""What every backend that reads tokens shares: which requests it takes, and how hidden states become testimony."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opd.errors import DataError
from opd.ports import AtIds, LastHidden, ScoreRequest, TopK
from opd.types import HiddenScores, RemoteRows, TokenScores, TopKScores
from opd.types.log_mass import ABSENT

Logits = Callable[[Float[Tensor, "rows H"]], Float[Tensor, "rows V"]]
Store = Callable[[np.ndarray], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStats:
    """Since the start: requests, completion tokens scored, tokens read (contexts too), seconds of both.

    Of a remote teacher also: attempts that brought no answer (`unanswered`), and answers that were refused and
    thrown away (`quarantined`).
    """

    requests: int
    scored: int
    read: int
    busy_s: float
    unanswered: int = 0
    quarantined: int = 0


class Unreadable(DataError):
    """A request that this teacher cannot read, whoever asks and however often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a backend can read: ids below `vocabulary`, `longest` tokens in one forward, `max_k` per token.

    `limits` says where `longest` comes from, for the error. Example: `Bounds(vocabulary=192, longest=128, max_k=64,
    limits="teacher.max_batch_tokens")`.
    """

    vocabulary: int
    longest: int
    max_k: int
    limits: str

    def check(self, requests: Sequence[ScoreRequest]) -> None:
        """Raise `Unreadable` about the first request that cannot be read."""
        for number, request in enumerate(requests):
            problem = _problem(request, self)
            if problem:
                raise Unreadable(f"score request {number} cannot be read by the teacher: {problem}")


def scores_from_hidden(
    requests: Sequence[ScoreRequest], hidden: Float[Tensor, "rows H"], logits: Logits, head_chunk: int, store: Store
) -> Iterator[TokenScores]:
    """Testimony per request from the `hidden` states that predict their tokens, one request after the other.

    At most `head_chunk` rows have logits over the vocabulary at the same time. Hidden states that are asked for
    are stored in one array.
    """
    testimony = _ScoreRows(requests)
    for at in range(0, len(hidden), head_chunk):
        rows = logits(hidden[at : at + head_chunk])
        testimony.add(at, rows, _normalizer(rows))
    return testimony.answers(_kept(requests, hidden, store))


def completion_rows(requests: Sequence[ScoreRequest]) -> tuple[list[np.ndarray], np.ndarray]:
    """The sequences to read, and where in them, laid end to end, the tokens of `requests` are predicted."""
    sequences = [np.concatenate([r.context_ids, r.token_ids[:-1]]) for r in requests]
    ends = np.cumsum([len(s) for s in sequences])
    rows = np.concatenate([np.arange(e - len(r.token_ids), e) for e, r in zip(ends, requests, strict=True)])
    return sequences, rows


def length(request: ScoreRequest) -> int:
    """Tokens that are read for `request`."""
    return len(request.context_ids) + len(request.token_ids) - 1  # nothing follows the last token


def _normalizer(logits: Float[Tensor, "rows V"]) -> Float[Tensor, "rows 1"]:
    total = logits.logsumexp(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise DataError(
            "the teacher's logits are not finite; its checkpoint is damaged or its dtype too narrow: check "
            "the file, or set teacher.dtype=FLOAT32"
        )
    return total


def _kept(requests: Sequence[ScoreRequest], hidden: Float[Tensor, "rows H"], store: Store) -> Iterator[RemoteRows]:
    """Where the hidden states of the requests that want them are; one stored array for all."""
    wanted = np.concatenate([np.full(len(r.token_ids), isinstance(r.kind, LastHidden)) for r in requests])
    if not wanted.any():
        return
    kept = hidden[torch.from_numpy(wanted).to(hidden.device)].cpu().contiguous()
    handle = store((kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy())
    row_nbytes, start = kept.shape[1] * kept.itemsize, 0
    for request in requests:
        if isinstance(request.kind, LastHidden):
            stop = start + len(request.token_ids)
            yield RemoteRows(pieces=((handle, np.arange(start, stop)),), row_nbytes=row_nbytes)
            start = stop


class _ScoreRows:
    """Collects the answers to a micro-batch while its completion tokens come by in chunks of logits."""

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests = requests
        self._stops = np.cumsum([len(r.token_ids) for r in requests])
        self._written = torch.from_numpy(np.concatenate([r.token_ids for r in requests])).long()
        self._logprobs = np.empty(len(self._written), dtype=np.float32)
        widths = [_width(r) for r in requests]
        sizes = list(zip((len(r.token_ids) for r in requests), widths, strict=True))
        self._topk_logprobs = [np.empty(size, dtype=np.float32) for size in sizes]
        self._topk_ids = [np.empty(size, dtype=np.int32) for size in sizes]
        self._rest = [np.empty(tokens, dtype=np.float32) for tokens, _ in sizes]

    def add(self, at: int, logits: Float[Tensor, "rows V"], total: Float[Tensor, "rows 1"]) -> None:
        """The completion tokens `at .. at + rows` of the micro-batch; `total` is subtracted only where it is asked."""
        end = at + len(logits)
        written = self._written[at:end, None].to(logits.device)
        self._logprobs[at:end] = (logits.gather(1, written) - total)[:, 0].cpu().numpy()
        touched = range(int(np.searchsorted(self._stops, at, "right")), len(self._requests))
        present = [i for i in touched if self._stops[i] - len(self._requests[i].token_ids) < end]
        deepest = max((w.k for i in present if isinstance(w := self._requests[i].kind, TopK)), default=0)
        best = logits.topk(deepest) if deepest else None
        for i in present:
            first = int(self._stops[i]) - len(self._requests[i].token_ids)
            low, high = max(first, at), min(int(self._stops[i]), end)
            mine, here = slice(low - first, high - first), slice(low - at, high - at)
            match self._requests[i].kind:
                case TopK(k=k) if best is not None:
                    values, ids = best.values[here, :k], best.indices[here, :k]
                    self._note(i, mine, ids, values, logits[here], total[here])
                case AtIds(ids=ids):
                    asked = torch.from_numpy(ids[mine]).long().to(logits.device)
                    self._note(i, mine, asked, logits[here].gather(1, asked), logits[here], total[here])

    def _note(
        self,
        i: int,
        mine: slice,
        ids: Tensor,
        values: Tensor,
        logits: Float[Tensor, "rows V"],
        total: Float[Tensor, "rows 1"],
    ) -> None:
        """What request `i` hears of its tokens `mine`; their `logits` are not needed again and are overwritten."""
        self._topk_logprobs[i][mine] = (values - total).cpu().numpy()
        self._topk_ids[i][mine] = ids.cpu().numpy()
        others = logits.scatter_(1, ids, -torch.inf).logsumexp(-1, keepdim=True) - total
        self._rest[i][mine] = others.nan_to_num(neginf=ABSENT)[:, 0].cpu().numpy()

    def answers(self, kept: Iterator[RemoteRows]) -> Iterator[TokenScores]:
        """One answer per request; `kept` are the hidden states of those that want them, in order."""
        for i, request in enumerate(self._requests):
            stop = int(self._stops[i])
            logprobs = self._logprobs[stop - len(request.token_ids) : stop]
            match request.kind:
                case TopK() | AtIds():
                    yield TopKScores(
                        logprobs=logprobs,
                        topk_ids=self._topk_ids[i],
                        topk_logprobs=self._topk_logprobs[i],
                        rest=self._rest[i],
                    )
                case LastHidden():
                    yield HiddenScores(logprobs=logprobs, hidden=next(kept))
                case _:
                    yield TokenScores(logprobs=logprobs)


def _width(request: ScoreRequest) -> int:
    match request.kind:
        case TopK(k=k):
            return k
        case AtIds(ids=ids):
            return ids.shape[1]
        case _:
            return 0


def _problem(request: ScoreRequest, bounds: Bounds) -> str:
    if not len(request.context_ids) or not len(request.token_ids):
        return (
            f"it has {len(request.context_ids)} context and {len(request.token_ids)} completion tokens, but "
            "both need at least one; check the prompt source"
        )
    if length(request) > bounds.longest:
        return f"it has {length(request)} tokens, more than the {bounds.longest} of {bounds.limits}"
    vocabulary = bounds.vocabulary
    for what, ids in (("context", request.context_ids), ("completion", request.token_ids)):
        if ids.min() < 0 or ids.max() >= vocabulary:
            return f"its {what} has ids outside the vocabulary of {vocabulary}; check that tokenizers agree"
    match request.kind:
        case TopK(k=k) if not 1 <= k <= min(bounds.max_k, vocabulary):
            most = min(bounds.max_k, vocabulary)
            return f"k={k} is not within 1 and {most} (teacher.max_k, vocabulary); correct it"
        case AtIds(ids=ids):
            return _problem_at(ids, len(request.token_ids), bounds)
    return ""


def _problem_at(ids: np.ndarray, tokens: int, bounds: Bounds) -> str:
    if ids.ndim != 2 or len(ids) != tokens or not 1 <= ids.shape[1] <= bounds.max_k:
        return (
            f"it asks at ids of shape {ids.shape}, but that must be ({tokens}, K) with K from 1 to "
            f"{bounds.max_k} (teacher.max_k); correct the scorer"
        )
    if ids.min() < 0 or ids.max() >= bounds.vocabulary:
        return f"it asks at ids outside the vocabulary of {bounds.vocabulary}; check that tokenizers agree"
    return ""
