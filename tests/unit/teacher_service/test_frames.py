"""Frames come back as they went, and not one of ten thousand damaged ones is accepted."""

import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from learner.checkpoints import checkpoint
from opd.errors import DataError
from opd.ports import AtIds, LastHidden, SampledToken, ScoreRequest, TopK
from opd.ports.score_kinds import BUILT_IN
from opd.types import HiddenScores, RemoteRows, TokenScores, TopKScores
from teacher_service.frames import (
    FrameError,
    FrameLimits,
    Question,
    Reply,
    TooDeep,
    TooLarge,
    check_answer,
    decode_question,
    decode_reply,
    encode_question,
    encode_reply,
    request_digest,
)
from teacher_service.known_kinds import wire_code
from tests.fault_matrix import Witness

LIMITS = FrameLimits(requests=9, tokens=400, k=8, frame_bytes=1 << 16)
SAYS: dict[type, Any] = {TokenScores: SampledToken, TopKScores: TopK, HiddenScores: LastHidden}
CALL, MODEL = bytes(range(16)), bytes(range(16, 32))


def question(seed: int, count: int = 5) -> Question:
    """Requests of every kind and many lengths, some of several kinds."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        context, tokens, k = random.integers(0, 9), random.integers(0, 12), random.integers(1, 5)
        wants = (SampledToken(), TopK(k=int(k)), AtIds(ids=ids(random, (tokens, k))), LastHidden())
        kinds = (wants[(seed + i) % 4], *(wants[j] for j in random.permutation(4)[: random.integers(3)]))
        made.append(ScoreRequest(context_ids=ids(random, context), token_ids=ids(random, tokens), kinds=kinds))
    return Question(call=random.bytes(16), requests=tuple(made))


def ids(random: np.random.Generator, shape: Any) -> np.ndarray:
    return random.integers(-(2**31), 2**31, shape).astype(np.int32)


def reply(seed: int, count: int = 5) -> Reply:
    """Answers of every kind: any bits at all, also NaN."""
    random = np.random.default_rng(seed)
    made: list[tuple[TokenScores, ...]] = []
    for i in range(count):
        tokens, k = (int(random.integers(*r)) for r in ((0, 12), (1, 5)))
        logprobs = bits(random, (tokens,), np.float32)
        rows = bits(random, (tokens, k), (np.float32, np.uint16)[seed % 2])
        order = random.permutation(tokens)
        said = (
            TokenScores(logprobs=logprobs),
            TopKScores(
                logprobs=logprobs,
                topk_ids=ids(random, (tokens, k)),
                topk_logprobs=bits(random, (tokens, k), np.float32),
            ),
            HiddenScores(logprobs=logprobs, hidden=RemoteRows(pieces=((rows, order),))),
        )
        made.append((said[(seed + i) % 3], *said[: random.integers(3)]))
    digests = tuple(random.bytes(16) for _ in made)
    kinds = tuple(tuple(SAYS[type(scores)] for scores in answer) for answer in made)
    return Reply(call=random.bytes(16), model=random.bytes(16), digests=digests, kinds=kinds, answers=tuple(made))


def bits(random: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(random.bytes(size), dtype).reshape(shape)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit."""
    if isinstance(a, RemoteRows):
        return same(*(np.concatenate([array[rows] for array, rows in x.pieces]) for x in (a, b)))
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_frames_come_back_as_they_went(seed: int, count: int) -> None:
    asked, said = question(seed, count), reply(seed, count)
    assert same(decode_question(encode_question(asked), LIMITS), asked)
    assert same(decode_reply(encode_reply(said), LIMITS), said)


def mutated(frame: bytes, random: np.random.Generator) -> bytes:
    """One accident: a flipped bit, a changed, lost, doubled or swapped stretch, a cut, something appended."""
    at, other = (int(i) for i in random.integers(0, len(frame), 2))
    low, high = min(at, other), max(at, other) + 1
    flipped = frame[:at] + bytes([frame[at] ^ 1 << int(random.integers(8))]) + frame[at + 1 :]
    choices = (
        flipped,
        flipped,
        frame[:low] + random.bytes(high - low) + frame[high:],
        frame[:low] + frame[high:],
        frame[:high] + frame[low:],
        frame[:at],
        frame + random.bytes(1 + at % 40),
        frame[:low] + frame[low:high][::-1] + frame[high:],
    )
    return choices[int(random.integers(len(choices)))]


