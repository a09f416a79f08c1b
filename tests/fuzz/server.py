"""Hostile bodies and connections against the teacher's server, while a good client asks it.

    python -m tests.fuzz.server [bodies=5000] [connections=500] [seed=0]

Prints what each kind of body was answered with, how the connections ended, and what must be 0: answers that are wrong,
statuses of 500 and more, stack traces and lines of the log too many or too few, questions of a good client that were
not answered within 5 s while nobody but strangers was hostile, connections that stayed open.
"""

import asyncio
import gzip
import logging
import random
import resource
import sys
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import xxhash

from opd.ports import AtIds, LastHidden, SampledToken, ScoreAnswer, ScoreKind, ScoreRequest, TopK
from opd.ports.score_kinds import BUILT_IN
from opd.settings.secret import Secret
from opd.types import HiddenScores, RemoteRows, Scores, TokenScores, TopKScores
from teacher_service.frames import DIGEST_BYTES, FrameLimits, Question, decode_reply, encode_question, request_digest
from teacher_service.scoring import Bounds
from teacher_service.server import ServerConfig, TeacherServer
from teacher_service.server_identity import Identity

TOKEN = "a-token-of-the-fuzzed-server"
ROWS, WIDTH = 64, 8
LIMITS = FrameLimits(requests=8, tokens=400, k=8, frame_bytes=20_000)
QUICK = {"idle_s": 0.5, "body_s": 1.0, "answer_s": 1.0, "least_rate": 4000.0, "hidden_bytes": 4 * WIDTH}
ANSWER_S = 5.0  # what a good client waits for an answer
OURS = {200, 400, 401, 404, 405, 408, 413, 417, 422, 429}  # statuses that a hostile body may get
AT_ONCE = 16


class PlainTeacher:
    """`opd.ports.LogprobTeacher` that answers from the ids alone, at once."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        Bounds(vocabulary=ROWS, longest=200, max_k=LIMITS.k, limits="the fuzz").check(requests)
        return [tuple(_answered(request, kind) for kind in request.kinds) for request in requests]


def _answered(request: ScoreRequest, kind: ScoreKind[Scores]) -> TokenScores:
    written = -1.0 - request.token_ids.astype(np.float32)
    tokens = len(written)
    match kind:
        case TopK(k=k):
            ids = np.tile(np.arange(k, dtype=np.int32), (tokens, 1))
            return TopKScores(logprobs=written, topk_ids=ids, topk_logprobs=-1.0 - ids.astype(np.float32))
        case AtIds(ids=ids):
            return TopKScores(logprobs=written, topk_ids=ids, topk_logprobs=-1.0 - ids.astype(np.float32))
        case LastHidden():
            states = np.ones((tokens, WIDTH), np.float32)
            return HiddenScores(logprobs=written, hidden=RemoteRows(pieces=((states, np.arange(tokens)),)))
        case _:
            return TokenScores(logprobs=written)


def make_server(**fields: float) -> TeacherServer:
    """A server over `PlainTeacher` that loses patience soon; not yet started."""
    names = tuple(kind.wire_name() for kind in BUILT_IN)
    known = Identity(model="ab" * 16, vocabulary="fuzz", rows=ROWS, dtype="float32", supports=names, limits=LIMITS)
    config: dict[str, float] = {**QUICK, "connections": 128, **fields}
    return TeacherServer(PlainTeacher(), known, ServerConfig(port=0, token=Secret(TOKEN), **config))  # pyright: ignore


class Watch(logging.Handler):
    """What the log gets: lines about refusals, and stack traces, which it must never get."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals, self.traces = 0, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Count one record."""
        text = record.getMessage()
        if record.exc_info or "Traceback" in text or "\n" in text:
            self.traces.append(f"{text} {record.exc_info}")
        self.refusals += text.startswith("refused ")


