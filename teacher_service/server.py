"""A teacher behind HTTP: binary frames in, binary frames out, nothing without the token.

`GET /v1/identity` says which model it is, `POST /v1/score` scores a frame (`teacher_service/wire.py`). Refusals are
one sentence of plain text: 401 token, 400 damaged frame, 408 a body that does not come, 413 too many bytes, requests
or tokens, 422 ids out of range or too many log-probabilities per token, 429 too many calls at once, 500 a model that
answers nonsense, 503 no answer in time. No stack trace leaves the process.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import LogprobTeacher
from teacher_service.config import TOKEN_VARIABLE
from teacher_service.fingerprint import Identity
from teacher_service.reading import Unreadable
from teacher_service.wire import (
    FrameError,
    Reply,
    TooDeep,
    TooLarge,
    decode_question,
    encode_reply,
    request_digest,
)

LOG = logging.getLogger("opd.teacher.server")
SHORTEST_TOKEN = 16
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where it listens, and what it takes. `pending` calls may be open at once, `body_s` bounds reading one."""

    host: str = "127.0.0.1"
    port: int = 8300
    pending: int = 16
    body_s: float = 60.0
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.token) < SHORTEST_TOKEN or not self.token.isascii():
            raise ConfigurationError(
                f"the teacher server needs a token of at least {SHORTEST_TOKEN} ASCII characters in {TOKEN_VARIABLE}; "
                f"make one: export {TOKEN_VARIABLE}=$(openssl rand -hex 32)"
            )


class TeacherServer:
    """Serves `teacher` (which stores hidden states as the arrays themselves) until it is closed."""

    def __init__(self, teacher: LogprobTeacher, identity: Identity, config: ServerConfig) -> None:
        self._teacher, self._identity, self._config = teacher, identity, config
        self._model = bytes.fromhex(identity.model)
        self._open = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen; returns the URL (`port=0` takes a free one)."""
        app = web.Application(client_max_size=self._identity.limits.frame_bytes, middlewares=[self._guard])
        app.router.add_get("/v1/identity", self._say_who)
        app.router.add_post("/v1/score", self._score)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._config.host, self._config.port).start()
        except OSError as error:
            raise ConfigurationError(
                f"the teacher server cannot listen on {self._config.host}:{self._config.port} ({error.strerror}); "
                "choose another host= or port="
            ) from error
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"http://{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stop listening and drop open calls."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._config.token}".encode()):
            return _refusal(401, f"this teacher needs its token; set {TOKEN_VARIABLE}")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _refusal(error.status, error.reason)
        except (TooDeep, Unreadable) as error:
            return _refusal(422, str(error))
        except TooLarge as error:
            return _refusal(413, str(error))
        except FrameError as error:
            return _refusal(400, str(error))
        except DataError as error:
            return _refusal(500, str(error))
        except OpdError as error:
            return _refusal(503, str(error))
        except Exception:
            LOG.exception("a call failed")
            return _refusal(500, "the teacher failed; its own log says why")

    async def _say_who(self, request: web.Request) -> web.Response:
        return web.Response(text=self._identity.to_json(), content_type="application/json")

    async def _score(self, request: web.Request) -> web.Response:
        if self._open >= self._config.pending:
            refusal = _refusal(429, f"{self._open} calls are open; come again")
            refusal.headers["Retry-After"] = "1"
            return refusal
        self._open += 1
        try:
            return web.Response(body=await self._answer(request), content_type="application/octet-stream")
        finally:
            self._open -= 1

    async def _answer(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._config.body_s):
                body = await request.read()
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(reason=f"no whole body within {self._config.body_s:.0f} s") from error
        question = decode_question(body, self._identity.limits)
        answers = await self._teacher.score(question.requests)
        digests = tuple(request_digest(r) for r in question.requests)
        reply = Reply(call=question.call, model=self._model, digests=digests, answers=tuple(answers))
        return await asyncio.to_thread(encode_reply, reply)


def _refusal(status: int, reason: str) -> web.Response:
    return web.Response(status=status, text=reason)
