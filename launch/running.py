"""Work that Ctrl-C and SIGTERM end in order."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from opd.errors import OpdError

Result = TypeVar("Result")


class Preempted(OpdError):
    """SIGTERM came, and the state of the last finished step was saved: the same command with resume=latest goes on."""


class Stop:
    """Whether somebody asked (by SIGTERM) for the run to stop at the next step boundary.

    That can wait only while `waits` is set, when steps follow each other and a checkpoint can be written; at any other
    time, at a second signal, or after `grace_s` seconds the run is cancelled at once.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self.waits = False
        self.asked = False
        self._late: asyncio.TimerHandle | None = None

    def signal(self, cancel: Callable[[], object]) -> None:
        """SIGTERM has come."""
        if self.asked or not self.waits:
            cancel()
            return
        self.asked = True
        self._late = asyncio.get_running_loop().call_later(self._grace_s, cancel)

    def met(self) -> None:
        """The run has stopped where it was asked to, with its checkpoint: closing up is not cut short any more."""
        if self._late is not None:
            self._late.cancel()


async def beside(work: Coroutine[Any, Any, Result], guard: Coroutine[Any, Any, None]) -> Result:
    """What `work` returns, unless `guard` raises first: then `work` is cancelled, and that is raised."""
    working, guarding = asyncio.ensure_future(work), asyncio.ensure_future(guard)
    try:
        await asyncio.wait({working, guarding}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            guarding.result()
        return await working
    finally:
        for task in (working, guarding):
            task.cancel()
        await asyncio.gather(working, guarding, return_exceptions=True)


def run_until_stopped(work: Any, stop: Stop | None = None) -> Any:
    """`work` in an event loop that SIGINT and SIGTERM cancel, so that everything is closed in order.

    With `stop`, SIGTERM asks there first.
    """
    polite = stop or Stop(0.0)

    async def main() -> Any:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, polite.signal, task.cancel)
        return await work

    try:
        return asyncio.run(main())
    except asyncio.CancelledError as error:  # SIGTERM; SIGINT arrives as KeyboardInterrupt already
        raise KeyboardInterrupt from error