@contextmanager
def watched() -> Iterator[Watch]:
    """The log of everything while the server is attacked; nothing of it is printed."""
    watch, root = Watch(), logging.getLogger()
    silent = [h for h in root.handlers if not isinstance(h, Watch)]
    for handler in silent:
        root.removeHandler(handler)
    root.addHandler(watch)
    try:
        yield watch
    finally:
        root.removeHandler(watch)
        for handler in silent:
            root.addHandler(handler)


# Bodies.


def a_request(rng: random.Random) -> ScoreRequest:
    """A valid request of one to three kinds."""
    tokens = rng.randint(1, 12)
    ids = np.asarray([[rng.randrange(ROWS) for _ in range(3)] for _ in range(tokens)], np.int32)
    every = [SampledToken(), TopK(k=rng.randint(1, 8)), AtIds(ids=ids), LastHidden()]
    return ScoreRequest(
        context_ids=np.asarray([rng.randrange(ROWS) for _ in range(rng.randint(1, 12))], np.int32),
        token_ids=np.asarray([rng.randrange(ROWS) for _ in range(tokens)], np.int32),
        kinds=tuple(rng.sample(every, rng.randint(1, 3))),
    )


def a_question(rng: random.Random) -> Question:
    """A valid question."""
    return Question(call=rng.randbytes(16), requests=tuple(a_request(rng) for _ in range(rng.randint(1, 4))))


def _fitting(frame: bytes) -> bytes:
    """A frame with the digest that belongs to its bytes."""
    return frame[:-DIGEST_BYTES] + xxhash.xxh3_128_digest(frame[:-DIGEST_BYTES])


def _flipped(rng: random.Random, frame: bytes) -> bytes:
    spoilt = bytearray(frame)
    for _ in range(rng.randint(1, 8)):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def _number(rng: random.Random, frame: bytes) -> bytes:
    """Another number, mostly a large one, where a length, a kind, a count or an id stands."""
    spoilt = bytearray(frame)
    at = 4 * rng.randrange(len(spoilt) // 4)
    spoilt[at : at + 4] = rng.choice([0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, rng.getrandbits(32)]).to_bytes(4, "little")
    return bytes(spoilt)


def _cut(rng: random.Random, frame: bytes) -> bytes:
    return frame[: rng.randrange(len(frame))]


FRAMES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "whole": lambda _, frame: frame,
    "bits": _flipped,
    "bits, digest fits": lambda rng, frame: _fitting(_flipped(rng, frame)),
    "number, digest fits": lambda rng, frame: _fitting(_number(rng, frame)),
    "cut": _cut,
    "cut, digest fits": lambda rng, frame: _fitting(_cut(rng, frame) + bytes(DIGEST_BYTES)),
    "longer": lambda rng, frame: _fitting(frame + rng.randbytes(rng.randint(1, 400))),
    "noise": lambda rng, _: rng.randbytes(rng.randint(0, 600)),
    "too long": lambda rng, _: rng.randbytes(LIMITS.frame_bytes + rng.randint(1, 4000)),
    "text": lambda rng, _: rng.choice([b"", b"{}", b"null", b"<a/>", b"\x80\x04N.", b"\xff" * 90]),
}
ENCODINGS = [
    "gzip",
    "deflate",
    "br",
    "zstd",
    "identity",
    "Gzip",
    "x-gzip",
    "gzip, gzip",
    "\u00e9",
    "a" * 300,
    "compress",
]


WRONG_TOKENS = [f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "", "Bearer", "Bearer \u00e9"]
ODD = ["\x01", "y" * 9000, "upgrade"]


