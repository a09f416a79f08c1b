"""Frames: score requests and answers as raw little-endian arrays under one digest; no pickle, no text.

A frame is `header | table | arrays | digest`. The header is `magic, version, kind, reserved, count, bytes of the whole
frame, call, model`; `call` names the question, so that an answer cannot be taken for another's, and `model` is the
fingerprint of the one who answers (zeros in a question). The table has one row of four uint32 per request, the
arrays follow back to back, the last 16 bytes are xxh3-128 over everything before them. An answer carries, per
request, the digest of the request it is about.

The digest finds accidents (a flipped bit, half a body); it is no signature. Who may speak is decided by the token.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import xxhash

from opd.errors import DataError
from opd.ports import AtIds, LastHidden, SampledToken, ScoreKind, ScoreRequest, TopK
from opd.types import HiddenScores, RemoteRows, TokenScores, TopKScores

DIGEST_BYTES = 16
_HEADER = struct.Struct("<4sBBHIQ16s16s")
_MAGIC, _VERSION = b"OPDs", 2
_REQUEST, _ANSWER = 1, 2
_WRITTEN, _TOPK, _AT_IDS, _HIDDEN = range(4)
_INT, _FLOAT, _DIGEST = np.dtype("<i4"), np.dtype("<f4"), np.dtype("V16")
NO_SERVER = bytes(DIGEST_BYTES)


class FrameError(DataError):
    """Bytes that are no whole, undamaged frame."""


class TooLarge(DataError):
    """A frame beyond the limits on requests, tokens or bytes."""


class TooDeep(DataError):
    """A request for more log-probabilities per token than the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLimits:
    """What one frame may hold. `tokens` counts contexts and completions, `k` log-probabilities per token."""

    requests: int = 4096
    tokens: int = 1 << 20
    k: int = 1024
    frame_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A decoded frame of requests; `call` is any 16 bytes."""

    call: bytes
    requests: tuple[ScoreRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A decoded frame of answers; `digests` are those of the requests they are about.

    Hidden states are `RemoteRows` whose handle is the array itself.
    """

    call: bytes
    model: bytes
    digests: tuple[bytes, ...]
    answers: tuple[TokenScores, ...]


def request_digest(request: ScoreRequest) -> bytes:
    """16 bytes over what is asked: context, completion, kind, and k or ids."""
    hasher = xxhash.xxh3_128(np.array(_request_row(request), dtype="<u4").tobytes())
    for array in (request.context_ids, request.token_ids, *_asked_ids(request.kind)):
        hasher.update(_raw(array, _INT).data)
    return hasher.digest()


def answer_bytes(request: ScoreRequest, hidden_bytes: int) -> int:
    """What the answer to `request` takes in a frame, where a hidden state has `hidden_bytes`."""
    match request.kind:
        case TopK(k=k):
            per_token = 4 + 8 * k
        case AtIds(ids=ids):
            per_token = 4 + 8 * ids.shape[1]
        case LastHidden():
            per_token = hidden_bytes
        case SampledToken():
            per_token = 0
    return 16 + DIGEST_BYTES + (4 + per_token) * len(request.token_ids)


def check_answer(requests: Sequence[ScoreRequest], limits: FrameLimits, hidden_bytes: int) -> int:
    """The bytes of the answer to `requests`. Raises `TooLarge` where no frame may have so many."""
    size = _HEADER.size + DIGEST_BYTES + sum(answer_bytes(request, hidden_bytes) for request in requests)
    if size > limits.frame_bytes:
        raise TooLarge(
            f"the answer would have {size} bytes, but {limits.frame_bytes} are allowed; send fewer requests or lower k"
        )
    return size


def encode_question(question: Question) -> bytes:
    """The frame of `question`."""
    asked = question.requests
    arrays = [r.context_ids for r in asked] + [r.token_ids for r in asked]
    arrays += [ids for r in asked for ids in _asked_ids(r.kind)]
    table = np.array([_request_row(r) for r in asked], dtype="<u4")
    return _frame(_REQUEST, question.call, NO_SERVER, table, [_raw(a, _INT) for a in arrays])


