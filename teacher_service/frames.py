"""Frames: score requests and answers as raw little-endian arrays under one digest; no pickle, no text.

A frame is `header | rows | codes | numbers | arrays | digest`. The header is `magic, version, what, reserved, count,
bytes of the whole frame, call, model`; `call` names the question, so that an answer cannot be taken for another's, and
`model` is the fingerprint of the one who answers (zeros in a question). A row of uint32 per request has its lengths and
the number of its kinds; `codes` has one uint32 per kind (`known_kinds.wire_code`): only kinds that the reader's
configuration names are read. `numbers` has 8 bytes for every size and every number that the fields of a kind, or the
columns of its answer, are declared to have (`opd.types.columns`). Arrays follow back to back, int32 before float32
before hidden states; the last 16 bytes are xxh3-128 over everything before them. An answer carries, per request, the
digest of the request it is about.

The digest finds accidents (a flipped bit, half a body); it is no signature. Who may speak is decided by the token.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from opd.errors import DataError
from opd.ports import ScoreAnswer, ScoreKind, ScoreRequest
from opd.types import Scores
from opd.types.columns import fields_that_travel
from teacher_service.frame_fields import (
    DIGEST_BYTES,
    INT,
    NUMBER,
    Body,
    FieldGroup,
    FrameError,
    Packed,
    TooDeep,
    field_bytes,
    laid_out,
    pack,
    unpack,
)
from teacher_service.known_kinds import OWN_KINDS, KindClass, KnownKinds, wire_code

_HEADER = struct.Struct("<4sBBHIQ16s16s")
_MAGIC, _VERSION = b"OPDs", 3
_REQUEST, _ANSWER = 1, 2
_WORD, _DIGEST = np.dtype("<u4"), np.dtype("V16")
MOST_KINDS = 16  # of one request
NO_SERVER = bytes(DIGEST_BYTES)


class TooLarge(DataError):
    """A frame beyond the limits on requests, tokens or bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLimits:
    """Bounds of one frame. `tokens` counts contexts and completions, `k` log-probabilities per token."""

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
    """A decoded frame of answers; `digests` are those of the requests they are about, `kinds` their score kinds.

    Hidden states are `RemoteRows` whose handle is the array itself.
    """

    call: bytes
    model: bytes
    digests: tuple[bytes, ...]
    kinds: tuple[tuple[KindClass, ...], ...]
    answers: tuple[ScoreAnswer, ...]


def request_digest(request: ScoreRequest) -> bytes:
    """Digest (16 bytes) of a request: context, completion, and the kinds with their parameters."""
    asked = [pack(fields_that_travel(type(kind)), kind) for kind in request.kinds]
    hasher = xxhash.xxh3_128(np.array([*_request_row(request), *_codes([request])], dtype=_WORD).tobytes())
    hasher.update(np.array([n for kind in asked for n in kind.numbers], dtype=NUMBER).tobytes())
    for array in (*_texts([request]), *laid_out(asked)):
        hasher.update(array.data)
    return hasher.digest()


def answer_bytes(request: ScoreRequest, hidden_bytes: int) -> int:
    """Bytes of the answer to `request` in a frame, where a hidden state has `hidden_bytes`."""
    tokens = len(request.token_ids)
    kinds = (4 + field_bytes(kind.columns(), kind.axes, tokens, hidden_bytes) for kind in request.kinds)
    return 8 + DIGEST_BYTES + sum(kinds)


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
    packed = [pack(fields_that_travel(type(kind)), kind) for r in asked for kind in r.kinds]
    tables = _tables([_request_row(r) for r in asked], _codes(asked), packed)
    return _frame(_REQUEST, question.call, NO_SERVER, len(asked), [*tables, *_texts(asked), *laid_out(packed)])


