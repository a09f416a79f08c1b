"""An asyncio event loop whose clock jumps: a cluster's hour in a second, the same every time.

While something can run, virtual time stands still; when nothing can, the clock jumps to the next timer. Code that asks
`asyncio.get_running_loop().time()` and waits with `asyncio.sleep`, timeouts or `call_later` runs unchanged. Threads and
sockets have no place here: nothing would wait for them.
"""

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stalled(RuntimeError):
    """Error of a simulation in which all tasks wait for no timer, or time ran past the horizon."""


class _Jumping(selectors.DefaultSelector):
    """Selector that advances the clock where a real loop would sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.advance: Callable[[float], None] = lambda _: None

    def select(self, timeout: float | None = None) -> list[Any]:
        """Ready events; if there are none and the loop would wait `timeout` seconds, the clock jumps by it."""
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:
            raise Stalled("every task waits, and no timer is set that could wake one")
        self.advance(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Event loop from 0 s; raises `Stalled` beyond `horizon_s`, so that a deadlock among repeating timers is found,
    too.
    """

    def __init__(self, horizon_s: float = math.inf) -> None:
        self._now, self._horizon_s = 0.0, horizon_s
        selector = _Jumping()
        selector.advance = self._advance
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def _advance(self, seconds: float) -> None:
        self._now += seconds
        if self._now > self._horizon_s:
            raise Stalled(f"nothing came to an end within {self._horizon_s:g} virtual seconds")


def simulate(main: Coroutine[Any, Any, T], horizon_s: float = math.inf) -> T:
    """Result of `main`, run in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(horizon_s)) as runner:
        return runner.run(main)
