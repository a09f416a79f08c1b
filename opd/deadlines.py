"""Deadlines of waits, by a clock that stands still while this process is suspended, and pauses between attempts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from math import ldexp
from time import monotonic, sleep
from typing import TypeVar

Result = TypeVar("Result")
_SLICES = 8


@asynccontextmanager
async def running_timeout(deadline_s: float) -> AsyncIterator[None]:
    """`asyncio.timeout` by a clock that stands still while this process is suspended.

    It counts slices one after the other, so a process that was stopped, or a machine that slept, loses one at most and
    gets first what was answered meanwhile.
    """
    loop = asyncio.get_running_loop()

    def count(left: int) -> asyncio.TimerHandle:
        return loop.call_later(deadline_s / _SLICES, over, left - 1)

    def over(left: int) -> None:
        nonlocal slice_
        if left:
            slice_ = count(left)
        else:
            limit.reschedule(loop.time())

    async with asyncio.timeout(None) as limit:
        slice_ = count(_SLICES)
        try:
            yield
        finally:
            slice_.cancel()


async def within(deadline_s: float, work: Awaitable[Result], late: Exception) -> Result:
    """Result of `work`, which is cancelled after `deadline_s` seconds.

    Raises:
        late: the time is over; its sentence names what was waited for, and what to do.
    """
    try:
        async with running_timeout(deadline_s):
            return await work
    except TimeoutError as error:
        raise late from error


def backoff(first_s: float, failures: int, longest_s: float) -> float:
    """Pause of an exponential backoff, in seconds: `first_s` after the first failure, then doubled, up to `longest_s`.

    `failures` counts those before the last one. Example: `backoff(0.5, 2, 30.0)` is 2.0.
    """
    return min(longest_s, ldexp(first_s, min(failures, 64)))


def repeated(
    call: Callable[[], Result], is_transient: Callable[[Exception], bool], deadline_s: float, pause_s: float
) -> Result:
    """The result of `call`, repeated after `pause_s` seconds while its error is transient; blocks this thread.

    Raises:
        Exception: what `call` raised last: it is not transient, or the next call would begin after `deadline_s`.
    """
    end = monotonic() + deadline_s
    while True:
        try:
            return call()
        except Exception as error:
            if not is_transient(error) or monotonic() + pause_s >= end:
                raise
        sleep(pause_s)
