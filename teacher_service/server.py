"""A teacher behind HTTP: binary frames in, binary frames out, nothing without the token.

`GET /v1/identity` says which model it is, `POST /v1/score` scores a frame (`teacher_service/frames.py`). Refusals are
one sentence of plain text, and one line of the log: 401 token, 400 damaged frame or an encoding, 408 a body that does
not come, 413 too many bytes, requests or tokens (of the question, or of what it asks for), 422 ids out of range or too
many log-probabilities per token, 429 too much at once, 500 a model that answers nonsense, 503 no answer in time. No
stack trace leaves the process.

A client cannot hold it up: a connection that sends no request ends after `idle_s`, a transfer slower than `least_rate`
ends, and of too many connections the oldest without a token end (`teacher_service/connections.py`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import LogprobTeacher, ScoreAnswer, ScoreRequest
from opd.settings.secret import Secret
from teacher_service.config import TOKEN_VARIABLE
from teacher_service.connections import Budget, Connections, Reservation, TransferPace, quiet_logger
from teacher_service.frames import (
    FrameError,
    Reply,
    TooDeep,
    TooLarge,
    check_answer,
    decode_question,
    encode_reply,
    request_digest,
)
from teacher_service.known_kinds import OWN_KINDS, KnownKinds
from teacher_service.scoring import Unreadable
from teacher_service.server_identity import Identity

LOG = logging.getLogger("opd.teacher.server")
SHORTEST_TOKEN = 16
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PIECE = 1 << 20
CLOSING_S = 2.0  # what a refused peer still sends is read and thrown away so long, that it hears why
SAID = 300  # characters of a refusal in the log
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of the teacher's server: its address and its bounds.

    `pending` calls are scored at once and `connections` are open; `frames` whole frames are in memory, questions and
    answers. A question has `body_s` seconds to arrive and an answer `answer_s` to leave, and neither may be slower than
    `least_rate` bytes a second; a connection has `idle_s` to bring a request. `hidden_bytes` are those of one hidden
    state.
    """

    host: str = "127.0.0.1"
    port: int = 8300
    pending: int = 16
    connections: int = 512
    frames: int = 8
    body_s: float = 60.0
    answer_s: float = 120.0
    idle_s: float = 15.0
    least_rate: float = 32 << 10
    hidden_bytes: int = 4 * 8192
    token: Secret

    def __post_init__(self) -> None:
        if len(self.token) < SHORTEST_TOKEN or not self.token.reveal().isascii():
            raise ConfigurationError(
                f"the teacher server needs a token of at least {SHORTEST_TOKEN} ASCII characters in {TOKEN_VARIABLE}; "
                f"make one: export {TOKEN_VARIABLE}=$(openssl rand -hex 32)"
            )


