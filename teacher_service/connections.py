"""Bounds on connections and bytes of the teacher's server: no client without its token can block the others."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import web

LOG = logging.getLogger("opd.teacher.server")
GRACE_S = 5.0  # so long a transfer may stand still at its beginning, when a link wakes up


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPace:
    """Least speed of a transfer: all of it within `seconds`, and `rate` bytes a second on the whole."""

    seconds: float
    rate: float

    def within(self, began: float, moved: int) -> asyncio.Timeout:
        """The deadline of the next piece, when `moved` bytes have gone since `began` (seconds of the loop's clock)."""
        return asyncio.timeout_at(began + min(self.seconds, min(GRACE_S, self.seconds) + moved / self.rate))


class Budget:
    """Bytes of questions and answers that are in memory at the same time."""

    def __init__(self, most: int) -> None:
        self._free = most

    @contextmanager
    def held(self) -> Iterator["Reservation"]:
        """A part of the budget that grows with `Reservation.take`, and is given back at the end."""
        held = Reservation(self)
        try:
            yield held
        finally:
            self._free += held.nbytes

    def take(self, nbytes: int) -> bool:
        """Whether there is room for so many more; they are taken then."""
        if nbytes > self._free:
            return False
        self._free -= nbytes
        return True


class Reservation:
    """Bytes that one call has reserved of a `Budget`."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self.nbytes = budget, 0

    def take(self, nbytes: int) -> bool:
        """Whether there is room for so many more bytes."""
        if not self._budget.take(nbytes):
            return False
        self.nbytes += nbytes
        return True


class Connections:
    """Factory of the protocol of new connections, of which at most `most` stay open.

    Beyond that the oldest one ends that has not shown the token, so a client that opens many and sends nothing shuts
    out none but itself. Those that wait for a request end after aiohttp's `keepalive_timeout`, counted from their
    beginning too.
    """

    def __init__(self, server: web.Server, most: int) -> None:
        self._server, self._most = server, most
        self._trusted: set[web.RequestHandler] = set()

    def __call__(self) -> web.RequestHandler:
        present = self._server.connections
        self._trusted.intersection_update(present)
        if len(present) >= self._most:
            untrusted = next((one for one in present if one not in self._trusted), None)
            if untrusted is not None:
                LOG.warning("closed the oldest of %d connections that has shown no token", len(present))
                untrusted.force_close()
        return self._server()

    def trust(self, request: web.Request) -> None:
        """The peer of this connection has shown the token."""
        self._trusted.add(request.protocol)


def quiet_logger() -> logging.Logger:
    """Logger of requests that are no HTTP, one line each without aiohttp's stack trace."""
    logger = logging.getLogger("opd.teacher.server.http")
    logger.setLevel(logging.DEBUG)  # it calls some of them so
    if not logger.filters:
        logger.addFilter(_one_line)
    return logger


def _one_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return False
    record.levelno, record.levelname, record.exc_info = logging.WARNING, "WARNING", None
    record.msg, record.args = "refused %s: 400 %s", (record.args, f"what it sends is no HTTP ({type(error).__name__})")
    return True