def decode_question(frame: bytes, limits: FrameLimits, known: KnownKinds = OWN_KINDS) -> Question:
    """The requests in `frame`. Raises `FrameError`, `TooLarge` or `TooDeep`; ids are not checked for their range."""
    head, body = _open(frame, _REQUEST, limits)
    contexts, tokens, counts = _rows(body, head.count, 3, limits)
    classes = _classes(body, counts, known)
    groups = [
        FieldGroup(fields=fields_that_travel(cls), tokens=n)
        for n, some in zip(tokens, classes, strict=True)
        for cls in some
    ]
    (numbers,) = body.take([sum(group.numbers for group in groups)], NUMBER)
    texts = body.take([*contexts, *tokens], INT, own=True)
    values = iter(unpack(body, numbers, groups, deepest=limits.k, own=True))
    body.end()
    requests = [
        ScoreRequest(
            context_ids=texts[i],
            token_ids=texts[head.count + i],
            kinds=tuple(_asked(cls, next(values), limits) for cls in some),
        )
        for i, some in enumerate(classes)
    ]
    return Question(call=head.call, requests=tuple(requests))


def encode_reply(reply: Reply) -> bytes:
    """The frame of `reply`; hidden states must be rows of arrays in this process."""
    packed = [
        [pack(cls.columns(), scores) for cls, scores in zip(some, answer, strict=True)]
        for some, answer in zip(reply.kinds, reply.answers, strict=True)
    ]
    flat = [one for answer in packed for one in answer]
    codes = [wire_code(cls) for some in reply.kinds for cls in some]
    tables = _tables([(_tokens(answer), len(answer)) for answer in packed], codes, flat)
    digests = np.frombuffer(b"".join(reply.digests), np.uint8)
    return _frame(_ANSWER, reply.call, reply.model, len(packed), [*tables, digests, *laid_out(flat)])


