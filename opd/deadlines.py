"""Deadlines of waits, by a clock that stands still while this process is suspended."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
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
