"""Common part of all backends that read tokens: bounds of requests, and scores computed from hidden states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opd.errors import ConfigurationError, DataError
from opd.ports import LogitRows, ScoreAnswer, ScoreKind, ScoreKinds, ScoreRequest
from opd.types import RemoteRows, Scores

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
    """A request that this teacher cannot read; a retry would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of the requests that a backend can read.

    Ids are below `vocabulary`, a forward has at most `longest` tokens, a token at most `max_k` scores. `limits` says
    where `longest` comes from, for the error. Example: `Bounds(vocabulary=192, longest=128, max_k=64,
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
) -> Iterator[ScoreAnswer]:
    """Scores of every kind per request from the `hidden` states that predict their tokens, one request after the other.

    At most `head_chunk` rows have logits over the vocabulary at the same time. Hidden states that are asked for
    are stored in one array.
    """
    collected = _ScoreRows(requests)
    for at in range(0, len(hidden), head_chunk):
        rows = logits(hidden[at : at + head_chunk])
        collected.add(at, rows, _normalizer(rows))
    return collected.answers(_kept(requests, hidden, store))


def completion_rows(requests: Sequence[ScoreRequest]) -> tuple[list[np.ndarray], np.ndarray]:
    """The sequences to read, and where in them, laid end to end, the tokens of `requests` are predicted."""
    sequences = [np.concatenate([r.context_ids, r.token_ids[:-1]]) for r in requests]
    ends = np.cumsum([len(s) for s in sequences])
    rows = np.concatenate([np.arange(e - len(r.token_ids), e) for e, r in zip(ends, requests, strict=True)])
    return sequences, rows


def kinds_of(requests: Sequence[ScoreRequest]) -> ScoreKinds:
    """Score kinds of the requests."""
    return frozenset(type(kind) for request in requests for kind in request.kinds)


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


def _remote(request: ScoreRequest) -> bool:
    """Whether the request wants hidden states."""
    return any(column.remote for kind in request.kinds for column in kind.columns())


def _kept(requests: Sequence[ScoreRequest], hidden: Float[Tensor, "rows H"], store: Store) -> Iterator[RemoteRows]:
    """Handles of the hidden states of the requests that want them; one stored array for all."""
    wanted = np.concatenate([np.full(len(r.token_ids), _remote(r)) for r in requests])
    if not wanted.any():
        return
    kept = hidden[torch.from_numpy(wanted).to(hidden.device)].cpu().contiguous()
    handle = store((kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy())
    row_nbytes, start = kept.shape[1] * kept.itemsize, 0
    for request in requests:
        if _remote(request):
            stop = start + len(request.token_ids)
            yield RemoteRows(pieces=((handle, np.arange(start, stop)),), row_nbytes=row_nbytes)
            start = stop


class _ScoreRows:
    """Collects the answers to a micro-batch while its completion tokens come by in chunks of logits."""

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests = requests
        self._stops = np.cumsum([len(r.token_ids) for r in requests])
        self._written = torch.from_numpy(np.concatenate([r.token_ids for r in requests])).long()
        self._arrays = [[_empty(kind, len(r.token_ids)) for kind in r.kinds] for r in requests]

    def add(self, at: int, logits: Float[Tensor, "rows V"], total: Float[Tensor, "rows 1"]) -> None:
        """Add completion tokens `at .. at + rows` of the micro-batch; `total` is subtracted only where it is needed."""
        end = at + len(logits)
        touched = range(int(np.searchsorted(self._stops, at, "right")), len(self._requests))
        present = [i for i in touched if self._stops[i] - len(self._requests[i].token_ids) < end]
        deepest = max((kind.depth for i in present for kind in self._requests[i].kinds), default=0)
        chunk = LogitRows.of(logits, total, self._written[at:end].to(logits.device), deepest)
        read: list[tuple[np.ndarray, Tensor]] = []
        for i in present:
            first = int(self._stops[i]) - len(self._requests[i].token_ids)
            low, high = max(first, at), min(int(self._stops[i]), end)
            rows, mine = chunk.rows(low - at, high - at), slice(low - first, high - first)
            for kind, arrays in zip(self._requests[i].kinds, self._arrays[i], strict=True):
                fields = kind.rows(mine.start, mine.stop).read(rows)
                check_fields(kind, fields, {name: array[mine].shape for name, array in arrays.items()})
                read += [(array[mine], fields[name]) for name, array in arrays.items()]
        _copy_back(read)

    def answers(self, kept: Iterator[RemoteRows]) -> Iterator[ScoreAnswer]:
        """One answer per request; `kept` are the hidden states of those that want them, in order."""
        for request, arrays in zip(self._requests, self._arrays, strict=True):
            states = next(kept) if _remote(request) else None
            yield tuple(
                kind.answer(**columns, **{c.name: states for c in kind.columns() if c.remote})
                for kind, columns in zip(request.kinds, arrays, strict=True)
            )


def _empty(kind: ScoreKind[Scores], tokens: int) -> dict[str, np.ndarray]:
    """Room for the columns of an answer, without those that are held elsewhere."""
    here = [column for column in kind.columns() if not column.remote]
    try:
        return {c.name: np.empty((tokens, *(kind.axes[axis] for axis in c.axes)), dtype=c.dtype) for c in here}
    except KeyError as error:
        raise ConfigurationError(
            f"{type(kind).__qualname__}.axes gives no size for the axis {error} of {kind.answer.__name__}; add it"
        ) from error


def check_fields(kind: ScoreKind[Scores], fields: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ConfigurationError` unless `kind` read the columns that its answer has, in their `shapes`."""
    found = {name: tuple(value.shape) for name, value in fields.items()}
    if found != shapes:
        raise ConfigurationError(
            f"{type(kind).__qualname__}.read must give {shapes} by the annotations of {kind.answer.__name__}, but gave "
            f"{found}; correct one of them"
        )


def _copy_back(read: Sequence[tuple[np.ndarray, Tensor]]) -> None:
    """Fill each array with its tensor; one transfer from the device per dtype, since each waits for the device."""
    for dtype in {array.dtype for array, _ in read}:
        some = [(array, tensor) for array, tensor in read if array.dtype == dtype]
        there = torch.float32 if dtype.kind == "f" else torch.int32
        flat = torch.cat([tensor.to(there).reshape(-1) for _, tensor in some]).cpu().numpy()
        for (array, _), part in zip(some, np.split(flat, np.cumsum([a.size for a, _ in some])[:-1]), strict=True):
            array[...] = part.reshape(array.shape)


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
    if not request.kinds:
        return "it asks for no kind of scores; name one in ScoreRequest.kinds"
    problems = (kind.unreadable(len(request.token_ids), vocabulary, bounds.max_k) for kind in request.kinds)
    return next(filter(None, problems), "")