def _headers(rng: random.Random, body: bytes) -> tuple[dict[str, str], bytes, str]:
    """What is said about a body: the truth, or one of many lies; the last part names which."""
    said = {"Authorization": f"Bearer {TOKEN}", "Content-Length": str(len(body))}
    lie = rng.choice(
        ["none", "none", "none", "encoding", "encoded", "token", "length", "chunks", "path", "expect", "odd"]
    )
    if lie == "encoding":
        said["Content-Encoding"] = rng.choice(ENCODINGS)
    elif lie == "encoded":
        body, name = rng.choice([(gzip.compress(body), "gzip"), (zlib.compress(body), "deflate")])
        said |= {"Content-Encoding": name, "Content-Length": str(len(body))}
    elif lie == "token":
        wrong = [
            f"Bearer {TOKEN[:-1]}",
            f"Bearer {TOKEN}x",
            f"Basic {TOKEN}",
            "",
            "Bearer",
            "Bearer \u00e9\u00e9",
            TOKEN,
        ]
        said["Authorization"] = rng.choice(wrong)
    elif lie == "length":
        said["Content-Length"] = rng.choice(["-1", "x", "1" * 30, str(len(body) // 2), "0", "9" * 4])
    elif lie == "chunks":
        del said["Content-Length"]
        said["Transfer-Encoding"] = rng.choice(["chunked", "chunked", "gzip", "chunked, chunked", "identity"])
        body = rng.choice([_chunked(rng, body), b"zz\r\n" + body, b"ffffffffffff\r\n" + body, _chunked(rng, body)[:-3]])
    elif lie == "expect":
        said["Expect"] = rng.choice(["100-continue", "200-ok"])
    elif lie == "odd":
        said[rng.choice(["X" * 9000, "Host", "Content-Type", "Connection"])] = rng.choice(
            ["\x01", "y" * 9000, "upgrade"]
        )
    return said, body, lie


def _chunked(rng: random.Random, body: bytes) -> bytes:
    parts, at = [], 0
    while at < len(body):
        size = rng.randint(1, 4000)
        parts.append(b"%x\r\n%s\r\n" % (len(body[at : at + size]), body[at : at + size]))
        at += size
    return b"".join([*parts, b"0\r\n\r\n"])


LINES = ["POST /v1/score HTTP/1.1", "GET /v1/score HTTP/1.1", "POST /v1/identity HTTP/1.1", "DELETE / HTTP/1.1"]
STRANGE = [
    "POST /v1/score HTTP/9.9", "POST /v1/score", "\x16\x03\x01\x02", "PRI * HTTP/2.0", "POST http://[/ HTTP/1.1",
    "POST /../../etc/passwd HTTP/1.1", "POST /v1/score?a=%00 HTTP/1.0", f"GET /{'a' * 9000} HTTP/1.1", "A B C D",
    "CONNECT x:1 HTTP/1.1", "POST  /v1/score  HTTP/1.1", "GET /v1/\u00e9 HTTP/1.1",
]  # fmt: skip


def a_body(rng: random.Random) -> tuple[str, bytes, Question | None]:
    """A kind, what is sent, and the question if it must be answered."""
    question, kind = a_question(rng), rng.choice(list(FRAMES))
    frame = FRAMES[kind](rng, encode_question(question))
    said, body, lie = _headers(rng, frame)
    line = LINES[0] if lie != "path" else rng.choice(LINES[1:] + STRANGE)
    good = kind == "whole" and (lie in ("none", "expect") or said.get("Content-Encoding") == "identity")
    if said.get("Expect") == "200-ok":
        good = False
    head = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "x"} | said | {"Connection": "close"}).items())
    return f"{kind} / {lie}", f"{line}\r\n{head}\r\n".encode() + body, question if good else None