class _Refused(Exception):
    """A call that is answered with `status` and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def _listening(protocol: Callable[[], asyncio.BaseProtocol], config: ServerConfig) -> asyncio.Server:
    try:
        return await asyncio.get_running_loop().create_server(protocol, config.host, config.port)
    except OSError as error:
        raise ConfigurationError(
            f"the teacher server cannot listen on {config.host}:{config.port} ({error.strerror}); choose another "
            "host= or port="
        ) from error


async def check_address(config: ServerConfig) -> None:
    """Raise `ConfigurationError` if a server could not listen there, which is known before a teacher is loaded."""
    (await _listening(asyncio.Protocol, config)).close()


class TeacherServer:
    """Serves `teacher` (which stores hidden states as the arrays themselves) until it is closed.

    `kinds` are the kinds of scores whose questions it reads; `identity` says their names.
    """

    def __init__(
        self, teacher: LogprobTeacher, identity: Identity, config: ServerConfig, kinds: KnownKinds = OWN_KINDS
    ) -> None:
        self._teacher, self._identity, self._config, self._kinds = teacher, identity, config, kinds
        self._model = bytes.fromhex(identity.model)
        self._open = 0
        self._budget = Budget(config.frames * identity.limits.frame_bytes)
        self._question_pace = TransferPace(seconds=config.body_s, rate=config.least_rate)
        self._answer_pace = TransferPace(seconds=config.answer_s, rate=config.least_rate)
        self._runner: web.AppRunner | None = None
        self._connections: Connections | None = None
        self._listening: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen; returns the URL (`port=0` takes a free one)."""
        app = web.Application(client_max_size=self._identity.limits.frame_bytes, middlewares=[self._guard])
        app.router.add_get("/v1/identity", self._identify, expect_handler=_expected)
        app.router.add_post("/v1/score", self._score, expect_handler=_expected)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=quiet_logger(),
            auto_decompress=False,
            keepalive_timeout=self._config.idle_s,
            lingering_time=CLOSING_S,
            shutdown_timeout=CLOSING_S,
        )
        await self._runner.setup()
        assert self._runner.server is not None
        self._connections = Connections(self._runner.server, self._config.connections)
        self._listening = await _listening(self._connections, self._config)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"http://{host}:{self._listening.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Stop listening and drop open calls."""
        if self._listening is not None:
            self._listening.close()
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            self._admit(request)
            return await handler(request)
        except _Refused as error:
            return _refusal(request, error.status, str(error))
        except web.HTTPException as error:
            return _refusal(request, error.status, error.reason)
        except (TooDeep, Unreadable) as error:
            return _refusal(request, 422, str(error))
        except TooLarge as error:
            return _refusal(request, 413, str(error))
        except FrameError as error:
            return _refusal(request, 400, str(error))
        except DataError as error:
            return _refusal(request, 500, str(error))
        except OpdError as error:
            return _refusal(request, 503, str(error))
        except Exception:
            LOG.exception("a call failed")
            return _refusal(request, 500, "the teacher failed; its own log says why")

    def _admit(self, request: web.Request) -> None:
        """Refuse a request without the token, or one that cannot be read, before any of its body is read."""
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        scheme, _, token = given.partition(b" ")
        if not (self._config.token.matches(token) and scheme == b"Bearer"):
            raise _Refused(401, f"this teacher needs its token; set {TOKEN_VARIABLE}")
        assert self._connections is not None
        self._connections.trust(request)
        encodings = ",".join(request.headers.getall("Content-Encoding", [])).strip().lower()
        if encodings not in ("", "identity"):
            raise _Refused(
                400, f"the body is encoded ({encodings[:40]!r}), but frames are taken as they are; send it so"
            )
        if request.headers.get("Expect", "100-continue").lower() != "100-continue":
            raise _Refused(417, "nothing but 100-continue can be expected of this server")
        if (request.content_length or 0) > self._identity.limits.frame_bytes:
            raise self._too_large(request.content_length or 0)

    def _too_large(self, nbytes: int) -> TooLarge:
        most = self._identity.limits.frame_bytes
        return TooLarge(f"a frame has {nbytes} bytes or more, but {most} are allowed; send fewer requests")

    async def _identify(self, request: web.Request) -> web.Response:
        return web.Response(text=self._identity.to_json(), content_type="application/json")

    async def _score(self, request: web.Request) -> web.StreamResponse:
        with self._budget.held() as held:
            asked = decode_question(await self._read(request, held), self._identity.limits, self._kinds)
            _taken(held, check_answer(asked.requests, self._identity.limits, self._config.hidden_bytes))
            digests = tuple(request_digest(r) for r in asked.requests)
            answers = await self._scored(asked.requests)
            kinds = tuple(tuple(type(kind) for kind in r.kinds) for r in asked.requests)
            reply = Reply(call=asked.call, model=self._model, digests=digests, kinds=kinds, answers=tuple(answers))
            return await self._send(request, await asyncio.to_thread(encode_reply, reply))

    async def _scored(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreAnswer]:
        if self._open >= self._config.pending:
            raise _Refused(429, f"{self._open} calls are open; come again")
        self._open += 1
        try:
            return await self._teacher.score(requests)
        finally:
            self._open -= 1

    async def _read(self, request: web.Request, held: Reservation) -> bytes:
        """The body, as long as it comes fast enough; what is read counts as it comes, and not what was promised."""
        pieces, nbytes, began = list[bytes](), 0, asyncio.get_running_loop().time()
        try:
            if "Expect" in request.headers:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # none of it belongs to the answer
            while True:
                async with self._question_pace.within(began, nbytes):
                    piece = await request.content.readany()
                if not piece:
                    return b"".join(pieces)
                nbytes += len(piece)
                if nbytes > self._identity.limits.frame_bytes:
                    raise self._too_large(nbytes)
                _taken(held, len(piece))
                pieces.append(piece)
        except TimeoutError:
            raise _Refused(
                408,
                f"{nbytes} bytes of the body came, too slowly (all within {self._config.body_s:g} s, at least "
                f"{self._config.least_rate:g} bytes a second); send it again",
            ) from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise _Refused(400, f"the body is no HTTP body ({type(error).__name__}); send it again") from error
        except ConnectionError:
            raise _Refused(400, f"the connection ended after {nbytes} bytes of the body") from None

    async def _send(self, request: web.Request, frame: bytes) -> web.StreamResponse:
        """Send a frame to a peer that takes it fast enough; a slow one loses its connection."""
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = len(frame)
        began, view = asyncio.get_running_loop().time(), memoryview(frame)
        try:
            async with self._answer_pace.within(began, 0):
                await response.prepare(request)
            for at in range(0, len(frame), PIECE):
                async with self._answer_pace.within(began, at):
                    await response.write(view[at : at + PIECE])
            async with self._answer_pace.within(began, len(frame)):
                await response.write_eof()
        except (TimeoutError, ConnectionError):
            LOG.warning("an answer of %d bytes was not taken by %s in time", len(frame), request.remote)
            request.protocol.force_close()
        return response


async def _expected(_: web.Request) -> None:
    """No answer to `Expect: 100-continue` here: a client may go on only after its token was checked."""


def _taken(held: Reservation, nbytes: int) -> None:
    if not held.take(nbytes):
        raise _Refused(429, "as much as fits into memory is on its way already; come again")


def _refusal(request: web.Request, status: int, reason: str) -> web.Response:
    sentence = " ".join(reason.split())
    LOG.warning("refused %s: %d %s", request.remote, status, sentence[:SAID])
    response = web.Response(status=status, text=sentence)
    if status == 429:
        response.headers["Retry-After"] = "1"
    if status in (400, 401, 408, 413):
        response.force_close()
    return response
