"""The teacher's server when it is not asked as it should be: refused at once, in one line, and nobody shut out."""

import asyncio
import logging
import pickle
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import LastHidden, ScoreRequest, TopK
from opd.settings.secret import HIDDEN, Secret, logins, without_logins
from opd.types import HiddenScores, RemoteRows
from teacher_service import connections, server
from teacher_service.backends.http import WIDEST_HIDDEN
from teacher_service.connections import Budget, TransferPace
from teacher_service.frames import FrameLimits, Question, TooLarge, answer_bytes, check_answer, encode_question
from teacher_service.server import ServerConfig, TeacherServer
from tests.fuzz.server import (
    ALLOWED,
    LIMITS,
    SCORE,
    TOKEN,
    PlainTeacher,
    Result,
    exchange,
    fuzz,
    is_right,
    make_server,
    posted,
)

TEN = np.arange(1, 11, dtype=np.int32)


@pytest.fixture
def asked() -> Callable[..., Any]:
    """Runs `work(port)` against a server with these settings."""

    def run(work: Callable[[int], Awaitable[Any]], **fields: float) -> Any:
        async def serve() -> Any:
            server = make_server(**fields)
            port = int((await server.start()).rsplit(":", 1)[1])
            try:
                return await asyncio.wait_for(work(port), 20)
            finally:
                await server.close()

        return asyncio.run(serve())

    return run


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("opd.teacher.server")]


def test_a_slice_of_the_fuzz() -> None:
    """`python -m tests.fuzz.server` is the whole. 32 connections against a server that keeps 16."""
    result: Result = asyncio.run(fuzz(bodies=60, connections=32, seed=7, keeps=16))
    assert result.clean, result
    assert sum(result.bodies.values()) == 60 and result.refused > 30 and result.good > 5


@pytest.mark.parametrize("encoding", ["gzip", "br", "x-gzip", "gzip, gzip", "snappy", "GZIP"])
def test_an_encoding_is_refused_before_the_body_is_read(asked: Any, caplog: Any, encoding: str) -> None:
    """None of it is sent, and the answer comes all the same."""
    head = ALLOWED + f"Content-Encoding: {encoding}\r\nContent-Length: 9000\r\n\r\n".encode()
    began = perf_counter()
    status, said = asked(lambda port: exchange(port, head), body_s=10, idle_s=10)
    assert status == 400 and b"is encoded" in said and perf_counter() - began < 5
    assert len(lines(caplog)) == 1


def test_nobody_is_told_to_go_on_before_the_token_is_seen(asked: Any) -> None:
    async def first(port: int, head: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"Expect: 100-continue\r\nContent-Length: 90\r\n\r\n")
        line = await reader.readline()
        writer.close()
        return line

    assert b" 401 " in asked(lambda port: first(port, SCORE))
    assert b" 100 " in asked(lambda port: first(port, ALLOWED))


def test_what_is_asked_for_is_bounded_like_the_question(asked: Any, caplog: Any) -> None:
    hidden = ScoreRequest(context_ids=TEN, token_ids=TEN, kinds=(LastHidden(),))
    question = Question(call=bytes(16), requests=(hidden,))
    assert is_right(question, *asked(lambda port: exchange(port, posted(question))))
    status, said = asked(lambda port: exchange(port, posted(question)), hidden_bytes=LIMITS.frame_bytes)
    assert status == 413 and b"the answer would have" in said
    assert lines(caplog) == [f"refused 127.0.0.1: 413 {said.decode()}"]


def test_an_answer_has_the_size_that_was_foretold() -> None:
    deep = ScoreRequest(context_ids=TEN, token_ids=TEN, kinds=(TopK(k=8),))
    # its row, its digest, its code, two sizes; written, the rest, the support
    assert answer_bytes(deep, 0) == 8 + 16 + 4 + 16 + 10 * (4 + 4 + 8 * 8)
    with pytest.raises(TooLarge, match="lower k"):
        check_answer([deep] * 9, FrameLimits(frame_bytes=6000), 0)


def test_questions_and_answers_share_one_budget() -> None:
    budget = Budget(100)
    with budget.held() as one, budget.held() as other:
        assert one.take(60) and not other.take(41) and other.take(40) and not one.take(1)
    with budget.held() as again:
        assert again.take(100)