async def exchange(port: int, sent: bytes) -> tuple[int, bytes]:
    """The status (0: the connection ended without one) and body of the last answer to what was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with suppress(ConnectionError):
            writer.write(sent)
            await writer.drain()
        came = bytearray()
        with suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                came += piece
    finally:
        writer.close()
    said = bytes(came)
    while said.startswith(b"HTTP/1.1 100"):
        said = said.partition(b"\r\n\r\n")[2]
    head, _, body = said.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head.startswith(b"HTTP/1.") else 0), body


def posted(question: Question) -> bytes:
    """A question as a good client sends it."""
    frame = encode_question(question)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(frame)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + frame


def is_right(question: Question, status: int, body: bytes) -> bool:
    """Is this the answer to that question?"""
    if status != 200:
        return False
    reply = decode_reply(body, LIMITS)
    same = reply.call == question.call and reply.digests == tuple(request_digest(r) for r in question.requests)
    said = [scores for answer in reply.answers for scores in answer]
    expected = [_answered(request, kind) for request in question.requests for kind in request.kinds]
    return same and [_sum(scores) for scores in said] == [_sum(scores) for scores in expected]


def _sum(scores: Scores) -> float:
    assert isinstance(scores, TokenScores)
    return float(np.asarray(scores.logprobs).sum())


# Connections.


async def _said(port: int, first: bytes, drip: bytes = b"", every_s: float = 0.1) -> None:
    """Say `first`, then `drip` byte after byte for ever, until the server ends it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(first)
        await writer.drain()
        ended = asyncio.ensure_future(_until_closed(reader))
        while drip and not ended.done():
            writer.write(drip)
            await writer.drain()
            await asyncio.wait([ended], timeout=every_s)
        await ended
    except ConnectionError:
        pass
    finally:
        writer.close()