@pytest.mark.faults("frame damaged")
@pytest.mark.parametrize(
    ("frame", "decode"), [(encode_question(question(1)), decode_question), (encode_reply(reply(1)), decode_reply)]
)
def test_none_of_ten_thousand_damaged_frames_is_accepted(
    frame: bytes, decode: Callable[..., Any], witness: Witness
) -> None:
    random = np.random.default_rng(0)
    accepted = refused = 0
    while refused + accepted < 10_000:
        bad = mutated(frame, random)
        if bad == frame:  # a stretch that is its own mirror image
            continue
        try:
            decode(bad, LIMITS)
            accepted += 1
        except FrameError:
            refused += 1
    assert (accepted, refused) == (0, 10_000)
    witness("frame damaged", refused)


class Payload:
    """What a pickle does to whoever reads it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def pickled(path: Path) -> bytes:
    """A pickle that makes `path` when it is read; tried once, so that it is known to bite."""
    data = pickle.dumps(Payload(path))
    pickle.loads(data)  # noqa: S301 (our own)
    assert path.exists()
    path.unlink()
    return data


@pytest.mark.faults("pickle from outside")
def test_a_pickle_where_a_frame_or_a_shard_belongs_is_refused_and_not_read(tmp_path: Path, witness: Witness) -> None:
    bite = pickled(tmp_path / "bitten")
    header = encode_reply(reply(1))[:64]
    for decode in (decode_question, decode_reply):
        for frame in (bite, header + bite):
            witness("pickle from outside")
            with pytest.raises(FrameError):
                decode(frame, LIMITS)
    shard = tmp_path / "learner" / checkpoint.shard_name(0)
    shard.parent.mkdir()
    shard.write_bytes(bite)
    witness("pickle from outside")
    with pytest.raises(DataError, match="is no 'opd learner shard"):
        checkpoint.Shards(shard.parent)
    torch.save({"weight": Payload(tmp_path / "bitten")}, shard)
    witness("pickle from outside")
    with pytest.raises(DataError, match="is no 'opd learner shard"):
        checkpoint.Shards(shard.parent)
    assert not (tmp_path / "bitten").exists()


def test_every_single_bit_counts() -> None:
    for frame, decode in (
        (encode_question(question(2, 2)), decode_question),
        (encode_reply(reply(2, 2)), decode_reply),
    ):
        for bit in range(8 * len(frame)):
            bad = bytearray(frame)
            bad[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FrameError):
                decode(bytes(bad), LIMITS)


@given(st.integers(0, 2**32 - 1))
def test_a_frame_with_a_right_digest_and_a_wrong_table_is_refused_or_means_something_else(seed: int) -> None:
    """Whoever knows the format may send anything; nothing but the three errors ever comes of it."""
    random = np.random.default_rng(seed)
    for frame, decode in (
        (encode_question(question(seed)), decode_question),
        (encode_reply(reply(seed)), decode_reply),
    ):
        bad = bytearray(frame[:-16])
        for _ in range(int(random.integers(1, 4))):
            bad[int(random.integers(0, len(bad)))] = int(random.integers(256))
        resealed = bytes(bad) + xxhash.xxh3_128_digest(bytes(bad))
        with suppress(FrameError, TooLarge, TooDeep):
            decode(resealed, LIMITS)


def test_limits_are_kept_before_anything_is_allocated() -> None:
    frame = encode_question(question(0, 5))
    with pytest.raises(TooLarge, match="5 requests, but 4"):
        decode_question(frame, replace(LIMITS, requests=4))
    with pytest.raises(TooLarge, match="tokens, but 3"):
        decode_question(frame, replace(LIMITS, tokens=3))
    with pytest.raises(TooLarge, match=f"{len(frame)} bytes, but 100"):
        decode_question(frame, replace(LIMITS, frame_bytes=100))
    one = np.ones(1, dtype=np.int32)
    deep = ScoreRequest(context_ids=one, token_ids=one, kinds=(TopK(k=9),))
    with pytest.raises(TooDeep, match="9 log-probabilities per token, but 8"):
        decode_question(encode_question(Question(call=CALL, requests=(deep,))), LIMITS)
    with pytest.raises(TooLarge, match="tokens, but 3"):
        decode_reply(encode_reply(reply(0)), replace(LIMITS, tokens=3))
    huge = bytearray(encode_question(question(0, 1))[:-16])
    struct.pack_into("<I", huge, 52, 2**32 - 1)  # a context of 4 billion tokens, in 100 bytes
    with pytest.raises(TooLarge):
        decode_question(bytes(huge) + xxhash.xxh3_128_digest(bytes(huge)), LIMITS)


def test_a_question_is_no_answer() -> None:
    with pytest.raises(FrameError, match="another kind"):
        decode_reply(encode_question(question(0)), LIMITS)
    with pytest.raises(FrameError, match="another kind"):
        decode_question(encode_reply(reply(0)), LIMITS)
    with pytest.raises(FrameError, match="too few"):
        decode_question(b"", LIMITS)


def test_the_digest_of_a_request_covers_all_of_it() -> None:
    ids = np.arange(1, 5, dtype=np.int32)
    base = ScoreRequest(context_ids=ids, token_ids=ids, kinds=(TopK(k=3),))
    at = np.ones((4, 2), dtype=np.int32)
    others = [
        replace(base, context_ids=ids[:-1]),
        replace(base, context_ids=ids + 1),
        replace(base, token_ids=np.roll(ids, 1)),
        replace(base, context_ids=np.append(ids, 1).astype(np.int32), token_ids=ids[1:]),
        replace(base, kinds=(TopK(k=2),)),
        replace(base, kinds=(SampledToken(),)),
        replace(base, kinds=(LastHidden(),)),
        replace(base, kinds=(AtIds(ids=at),)),
        replace(base, kinds=(AtIds(ids=at + 1),)),
        replace(base, kinds=(TopK(k=3), TopK(k=3))),
        replace(base, kinds=(TopK(k=3), SampledToken())),
        replace(base, kinds=(SampledToken(), TopK(k=3))),
        replace(base, kinds=()),
    ]
    digests = {request_digest(r) for r in [base, *others]}
    assert len(digests) == 1 + len(others)
    assert request_digest(replace(base, token_ids=ids.copy())) == request_digest(base)


def resealed(frame: bytes | bytearray) -> bytes:
    """With the size and the digest that belong to its bytes; `frame` comes without one."""
    whole = bytearray(frame)
    struct.pack_into("<Q", whole, 12, len(whole) + 16)
    return bytes(whole) + xxhash.xxh3_128_digest(bytes(whole))


def test_a_frame_begins_as_version_3_says() -> None:
    """What is written and what is read change together, so that only the bytes show it."""
    for kind, frame in ((1, encode_question(question(1))), (2, encode_reply(reply(1)))):
        assert struct.unpack_from("<4sBBHIQ", frame) == (b"OPDs", 3, kind, 0, 5, len(frame))
    assert encode_question(question(1))[36:52] == bytes(16)


@pytest.mark.parametrize(
    ("frame", "decode"), [(encode_question(question(3)), decode_question), (encode_reply(reply(3)), decode_reply)]
)
def test_bytes_that_no_table_speaks_of_are_refused(frame: bytes, decode: Callable[..., Any]) -> None:
    assert decode(resealed(frame[:-16]), LIMITS)
    with pytest.raises(FrameError, match="4 bytes more than its table says"):
        decode(resealed(frame[:-16] + bytes(4)), LIMITS)
    with pytest.raises(FrameError, match="shorter than its table says"):
        decode(resealed(frame[:-20]), LIMITS)


NOTHING = np.zeros(0, dtype=np.int32)


def spoilt(frame: bytes, at: int, form: str, *values: int) -> bytes:
    """A frame with other values at a place."""
    bad = bytearray(frame[:-16])
    struct.pack_into(form, bad, at, *values)
    return resealed(bad)


@pytest.mark.parametrize("code", [*map(wire_code, BUILT_IN), 0, 1, 2**32 - 1])
def test_only_kinds_that_are_known_are_read(code: int) -> None:
    """The code of the only kind stands behind one row of three (two, in an answer) numbers."""
    empty = ScoreRequest(context_ids=NOTHING, token_ids=NOTHING, kinds=(SampledToken(),))
    frame = spoilt(encode_question(Question(call=CALL, requests=(empty,))), 52 + 12, "<I", code)
    said = TokenScores(logprobs=np.zeros(0, dtype=np.float32))
    answer = Reply(call=CALL, model=MODEL, digests=(bytes(16),), kinds=((SampledToken,),), answers=((said,),))
    back = spoilt(encode_reply(answer), 52 + 8, "<I", code)
    if code == wire_code(SampledToken):
        assert decode_question(frame, LIMITS).requests[0].kinds == (SampledToken(),)
        assert decode_reply(back, LIMITS).kinds == ((SampledToken,),)
        return
    known = code in map(wire_code, BUILT_IN)
    with pytest.raises(FrameError, match=None if known else "do not exist here"):
        decode_reply(back, LIMITS)
    if code != wire_code(LastHidden):  # which has no parameters either
        with pytest.raises(FrameError, match="shorter than its table says" if known else "do not exist here"):
            decode_question(frame, LIMITS)


@pytest.mark.parametrize("k", [-(2**63), -1, 0, 1, 8, 9, 2**32, 2**63 - 1])
def test_a_question_has_a_k_that_may_be(k: int) -> None:
    one = ScoreRequest(context_ids=NOTHING, token_ids=NOTHING, kinds=(TopK(k=1),))
    at = ScoreRequest(context_ids=NOTHING, token_ids=NOTHING, kinds=(AtIds(ids=np.zeros((0, 1), np.int32)),))
    for request in (one, at):
        frame = spoilt(encode_question(Question(call=CALL, requests=(request,))), 52 + 12 + 4, "<q", k)
        if 1 <= k <= LIMITS.k:
            ((kind,),) = [r.kinds for r in decode_question(frame, LIMITS).requests]
            assert kind.axes["K"] == k
            continue
        with pytest.raises((TooDeep, FrameError)):
            decode_question(frame, LIMITS)


@pytest.mark.parametrize("width", [-1, 0, 1, 2, 2**32 - 1, 2**32, 2**62])
@pytest.mark.parametrize("itemsize", [0, 1, 2, 3, 4, 5, 8])
def test_hidden_states_have_a_width_and_16_or_32_bits(width: int, itemsize: int) -> None:
    rows = RemoteRows(pieces=((np.zeros((0, 1), np.float32), NOTHING),))
    said = HiddenScores(logprobs=np.zeros(0, dtype=np.float32), hidden=rows)
    answer = Reply(call=CALL, model=MODEL, digests=(bytes(16),), kinds=((LastHidden,),), answers=((said,),))
    frame = spoilt(encode_reply(answer), 52 + 8 + 4, "<2q", width, itemsize)
    if 1 <= width < 2**32 and itemsize in (2, 4):
        ((read,),) = decode_reply(frame, LIMITS).answers
        assert isinstance(read, HiddenScores) and isinstance(read.hidden, RemoteRows)
        assert read.hidden.pieces[0][0].shape == (0, width)
        return
    with pytest.raises(FrameError, match=r"neither float32 nor bfloat16|numbers per token"):
        decode_reply(frame, LIMITS)


@pytest.mark.parametrize(("count", "right"), [(16, True), (17, False)])
def test_a_request_has_at_most_16_kinds(count: int, right: bool) -> None:
    request = ScoreRequest(context_ids=NOTHING, token_ids=NOTHING, kinds=(SampledToken(),) * count)
    frame = encode_question(Question(call=CALL, requests=(request,)))
    if right:
        assert len(decode_question(frame, LIMITS).requests[0].kinds) == count
        return
    with pytest.raises(TooLarge, match="17 kinds of scores, but 16"):
        decode_question(frame, LIMITS)


def test_what_is_exactly_at_a_limit_is_taken() -> None:
    asked, said = question(0, 5), reply(0, 5)
    tokens = sum(len(r.context_ids) + len(r.token_ids) for r in asked.requests)
    deepest = max(kind.axes.get("K", 0) for r in asked.requests for kind in r.kinds)
    frame = encode_question(asked)
    fits = FrameLimits(requests=5, tokens=tokens, k=deepest, frame_bytes=len(frame))
    assert same(decode_question(frame, fits), asked)
    for name, error in {"requests": TooLarge, "tokens": TooLarge, "k": TooDeep, "frame_bytes": TooLarge}.items():
        with pytest.raises(error):
            decode_question(frame, replace(fits, **{name: getattr(fits, name) - 1}))
    frame, written = encode_reply(said), sum(len(np.asarray(getattr(a[0], "logprobs"))) for a in said.answers)  # noqa: B009
    fits = FrameLimits(requests=5, tokens=written, k=0, frame_bytes=len(frame))
    assert same(decode_reply(frame, fits), said)
    for name in ("requests", "tokens", "frame_bytes"):
        with pytest.raises(TooLarge):
            decode_reply(frame, replace(fits, **{name: getattr(fits, name) - 1}))


def test_one_frame_holds_what_it_always_could() -> None:
    """Client and server have these limits by default, each in its own process, which may be of another release."""
    assert FrameLimits() == FrameLimits(requests=4096, tokens=1_048_576, k=1024, frame_bytes=268_435_456)


def test_what_is_asked_may_be_written_to_and_what_is_said_is_not_copied() -> None:
    for request in decode_question(encode_question(question(4)), LIMITS).requests:
        assert request.context_ids.flags.writeable and request.token_ids.flags.writeable
    frame = encode_reply(reply(4))
    bytes_of_it = np.frombuffer(frame, np.uint8)
    for scores in (scores for answer in decode_reply(frame, LIMITS).answers for scores in answer):
        assert isinstance(scores, TokenScores)
        logprobs = np.asarray(scores.logprobs)
        assert not logprobs.flags.writeable
        assert not len(logprobs) or np.shares_memory(logprobs, bytes_of_it)


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.booleans())
def test_an_answer_is_as_large_as_was_foretold(seed: int, count: int, narrow: bool) -> None:
    asked, width = question(seed, count).requests, 3
    random, made = np.random.default_rng(seed), list[tuple[TokenScores, ...]]()

    def said(kind: Any, tokens: int) -> TokenScores:
        logprobs = bits(random, (tokens,), np.float32)
        if isinstance(kind, LastHidden):
            rows = bits(random, (tokens, width), np.uint16 if narrow else np.float32)
            return HiddenScores(logprobs=logprobs, hidden=RemoteRows(pieces=((rows, np.arange(tokens)),)))
        if isinstance(kind, SampledToken):
            return TokenScores(logprobs=logprobs)
        k = kind.axes["K"]
        values = bits(random, (tokens, k), np.float32)
        return TopKScores(logprobs=logprobs, topk_ids=ids(random, (tokens, k)), topk_logprobs=values)

    for request in asked:
        made.append(tuple(said(kind, len(request.token_ids)) for kind in request.kinds))
    digests, kinds = tuple(request_digest(r) for r in asked), tuple(tuple(map(type, r.kinds)) for r in asked)
    frame = encode_reply(Reply(call=CALL, model=MODEL, digests=digests, kinds=kinds, answers=tuple(made)))
    hidden = width * (2 if narrow else 4)
    assert check_answer(asked, replace(LIMITS, frame_bytes=len(frame)), hidden) == len(frame)
    with pytest.raises(TooLarge):
        check_answer(asked, replace(LIMITS, frame_bytes=len(frame) - 1), hidden)
