"""The end of a step: checkpoints when due, preemption after a signal, a last save after a failure."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic

from launch.artifacts.checkpoint_state import DriverState
from launch.checkpoint.saver import Saver
from launch.config.run_config import RunConfig
from launch.services.failure_causes import brief
from launch.services.learner_restart import RestartingLearner
from launch.services.signals import Preempted, StopRequest
from opd.deadlines import running_timeout
from opd.errors import OpdError
from opd.loop.train import StepRecord

_log = logging.getLogger(__name__)


class BudgetSpent(Exception):
    """The end of a run that has spent an amount of `stop_after`; the last step is saved."""


@contextmanager
def until_spent() -> Iterator[None]:
    """Context of a training loop that `BudgetSpent` ends in good order."""
    try:
        yield
    except* BudgetSpent:
        pass


class Boundary:
    """The last observer of every step. Steps that are `over` were observed; those `saved` have a checkpoint.

    A checkpoint is due every `checkpoint_every` steps, `checkpoint_minutes` after the one before and at a step that is
    the `best` so far (both where the pipeline allows it), at the last step, and when a signal asked the run to stop.
    `state` is what the driver knows after a step; `apart` is the context of what is no training; `clock` counts
    seconds; `elsewhere` are folders that take what a failing run cannot write in its place; `spent` says that an amount
    of `stop_after` is reached: the step is saved, and `BudgetSpent` is raised.
    """

    def __init__(
        self,
        config: RunConfig,
        saver: Saver,
        stop: StopRequest,
        state: Callable[[int], Awaitable[DriverState]],
        apart: Callable[[], AbstractContextManager[None]],
        first: int = 0,
        clock: Callable[[], float] = monotonic,
        elsewhere: Sequence[Path] = (),
        spent: Callable[[], bool] = lambda: False,
        best: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._config, self._saver, self._stop, self._state = config, saver, stop, state
        self._apart, self._clock, self._since, self._elsewhere = apart, clock, clock(), elsewhere
        self._spent, self._best = spent, best
        self.over = self.saved = self._first = first
        self.hopeless = False  # the ranks cannot be asked any more: Ray itself is gone
        self.rescued: Path | None = None  # where the last step lies that could not be written in its place

    async def __call__(self, record: StepRecord) -> None:
        """Handle the end of a step, after all other observers."""
        self._saver.check()
        if record.live and self._due(record.step):
            await self._save(record.step)
        if record.live:
            await self.stop_if_asked()
            if self._spent():
                raise BudgetSpent

    def ended(self, record: StepRecord) -> None:
        """Note that a step is finished; the first observer called."""
        self.over = record.step
        if not record.live and self._saver.follows:  # in part, perhaps: their weights belong to no step
            self.hopeless = True

    def _due(self, step: int) -> bool:
        config = self._config
        if step == config.steps or self._spent() or self._stop.asked:
            return True
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            return True
        if self._best(step) and config.staleness_schedule.may_checkpoint(step):
            return True
        late = self._clock() - self._since >= 60 * config.checkpoint_minutes > 0
        return late and config.staleness_schedule.may_checkpoint(step)

    async def _save(self, step: int) -> None:
        self._stop.saving()
        with self._apart():
            await self._saver.begin(await self._state(step))
        self.saved, self._since = step, self._clock()

    async def _rescue(self) -> None:
        self._stop.saving()
        with self._apart():
            place = await self._saver.rescue(await self._state(self.over), self._elsewhere)
        self.saved = self.over
        self.rescued = place if place.parent in self._elsewhere else None

    async def stop_if_asked(self) -> None:
        """Raise `Preempted` if a signal requested it: the last finished step has its checkpoint then."""
        if not self._stop.asked:
            return
        self._stop.saving()
        await self._saver.finish()
        self._stop.met()
        raise Preempted(f"stopped by {self._stop.name} after step {self.saved}, with a checkpoint", self._stop.name)

    async def rescue(self, error: BaseException, learner: RestartingLearner) -> None:
        """Save the last finished step, if it has no checkpoint yet, as the run breaks off because of `error`.

        Where its place cannot be written, elsewhere. Within `learner.deadline_s`, and only from ranks that live:
        no replica is replaced for it. A failure is logged, and the checkpoints before stay. Raises `Preempted` where a
        signal has cut a step short and all is saved.
        """
        await self._saver.give_up(at_once=self.hopeless or self._stop.at_once)
        if isinstance(error, Preempted) or self.hopeless or self._stop.at_once:
            return
        try:
            async with running_timeout(self._config.learner.deadline_s):
                await learner.settle()
                if self._saver.kept != self.over:
                    await self._rescue()
        except Exception as second:  # noqa: BLE001 (the run ends with `error`; this is logged beside it)
            why = str(second) if isinstance(second, OpdError) else brief(second)
            _log.warning("step %d could not be saved (%s)", self.over, why)
            return
        finally:
            self._stop.met()
        if isinstance(error, asyncio.CancelledError) and self.over > self._first:
            await self.stop_if_asked()
