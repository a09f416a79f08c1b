"""Work that Ctrl-C, SIGTERM and SIGHUP end in order."""

import asyncio
import itertools
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from opd.errors import OpdError

Result = TypeVar("Result")


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 3  # signals after which not even a loop that hangs is waited for
_SHARE = 0.6  # of the grace: so long the step at hand may take, the rest is for saving the one before


class Preempted(OpdError):
    """Stop by a signal after the last finished step was saved: the same command with resume=latest goes on.

    `code` is the exit code: 75 (EX_TEMPFAIL of sysexits.h: try again later), after Ctrl-C 130, as shells expect.
    """

    def __init__(self, sentence: str, signal_name: str = "SIGTERM") -> None:
        super().__init__(sentence)
        self.code = 130 if signal_name == "SIGINT" else 75


class StopRequest:
    """Request by a signal (SIGTERM, SIGHUP, Ctrl-C) to stop the run at the next step boundary.

    That can wait only while `waits` is set, when steps follow each other and a checkpoint can be written; at any other
    time, and at a second signal (`at_once`), the run is cancelled. A step that does not end within the greater part of
    `grace_s` is cut short, so that the one before it can still be saved (`saving`); after `grace_s` all is cancelled.
    """

    def __init__(self, grace_s: float, tell: Callable[[str], object] = lambda sentence: None) -> None:  # noqa: ARG005
        self._grace_s, self._tell = grace_s, tell
        self.waits = self.asked = self.at_once = False
        self.name = "SIGTERM"
        self._timers: list[asyncio.TimerHandle] = []

    def signal(self, cancel: Callable[[], object], name: str = "SIGTERM") -> None:
        """A signal has come."""
        if self.asked or not self.waits:
            self.at_once = True
            cancel()
            return
        self.asked, self.name = True, name
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(self._grace_s * _SHARE, cancel), loop.call_later(self._grace_s, cancel)]
        self._tell(
            f"{name}: the step at hand ends and a checkpoint is written, within {self._grace_s:g} s (grace_s); "
            "a second signal ends the run at once"
        )

    def saving(self) -> None:
        """Record that the checkpoint to stop with is being written: no step is left to be cut short."""
        if self._timers:
            self._timers[0].cancel()

    def met(self) -> None:
        """Record that the run has stopped with its checkpoint: closing up is not cut short any more."""
        for timer in self._timers:
            timer.cancel()


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, by `KeyboardInterrupt`.

    What is ignored stays so (SIGHUP under nohup). Libraries set handlers of their own, so this is asked for again after
    them.
    """
    _handle((signal.SIGTERM, signal.SIGHUP), _interrupt)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Around a library that sets handlers of its own and leaves on SIGTERM (Ray): what it leaves by is an interrupt."""
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        end_on_signals()


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _handle(numbers: Iterable[signal.Signals], handler: Any) -> dict[signal.Signals, Any]:
    """Install `handler`; returns the handlers before. Python allows it in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


async def guarded(work: Coroutine[Any, Any, Result], guard: Coroutine[Any, Any, None]) -> Result:
    """The result of `work`, unless `guard` raises first: then `work` is cancelled, and that is raised."""
    working, guarding = asyncio.ensure_future(work), asyncio.ensure_future(guard)
    try:
        await asyncio.wait({working, guarding}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            guarding.result()
        return await working
    except asyncio.CancelledError:  # `work` may have something better to say about its end
        working.cancel()
        await asyncio.wait({working})
        if not working.cancelled():
            return working.result()
        raise
    finally:
        for task in (working, guarding):
            task.cancel()
        await asyncio.gather(working, guarding, return_exceptions=True)


def run_until_stopped(work: Any, stop: StopRequest | None = None) -> Any:
    """`work` in an event loop that SIGINT, SIGTERM and SIGHUP cancel, so that everything is closed in order.

    With `stop`, they ask there first.
    """
    polite, came = stop or StopRequest(0.0), itertools.count(1)

    async def main() -> Any:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def asked(number: int, _: FrameType | None) -> None:
            if next(came) >= _PATIENCE:
                raise KeyboardInterrupt
            loop.call_soon_threadsafe(polite.signal, task.cancel, signal.Signals(number).name)

        before = _handle(ENDING, asked)
        try:
            return await work
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