def decode_question(frame: bytes, limits: FrameLimits) -> Question:
    """The requests in `frame`. Raises `FrameError`, `TooLarge` or `TooDeep`; ids are not checked for their range."""
    head, table, body = _open(frame, _REQUEST, limits)
    contexts, tokens, kinds, ks = table.astype(np.int64).T
    if ((kinds > _HIDDEN) | ((ks == 0) != ((kinds == _WRITTEN) | (kinds == _HIDDEN)))).any():
        raise FrameError("the frame asks for kinds of testimony that do not exist; use the client of this version")
    if (ks > limits.k).any():
        raise TooDeep(f"a request asks for {ks.max()} log-probabilities per token, but {limits.k} are allowed; lower k")
    _small_enough(int(contexts.sum() + tokens.sum()), limits)
    at = np.where(kinds == _AT_IDS, tokens * ks, 0)
    ids = body.take(np.concatenate([contexts, tokens, at]).tolist(), _INT, own=True)
    body.end()
    count = len(table)
    return Question(
        call=head.call,
        requests=tuple(
            ScoreRequest(
                context_ids=ids[i],
                token_ids=ids[count + i],
                kind=_want(int(kinds[i]), int(ks[i]), ids[2 * count + i]),
            )
            for i in range(count)
        ),
    )


def encode_reply(reply: Reply) -> bytes:
    """The frame of `reply`; hidden states must be rows of arrays in this process."""
    said = reply.answers
    hidden = [_hidden_rows(a) for a in said]
    table = np.array([_answer_row(a, h) for a, h in zip(said, hidden, strict=True)], dtype="<u4")
    top = [a for a in said if isinstance(a, TopKScores)]
    parts = [np.frombuffer(b"".join(reply.digests), np.uint8), *(_raw(a.logprobs, _FLOAT) for a in said)]
    parts += [_raw(a.topk_ids, _INT) for a in top]
    parts += [_raw(a.topk_logprobs, _FLOAT) for a in top]
    parts += [_raw(a.rest, _FLOAT) for a in top]
    parts += [_raw(h, h.dtype.newbyteorder("<")) for h in hidden if h is not None]
    return _frame(_ANSWER, reply.call, reply.model, table, parts)


def decode_reply(frame: bytes, limits: FrameLimits) -> Reply:
    """The answers in `frame`, as views of it. Raises `FrameError` or `TooLarge`; values are not judged here."""
    head, table, body = _open(frame, _ANSWER, limits)
    tokens, kinds, widths, itemsizes = table.astype(np.int64).T
    states = kinds == _HIDDEN
    if ((kinds > _HIDDEN) | (kinds == _AT_IDS) | ((kinds == _WRITTEN) != (widths == 0))).any():
        raise FrameError("the frame holds kinds of testimony that do not exist; use the server of this version")
    if (np.where(states, (itemsizes != 2) & (itemsizes != 4), itemsizes != 0)).any():
        raise FrameError("the frame's hidden states are neither float32 nor bfloat16; use the server of this version")
    _small_enough(int(tokens.sum()), limits)
    cells = np.where(kinds == _TOPK, tokens * widths, 0).tolist()
    (digests,) = body.take([len(table)], _DIGEST)
    logprobs = body.take(tokens.tolist(), _FLOAT)
    ids, values = body.take(cells, _INT), body.take(cells, _FLOAT)
    rest = body.take(np.where(kinds == _TOPK, tokens, 0).tolist(), _FLOAT)
    answers: list[TokenScores] = []
    for i, (kind, *shape) in enumerate(zip(kinds.tolist(), tokens.tolist(), widths.tolist(), strict=True)):
        if kind == _TOPK:
            top = TopKScores(
                logprobs=logprobs[i],
                topk_ids=ids[i].reshape(shape),
                topk_logprobs=values[i].reshape(shape),
                rest=rest[i],
            )
            answers.append(top)
        elif kind == _HIDDEN:
            dtype = _FLOAT if itemsizes[i] == 4 else np.dtype("<u2")
            (rows,) = body.take([shape[0] * shape[1]], dtype)
            pieces = ((rows.reshape(shape), np.arange(shape[0])),)
            answers.append(HiddenScores(logprobs=logprobs[i], hidden=RemoteRows(pieces=pieces)))
        else:
            answers.append(TokenScores(logprobs=logprobs[i]))
    body.end()
    return Reply(call=head.call, model=head.model, digests=tuple(digests.tolist()), answers=tuple(answers))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    call: bytes
    model: bytes