def decode_reply(frame: bytes, limits: FrameLimits, known: KnownKinds = OWN_KINDS) -> Reply:
    """The answers in `frame`, as views of it. Raises `FrameError` or `TooLarge`; values are not judged here."""
    head, body = _open(frame, _ANSWER, limits)
    tokens, counts = _rows(body, head.count, 2, limits)
    classes = _classes(body, counts, known)
    groups = [
        FieldGroup(fields=cls.columns(), tokens=n) for n, some in zip(tokens, classes, strict=True) for cls in some
    ]
    (numbers,) = body.take([sum(group.numbers for group in groups)], NUMBER)
    (digests,) = body.take([head.count], _DIGEST)
    values = iter(unpack(body, numbers, groups))
    body.end()
    answers = tuple(tuple(_answer(cls, next(values)) for cls in some) for some in classes)
    return Reply(
        call=head.call, model=head.model, digests=tuple(digests.tolist()), kinds=tuple(classes), answers=answers
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    call: bytes
    model: bytes
    count: int


def _frame(what: int, call: bytes, model: bytes, count: int, arrays: Sequence[np.ndarray]) -> bytes:
    size = _HEADER.size + sum(a.nbytes for a in arrays) + DIGEST_BYTES
    pieces: list[Any] = [_HEADER.pack(_MAGIC, _VERSION, what, 0, count, size, call, model), *arrays]
    hasher = xxhash.xxh3_128()
    for piece in pieces:
        hasher.update(piece)
    return b"".join([*pieces, hasher.digest()])  # the one copy


def _open(frame: bytes, what: int, limits: FrameLimits) -> tuple[_Head, Body]:
    """Size first, digest second, and only then the meaning of any byte."""
    if len(frame) > limits.frame_bytes:
        raise TooLarge(f"a frame has {len(frame)} bytes, but {limits.frame_bytes} are allowed; send fewer requests")
    if len(frame) < _HEADER.size + DIGEST_BYTES:
        raise FrameError(f"{len(frame)} bytes are too few for a frame; send it again")
    if xxhash.xxh3_128_digest(memoryview(frame)[:-DIGEST_BYTES]) != frame[-DIGEST_BYTES:]:
        raise FrameError("the frame does not have its digest (bytes were changed or lost on the way); send it again")
    magic, version, found, reserved, count, size, call, model = _HEADER.unpack_from(frame)
    if (magic, version, found, reserved, size) != (_MAGIC, _VERSION, what, 0, len(frame)):
        raise FrameError("the frame is of another kind or version; use client and server of one version")
    if count > limits.requests:
        raise TooLarge(f"a frame has {count} requests, but {limits.requests} are allowed; send fewer requests")
    return _Head(call=call, model=model, count=count), Body(frame, _HEADER.size)


def _tables(rows: Sequence[Sequence[int]], codes: Sequence[int], packed: Sequence[Packed]) -> list[np.ndarray]:
    numbers = [number for one in packed for number in one.numbers]
    return [np.array(rows, dtype=_WORD), np.array(codes, dtype=_WORD), np.array(numbers, dtype=NUMBER)]


def _rows(body: Body, count: int, columns: int, limits: FrameLimits) -> list[list[int]]:
    """The columns of the first table: lengths, and last how many kinds a request has."""
    (table,) = body.take([columns * count], _WORD)
    found = table.reshape(count, columns).T.tolist()
    tokens = sum(map(sum, found[:-1]))
    if tokens > limits.tokens:
        raise TooLarge(f"a frame has {tokens} tokens, but {limits.tokens} are allowed; send fewer requests")
    most = max(found[-1], default=0)
    if most > MOST_KINDS:
        raise TooLarge(f"a request has {most} kinds of scores, but {MOST_KINDS} are allowed; ask in several requests")
    return found


def _classes(body: Body, counts: Sequence[int], known: KnownKinds) -> list[tuple[KindClass, ...]]:
    """The classes behind the codes of every request."""
    codes = [part.tolist() for part in body.take(counts, _WORD)]
    if not all(code in known for part in codes for code in part):
        raise FrameError(
            "the frame has kinds of scores that do not exist here; use client and server of one version and with the "
            "same teacher.score_kinds"
        )
    return [tuple(known[code] for code in part) for part in codes]


def _asked(cls: KindClass, values: Mapping[str, Any], limits: FrameLimits) -> ScoreKind[Scores]:
    try:
        kind = cls(**values)
        depths = [*kind.axes.values(), kind.depth]
    except Exception as error:  # a user's kind may raise anything of numbers it never expected
        raise FrameError(f"the frame has parameters that {cls.__name__} refuses ({type(error).__name__})") from error
    if min(depths, default=0) < 0 or 0 in kind.axes.values():
        raise FrameError(f"the frame asks for {min(depths)} numbers per token; use client and server of one version")
    if max(depths) > limits.k:
        raise TooDeep(
            f"a request asks for {max(depths)} log-probabilities per token, but {limits.k} are allowed; lower k"
        )
    return kind


def _answer(cls: KindClass, values: Mapping[str, Any]) -> Scores:
    try:
        return cls.answer(**values)
    except Exception as error:  # a user's scores may raise anything of numbers they never expected
        raise FrameError(f"the frame has what {cls.answer.__name__} refuses ({type(error).__name__})") from error


def _tokens(answer: Sequence[Packed]) -> int:
    """The tokens that an answer is about."""
    lengths = {len(array) for one in answer for array in (*one.arrays, *one.states)}
    if len(lengths) > 1:
        raise DataError(f"an answer has arrays about {sorted(lengths)} tokens; the teacher's backend is at fault")
    return lengths.pop() if lengths else 0


def _request_row(request: ScoreRequest) -> tuple[int, int, int]:
    return len(request.context_ids), len(request.token_ids), len(request.kinds)


def _codes(requests: Sequence[ScoreRequest]) -> list[int]:
    return [wire_code(type(kind)) for request in requests for kind in request.kinds]


def _texts(requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
    texts = [r.context_ids for r in requests] + [r.token_ids for r in requests]
    return [np.ascontiguousarray(text, dtype=INT) for text in texts]