def test_no_more_calls_are_scored_at_once_than_are_pending(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question(call=bytes(16), requests=(ScoreRequest(context_ids=TEN, token_ids=TEN, kinds=(TopK(k=2),)),))
    score = PlainTeacher.score

    async def slow(teacher: PlainTeacher, requests: Any) -> Any:
        await asyncio.sleep(0.2)
        return await score(teacher, requests)

    monkeypatch.setattr(PlainTeacher, "score", slow)

    async def work(port: int) -> list[int]:
        several = [exchange(port, posted(question)) for _ in range(5)]
        first = [status for status, _ in await asyncio.gather(*several)]
        return [*sorted(first), (await exchange(port, posted(question)))[0]]  # places are given back

    assert asked(work, pending=2) == [200, 200, 429, 429, 429, 200]


def test_a_body_of_no_announced_length_is_read_up_to_the_limit(asked: Any) -> None:
    head, piece = ALLOWED + b"Transfer-Encoding: chunked\r\n\r\n", b"x" * 65536
    chunks = b"10000\r\n" + piece + b"\r\n"
    body = chunks * (LIMITS.frame_bytes // len(piece) + 2)  # and no end: the rest is not waited for
    status, said = asked(lambda port: exchange(port, head + body), body_s=2, idle_s=10)
    assert status == 413 and b"are allowed" in said


@pytest.mark.parametrize(("length", "enough"), [(0, False), (15, False), (16, True), (40, True)])
def test_a_token_is_as_long_as_it_must_be(length: int, enough: bool) -> None:
    if enough:
        assert ServerConfig(port=0, token=Secret("t" * length)).port == 0
        return
    with pytest.raises(ConfigurationError, match="at least 16 ASCII characters"):
        ServerConfig(port=0, token=Secret("t" * length))


@pytest.mark.parametrize(("moved", "within_s"), [(0, 5.0), (1000, 15.0), (100_000, 60.0)])
def test_a_transfer_may_be_as_slow_as_its_pace(moved: int, within_s: float) -> None:
    async def deadline() -> float | None:
        return TransferPace(seconds=60.0, rate=100.0).within(7.0, moved).when()

    assert asyncio.run(deadline()) == 7.0 + within_s


def test_a_body_that_comes_steadily_has_all_its_time(asked: Any) -> None:
    """Slower than the grace of its beginning, and faster than the least rate."""
    question = Question(call=bytes(16), requests=(ScoreRequest(context_ids=TEN, token_ids=TEN, kinds=(TopK(k=2),)),))
    sent = posted(question)

    async def work(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for at in range(0, len(sent), 40):
            writer.write(sent[at : at + 40])
            await asyncio.sleep(0.03)
        line = await reader.readline()
        writer.close()
        return line

    assert b" 200 " in asked(work, body_s=10, least_rate=1)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("over", "status"), [(0, 400), (1, 413)])
def test_a_body_may_have_as_many_bytes_as_a_frame_and_no_more(
    asked: Any, announced: bool, over: int, status: int
) -> None:
    """At the limit it is read, and turns out to be no frame."""
    body = bytes(LIMITS.frame_bytes + over)
    if announced:
        sent = ALLOWED + b"Content-Length: %d\r\n\r\n" % len(body) + (b"" if over else body)  # refused unread
    else:
        sent = ALLOWED + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert asked(lambda port: exchange(port, sent), idle_s=10)[0] == status


async def twice(port: int, sent: bytes) -> tuple[int, dict[bytes, bytes], bool]:
    """Status and headers of what is answered, and whether a further question is on the same connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def answer() -> tuple[int, dict[bytes, bytes]]:
        head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in head[1:-2])
        await reader.readexactly(int(headers.get(b"Content-Length", b"0")))
        return int(head[0].split()[1]), headers

    try:
        writer.write(sent)
        status, headers = await answer()
        try:
            writer.write(ALLOWED.replace(b"POST /v1/score", b"GET /v1/identity") + b"\r\n")
            further = (await asyncio.wait_for(answer(), 5))[0] == 200
        except (asyncio.IncompleteReadError, ConnectionError):
            further = False
        return status, headers, further
    finally:
        writer.close()


def sized(body: bytes, head: bytes = ALLOWED) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


GOOD = Question(call=bytes(16), requests=(ScoreRequest(context_ids=TEN, token_ids=TEN, kinds=(TopK(k=2),)),))
FAR = replace(GOOD, requests=(ScoreRequest(context_ids=TEN + 60, token_ids=TEN, kinds=(TopK(k=2),)),))


@pytest.mark.parametrize(
    ("sent", "status", "goes_on"),
    [
        (sized(encode_question(GOOD)), 200, True),
        (sized(b"", SCORE), 401, False),  # of whom, and of what, nothing more is believed
        (sized(b"junk"), 400, False),
        (ALLOWED + b"Content-Length: 900\r\n\r\n", 408, False),
        (sized(bytes(LIMITS.frame_bytes + 1)), 413, False),
        (sized(b"", ALLOWED.replace(b"/v1/score", b"/v1/other")), 404, True),
        (sized(b"", ALLOWED.replace(b"POST", b"PUT")), 405, True),
        (sized(encode_question(FAR)), 422, True),
    ],
)
def test_a_connection_goes_on_after_a_refusal_unless_its_bytes_cannot_be_trusted(
    asked: Any, sent: bytes, status: int, goes_on: bool
) -> None:
    said, headers, further = asked(lambda port: twice(port, sent), body_s=0.3)
    assert (said, further) == (status, goes_on) and b"Retry-After" not in headers


def test_who_is_told_to_come_again_is_told_when(asked: Any) -> None:
    status, headers, further = asked(lambda port: twice(port, sized(encode_question(GOOD))), pending=0)
    assert (status, headers[b"Retry-After"], further) == (429, b"1", True)
    status, headers, _ = asked(lambda port: twice(port, sized(encode_question(GOOD))), frames=0)
    assert (status, headers[b"Retry-After"]) == (429, b"1")


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (DataError("it is naught " + "y" * 900), 500, b"it is naught yyy"),
        (OpdError("it is late " + "y" * 900), 503, b"it is late yyy"),
        (ZeroDivisionError("a secret of ours"), 500, b"its own log says why"),
    ],
)
def test_a_teacher_that_fails_is_one_line_for_the_client_and_a_short_one_for_the_log(
    asked: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int,
    says: bytes,
) -> None:  # fmt: skip
    async def fails(teacher: PlainTeacher, requests: Any) -> Any:
        raise error

    monkeypatch.setattr(PlainTeacher, "score", fails)
    got, said = asked(lambda port: exchange(port, posted(GOOD)))
    assert got == status and says in said and b"\n" not in said and b"secret" not in said
    refusal = lines(caplog)[-1]
    sentence = refusal.removeprefix(f"refused 127.0.0.1: {status} ")
    assert sentence == said.decode()[:300] and (len(said) > 900 or isinstance(error, ZeroDivisionError))


def test_an_answer_of_many_pieces_is_whole(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PIECE", 100)
    assert is_right(GOOD, *asked(lambda port: exchange(port, posted(GOOD))))


WIDE = 256 << 16  # bytes of an answer that the buffers between do not take, so that the server waits for its reader


def read_from_a_server_with_wide_answers(first_pause_s: float, every_pause_s: float, **fields: float) -> int:
    """How many bytes of such an answer come to a reader that pauses so before and while it reads."""
    plain = make_server(hidden_bytes=1 << 16, **fields)
    limits = replace(LIMITS, frame_bytes=2 * WIDE)
    made = TeacherServer(WideTeacher(), replace(plain._identity, limits=limits), plain._config)
    wide = ScoreRequest(context_ids=TEN, token_ids=np.ones(256, np.int32), kinds=(LastHidden(),))

    async def work() -> int:
        port = int((await made.start()).rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(posted(Question(call=bytes(16), requests=(wide,))))
        came, pause_s = 0, first_pause_s
        try:
            while True:
                await asyncio.sleep(pause_s)
                if not (piece := await reader.read(1 << 20)):
                    return came
                came, pause_s = came + len(piece), every_pause_s
        except ConnectionError:
            return came
        finally:
            writer.close()
            await made.close()

    return asyncio.run(asyncio.wait_for(work(), 20))


def test_an_answer_that_is_read_steadily_has_all_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the grace of its beginning, and comes faster than the least rate."""
    monkeypatch.setattr(connections, "GRACE_S", 0.3)
    assert read_from_a_server_with_wide_answers(0.0, 0.005, answer_s=10, least_rate=1 << 20) > WIDE


def test_an_answer_that_nobody_reads_any_more_ends() -> None:
    assert read_from_a_server_with_wide_answers(1.5, 0.0, answer_s=0.5, least_rate=1 << 10) < WIDE


class WideTeacher(PlainTeacher):
    """Has hidden states of 64 KiB."""

    async def score(self, requests: Any) -> Any:
        (request,) = requests
        rows = np.ones((len(request.token_ids), 1 << 14), np.float32)
        hidden = RemoteRows(pieces=((rows, np.arange(len(rows))),))
        return [(HiddenScores(logprobs=np.zeros(len(rows), np.float32), hidden=hidden),)]


def test_a_server_takes_by_default_what_its_clients_and_the_docs_count_on() -> None:
    made = ServerConfig(token=Secret(TOKEN))
    assert (made.host, made.port, made.pending, made.connections, made.frames) == ("127.0.0.1", 8300, 16, 512, 8)
    assert (made.body_s, made.answer_s, made.idle_s, made.least_rate) == (60, 120, 15, 32_768)
    assert made.hidden_bytes == WIDEST_HIDDEN == 32_768


def test_an_address_of_version_6_is_one_in_a_url() -> None:
    made = make_server()
    made._config = replace(made._config, host="::1")

    async def url() -> str:
        try:
            return await made.start()
        except ConfigurationError:
            pytest.skip("no IPv6 here")
        finally:
            await made.close()

    assert re.fullmatch(r"http://\[::1\]:\d+", asyncio.run(url()))


def test_slow_bodies_of_token_holders_take_no_place(asked: Any) -> None:
    """As many as there are places, and more: a good question is answered beside them."""

    async def work(port: int) -> tuple[bool, list[bytes]]:
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in slow:
            writer.write(ALLOWED + b"Content-Length: 900\r\n\r\nx")
        question = Question(
            call=bytes(16), requests=(ScoreRequest(context_ids=TEN, token_ids=TEN, kinds=(TopK(k=2),)),)
        )
        right = is_right(question, *await exchange(port, posted(question)))
        ends = [await reader.readline() for reader, _ in slow]
        for _, writer in slow:
            writer.close()
        return right, ends

    right, ends = asked(work, pending=2, body_s=0.5)
    assert right and all(b" 408 " in line for line in ends)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\r\n\r\n",
        b"POST /v1/score HTTP/9.9\r\n\r\n",
        b"A B C D\r\n\r\n",
        b"GET / HTTP/1.1\r\nX\r\n\r\n",
    ],
)
def test_what_is_no_http_is_one_line(asked: Any, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    caplog.set_level(logging.DEBUG)
    status, _ = asked(lambda port: exchange(port, sent))
    assert status == 400 and len(lines(caplog)) == 1 and "no HTTP" in lines(caplog)[0]
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("path", [b"/v1/score?token=%s", b"/%s"])
def test_no_refusal_repeats_what_was_sent(asked: Any, caplog: Any, path: bytes) -> None:
    sent = (
        b"POST " + path % TOKEN.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s1\r\n\r\n" % TOKEN.encode()
    )
    status, said = asked(lambda port: exchange(port, sent))
    assert status == 401 and TOKEN.encode() not in said and TOKEN not in caplog.text


@given(st.text(min_size=1), st.binary())
def test_a_secret_is_neither_shown_nor_stored_nor_sent(text: str, other: bytes) -> None:
    secret = Secret(text)
    assert f"{secret} {secret!r} {secret!s:>20} {[secret]}".count(HIDDEN) == 4
    assert secret.matches(text.encode("utf-8", "surrogatepass")) and secret.matches(other) == (other == text.encode())
    with pytest.raises(TypeError, match="neither stored nor sent"):
        pickle.dumps({"key": secret})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://user:word@host/", ["user:word"]),
        ("https://u:p@ss@host:1/x", ["u:p@ss"]),
        ("http://u:pa/ss@h", ["u:pa/ss"]),
        ("x http://u@h and s3://b:c@d", ["u", "b:c"]),
        ("https://:tok@h", [":tok"]),
        ("http://host/a@b", []),
        ("http://host:80/a@b", []),
        ("http://[::1]:80/a@b", []),
        ("http://host/x?y=a@b", []),
    ],
)
def test_logins_of_urls_are_found(text: str, found: list[str]) -> None:
    assert logins(text) == found
    assert without_logins(text).count(HIDDEN) == len(found)
    assert not any(login in without_logins(text) for login in found)


def test_a_server_says_where_it_cannot_listen() -> None:
    server: TeacherServer = make_server()
    server._config = replace(server._config, host="192.0.2.1")
    with pytest.raises(Exception, match=r"cannot listen on 192\.0\.2\.1"):
        asyncio.run(server.start())