async def _until_closed(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


async def _unread(port: int) -> None:
    """Ask 40 times, and read nothing of what is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    writer.write(posted(a_question(random.Random(0))).replace(b"close", b"keep-alive") * 40)
    with suppress(ConnectionError):
        await writer.drain()
    await asyncio.sleep(QUICK["answer_s"])
    await _until_closed(reader)
    writer.close()


SCORE = b"POST /v1/score HTTP/1.1\r\nHost: x\r\n"
ALLOWED = SCORE + f"Authorization: Bearer {TOKEN}\r\n".encode()
IDENTITY = ALLOWED.replace(b"POST /v1/score", b"GET /v1/identity") + b"\r\n"
_Attack = Callable[[int], Awaitable[None]]
STRANGERS: dict[str, _Attack] = {
    "says nothing": lambda port: _said(port, b""),
    "half a line": lambda port: _said(port, b"POST /v1/sc"),
    "slow headers": lambda port: _said(port, SCORE, b"X: y\r\n"),
    "one slow header": lambda port: _said(port, SCORE + b"X-Long: ", b"z"),
    "no token, slow body": lambda port: _said(port, SCORE + b"Content-Length: 9999\r\n\r\n", b"b"),
    "no token, stays": lambda port: _said(port, SCORE + b"Content-Length: 0\r\n\r\n"),
    "no token, chunks": lambda port: _said(port, SCORE + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nb\r\n"),
    "many requests": lambda port: _said(port, (SCORE + b"Content-Length: 0\r\n\r\n") * 300),
}
HOLDERS: dict[str, _Attack] = {
    "token, slow body": lambda port: _said(port, ALLOWED + b"Content-Length: 9999\r\n\r\n", b"b"),
    "token, no body": lambda port: _said(port, ALLOWED + b"Content-Length: 9999\r\n\r\n"),
    "token, slow chunks": lambda port: _said(port, ALLOWED + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nb\r\n"),
    "token, stays": lambda port: _said(port, IDENTITY),
    "token, reads nothing": _unread,
}


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of it."""

    bodies: Counter[str] = field(default_factory=Counter)  # "kind: status"
    wrong: list[str] = field(default_factory=list)  # answers and statuses that must not be
    refused: int = 0  # answers by ourselves with a status of 400 and more
    lines: int = 0  # of the log about them
    traces: list[str] = field(default_factory=list)
    good: int = 0  # questions of a good client while connections were hostile
    locked_out: int = 0  # of those, not answered
    slowest_s: float = 0.0
    open_after: int = 0  # connections that are open when all should have ended
    connections: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        """Nothing happened that must not."""
        return not (self.wrong or self.traces or self.locked_out or self.open_after or self.lines < self.refused)


async def send_bodies(port: int, count: int, rng: random.Random, result: Result) -> None:
    """`count` bodies, a few at once; fills `result`."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(kind: str, sent: bytes, question: Question | None) -> None:
        async with gate:
            try:
                async with asyncio.timeout(30):
                    status, body = await exchange(port, sent)
            except TimeoutError:
                status, body = -1, b""
        result.bodies[f"{kind}: {status}"] += 1
        result.refused += status >= 400
        if question is not None and not is_right(question, status, body):
            result.wrong.append(f"{kind}: a good question got {status} {body[:80]!r}")
        elif status not in OURS | {0} or b"Traceback" in body:
            result.wrong.append(f"{kind}: {status} {body[:80]!r}")

    for _ in range(0, count, 500):
        await asyncio.gather(*[one(*a_body(rng)) for _ in range(min(500, count))])


async def attack(port: int, count: int, kinds: dict[str, _Attack], rng: random.Random, result: Result) -> None:
    """`count` hostile connections at once, and a good client that asks all the while; ends when all have ended."""
    names = [list(kinds)[i % len(kinds)] for i in range(count)]
    result.connections.update(names)
    attacks = [asyncio.ensure_future(_tried(kinds[name], port)) for name in names]
    while not all(one.done() for one in attacks):
        question, began = a_question(rng), perf_counter()
        try:
            async with asyncio.timeout(ANSWER_S):
                right = is_right(question, *await exchange(port, posted(question)))
        except (TimeoutError, OSError):
            right = False
        result.good += 1
        result.locked_out += not right
        result.slowest_s = max(result.slowest_s, perf_counter() - began)
        await asyncio.wait(attacks, timeout=0.05)
        if perf_counter() - began > 60:
            break
    result.open_after += sum(not one.done() for one in attacks)
    for one in attacks:
        one.cancel()


async def _tried(attack: _Attack, port: int) -> None:
    with suppress(OSError):
        await asyncio.wait_for(attack(port), 60)


async def fuzz(bodies: int, connections: int, seed: int, keeps: int = 128) -> Result:
    """The whole: bodies, connections of strangers to a server that `keeps` so many, and of token holders."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    result, rng, server = Result(), random.Random(seed), make_server(connections=keeps)
    with watched() as watch:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: watch.traces.append(str(context)))
        port = int((await server.start()).rsplit(":", 1)[1])
        await send_bodies(port, bodies, rng, result)
        result.lines = watch.refusals
        await attack(port, connections, STRANGERS, rng, result)
        await attack(port, max(1, connections // 10), HOLDERS, rng, result)
        await server.close()
        loop.set_exception_handler(None)
        result.traces = watch.traces
    return result


def main(arguments: Sequence[str]) -> int:
    """Print the figures; 1 if anything happened that must not."""
    given = dict(a.split("=", 1) for a in arguments)
    began = perf_counter()
    result = asyncio.run(
        fuzz(int(given.get("bodies", 5000)), int(given.get("connections", 500)), int(given.get("seed", 0)))
    )
    by_status = Counter[str]()
    for kind, count in result.bodies.items():
        by_status[kind.rsplit(": ", 1)[1]] += count
    print(f"bodies {sum(by_status.values())}, by status {dict(sorted(by_status.items()))}; wrong {len(result.wrong)}")
    print(f"refusals {result.refused}, lines of the log about them {result.lines}; stack traces {len(result.traces)}")
    print(f"hostile connections {sum(result.connections.values())}, open after their time {result.open_after}")
    print(f"questions of a good client meanwhile {result.good}, locked out {result.locked_out}, ", end="")
    print(f"slowest answer {result.slowest_s:.2f} s; {perf_counter() - began:.0f} s in all")
    for line in (*result.wrong[:10], *result.traces[:10]):
        print(f"  {line}")
    return 0 if result.clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