class _Body:
    """Reads arrays one after the other, and insists that nothing is missing and nothing is left."""

    def __init__(self, frame: bytes, start: int) -> None:
        self._frame, self._at, self._end = frame, start, len(frame) - DIGEST_BYTES

    def take(self, sizes: Sequence[int], dtype: np.dtype, *, own: bool = False) -> list[np.ndarray]:
        """Arrays of `sizes` elements, as read-only views; as copies that may be written with `own`."""
        bounds = list(accumulate(sizes, initial=0))
        stop = self._at + bounds[-1] * dtype.itemsize
        if stop > self._end:
            raise FrameError("the frame is shorter than its table says; send it again")
        flat = np.frombuffer(self._frame, dtype, bounds[-1], self._at)
        self._at = stop
        flat = flat.copy() if own else flat
        return [flat[a:b] for a, b in pairwise(bounds)]

    def end(self) -> None:
        """Raise `FrameError` if bytes are left."""
        if self._at != self._end:
            raise FrameError(f"the frame has {self._end - self._at} bytes more than its table says; send it again")


def _frame(kind: int, call: bytes, model: bytes, table: np.ndarray, parts: Iterable[np.ndarray]) -> bytes:
    arrays = [table, *parts]
    size = _HEADER.size + sum(a.nbytes for a in arrays) + DIGEST_BYTES
    pieces: list[Any] = [_HEADER.pack(_MAGIC, _VERSION, kind, 0, len(table), size, call, model), *arrays]
    hasher = xxhash.xxh3_128()
    for piece in pieces:
        hasher.update(piece)
    return b"".join([*pieces, hasher.digest()])  # the one copy


def _open(frame: bytes, kind: int, limits: FrameLimits) -> tuple[_Head, np.ndarray, _Body]:
    """Size first, digest second, and only then the meaning of any byte."""
    if len(frame) > limits.frame_bytes:
        raise TooLarge(f"a frame has {len(frame)} bytes, but {limits.frame_bytes} are allowed; send fewer requests")
    if len(frame) < _HEADER.size + DIGEST_BYTES:
        raise FrameError(f"{len(frame)} bytes are too few for a frame; send it again")
    if xxhash.xxh3_128_digest(memoryview(frame)[:-DIGEST_BYTES]) != frame[-DIGEST_BYTES:]:
        raise FrameError("the frame does not have its digest (bytes were changed or lost on the way); send it again")
    magic, version, found, reserved, count, size, call, model = _HEADER.unpack_from(frame)
    if (magic, version, found, reserved, size) != (_MAGIC, _VERSION, kind, 0, len(frame)):
        raise FrameError("the frame is of another kind or version; use client and server of one version")
    if count > limits.requests:
        raise TooLarge(f"a frame has {count} requests, but {limits.requests} are allowed; send fewer requests")
    body = _Body(frame, _HEADER.size)
    (table,) = body.take([4 * count], np.dtype("<u4"))
    return _Head(call=call, model=model), table.reshape(count, 4), body


def _small_enough(tokens: int, limits: FrameLimits) -> None:
    if tokens > limits.tokens:
        raise TooLarge(f"a frame has {tokens} tokens, but {limits.tokens} are allowed; send fewer requests")


def _raw(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=dtype)


def _asked_ids(kind: ScoreKind) -> tuple[np.ndarray, ...]:
    return (kind.ids,) if isinstance(kind, AtIds) else ()


def _request_row(request: ScoreRequest) -> tuple[int, int, int, int]:
    lengths = (len(request.context_ids), len(request.token_ids))
    match request.kind:
        case TopK(k=k):
            return *lengths, _TOPK, k
        case AtIds(ids=ids):
            return *lengths, _AT_IDS, ids.shape[1]
        case LastHidden():
            return *lengths, _HIDDEN, 0
        case SampledToken():
            return *lengths, _WRITTEN, 0


def _want(kind: int, k: int, ids: np.ndarray) -> ScoreKind:
    if kind == _AT_IDS:
        return AtIds(ids=ids.reshape(-1, k))
    if kind == _TOPK:
        return TopK(k=k)
    return LastHidden() if kind == _HIDDEN else SampledToken()


def _hidden_rows(answer: TokenScores) -> np.ndarray | None:
    if not isinstance(answer, HiddenScores):
        return None
    assert isinstance(answer.hidden, RemoteRows)
    return np.concatenate([array[rows] for array, rows in answer.hidden.pieces])


def _answer_row(answer: TokenScores, hidden: np.ndarray | None) -> tuple[int, int, int, int]:
    if hidden is not None:
        return len(answer.logprobs), _HIDDEN, hidden.shape[1], hidden.dtype.itemsize
    if isinstance(answer, TopKScores):
        return len(answer.logprobs), _TOPK, answer.topk_ids.shape[1], 0
    return len(answer.logprobs), _WRITTEN, 0, 0
