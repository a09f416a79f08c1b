"""Retries of a remote teacher's answers, and the point at which it is given up."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp

from opd.deadlines import backoff
from opd.errors import ConfigurationError, OpdError
from opd.settings.secret import Secret
from teacher_service.config import TOKEN_VARIABLE, TeacherConfig
from teacher_service.scoring import Unreadable

LOG = logging.getLogger("opd.teacher")
LONGEST_WAIT_S = 30.0
T = TypeVar("T")


class NoAnswer(OpdError):
    """An attempt without an answer, which may be repeated; `wait_s` is the server's `Retry-After` (seconds)."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class WrongAnswer(OpdError):
    """An answer that must not be used; the attempt may be repeated."""


class RetryLoop:
    """Retry loop with exponential, jittered backoff; `max_consecutive_failures` wrong answers end it for all calls."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._subject = f"the teacher at {config.url}"
        self._in_a_row = 0
        self._given_up = ""
        self.unanswered = self.quarantined = 0

    async def __call__(self, attempt: Callable[[int], Awaitable[T]]) -> T:
        """The first right result of `attempt(number)`. Raises one sentence after the last attempt."""
        last = ""
        for number in range(self._config.retries + 1):
            if self._given_up:
                raise OpdError(self._given_up)
            wait_s = 0.0
            try:
                result = await attempt(number)
            except NoAnswer as error:
                self.unanswered += 1
                last, wait_s = str(error), error.wait_s
            except WrongAnswer as error:
                last = str(error)
                self._count_wrong(last)
            else:
                self._in_a_row = 0
                return result
            LOG.warning("%s, attempt %d of %d: %s", self._subject, number + 1, self._config.retries + 1, last)
            if number < self._config.retries and not self._given_up:
                await asyncio.sleep(self._pause(number, wait_s))
        raise OpdError(
            self._given_up
            or f"{self._subject} gave no believable answer in {self._config.retries + 1} attempts (last: {last}); look "
            "at its log, or raise teacher.retries"
        )

    def _count_wrong(self, reason: str) -> None:
        self.quarantined += 1
        self._in_a_row += 1
        if self._in_a_row >= self._config.max_consecutive_failures:
            self._given_up = (
                f"{self._subject} is not asked again after {self._in_a_row} wrong answers in a row (last: {reason}), "
                "none of which was used; check what runs there, then start again"
            )

    def _pause(self, number: int, asked_s: float) -> float:
        longest = backoff(self._config.backoff_s, number, LONGEST_WAIT_S)
        return max(min(asked_s, LONGEST_WAIT_S), longest * (0.5 + random.random() / 2))


def session(config: TeacherConfig, token: Secret) -> aiohttp.ClientSession:
    """Connections for one call, with a deadline for each attempt; redirects and proxies are not followed."""
    timeout = aiohttp.ClientTimeout(
        total=config.connect_s + config.read_s, sock_connect=config.connect_s, sock_read=config.read_s
    )
    headers: Mapping[str, str] = {"Authorization": f"Bearer {token.reveal()}"} if token else {}
    return aiohttp.ClientSession(timeout=timeout, headers=headers, raise_for_status=False)


async def fetch(client: aiohttp.ClientSession, method: str, url: str, most: int, **arguments: object) -> bytes:
    """The body of one exchange, at most `most` bytes.

    Raises `NoAnswer` for timeouts, lost connections, half bodies, 400, 408, 429 and 5xx; `ConfigurationError` for a
    wrong token or address; `Unreadable` for what the server will never take (413, 422).
    """
    try:
        async with client.request(method, url, allow_redirects=False, **arguments) as response:  # pyright: ignore
            if (response.content_length or 0) > most:
                raise WrongAnswer(f"the answer has {response.content_length} bytes, more than {most}")
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > most:
                    raise WrongAnswer(f"the answer has more than {most} bytes")
            if response.status == 200:
                return bytes(body)
            raise _refused(url, response.status, bytes(body[:500]), response.headers.get("Retry-After", ""))
    except TimeoutError as error:
        raise NoAnswer("no answer in time (teacher.connect_s, teacher.read_s)") from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise NoAnswer(f"the connection failed ({type(error).__name__})") from error


def _refused(url: str, status: int, body: bytes, retry_after: str) -> OpdError:
    reason = " ".join(body.decode(errors="replace").split())
    if status in (400, 408, 425, 429) or status >= 500:
        return NoAnswer(f"status {status} ({reason})", float(retry_after) if retry_after.isdigit() else 0.0)
    if status in (401, 403):
        return ConfigurationError(
            f"the teacher at {url} refuses our token (status {status}); set {TOKEN_VARIABLE} to the server's"
        )
    if status in (413, 422):
        return Unreadable(f"the teacher at {url} cannot take a request (status {status}): {reason}")
    return ConfigurationError(f"the teacher at {url} answers status {status} ({reason}); correct teacher.url")


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first failure ends the others and is raised as one sentence.

    Not `except*`: what is raised there arrives in a group of its own in Python 3.11.2, and alone in 3.11.7.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part) for part in work]
    except BaseExceptionGroup as group:
        if all(isinstance(error, OpdError) for error in group.exceptions):
            raise group.exceptions[0] from None  # the others say the same
        raise
    return [task.result() for task in running]
