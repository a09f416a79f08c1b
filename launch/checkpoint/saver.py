"""Writer of a run's checkpoints: decides when one is due and writes it while training goes on."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.artifacts.checkpoint_state import LEARNER, DriverState
from launch.artifacts.checkpoint_store import CheckpointStore
from launch.services.learner_group import RanksLost
from launch.services.learner_restart import RestartingLearner
from launch.services.pools import Follower
from opd.errors import OpdError

_log = logging.getLogger(__name__)


class NotKept(OpdError):
    """Error about a checkpoint that was not written: its ranks were lost, and their replacements, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Retention of checkpoints: the newest `keep`, multiples of `keep_every` steps (0: no milestones), `best()`."""

    keep: int
    keep_every: int
    best: Callable[[], Collection[int]] = tuple


class Saver:
    """Writer of a run's checkpoints. `begin` returns once the state is copied; the files follow in the background.

    One at a time: the next waits for the one before. What goes wrong in the background is raised by the next `begin`,
    `check` or `finish`; it leaves no half checkpoint, and the one before stays. A checkpoint whose writers are
    lost and replaced is given up, and training goes on.
    """

    def __init__(
        self,
        store: CheckpointStore,
        learner: RestartingLearner,
        followers: Mapping[str, Follower],
        retention: Retention,
        first: int = 0,
    ) -> None:
        self._store, self._learner, self._followers, self._retention = store, learner, followers, retention
        self._writing: asyncio.Task[bool] | None = None
        self._begun: DriverState | None = None
        self.kept = first  # the step of the newest checkpoint that is on the disk, or that needs none

    @property
    def follows(self) -> bool:
        """Whether a teacher follows the student."""
        return bool(self._followers)

    async def begin(self, state: DriverState) -> None:
        """Save the learner as it is now, and `state`."""
        await self._settled()
        self._begun = state
        step = state.step
        folder = self._store.begin(step)
        try:
            (folder / LEARNER).mkdir()
            await self._learner.save(folder / LEARNER, step)
            # Copied and written at once: a teacher that follows the student has no copy to spare.
            files = {name: f"teacher_{name}.safetensors" for name in self._followers}
            digests = {
                files[name]: await follower.save(folder / files[name]) for name, follower in self._followers.items()
            }
        except BaseException:
            self._store.abandon(step)
            raise
        self._writing = asyncio.create_task(self._finish(replace(state, followers=files), digests))

    async def _finish(self, state: DriverState, digests: Mapping[str, str]) -> bool:
        """Finish the checkpoint under way; whether it is on the disk."""
        try:
            shards = {f"{LEARNER}/{name}": digest for name, digest in (await self._learner.written()).items()}
            await _to_its_end(self._store.commit, state, {**digests, **shards})
        except RanksLost as lost:
            self._store.abandon(state.step)
            _log.warning("the checkpoint of step %d is given up with the ranks that wrote it (%s)", state.step, lost)
            return False
        except BaseException:
            self._store.abandon(state.step)
            raise
        self.kept = state.step
        await self._learner.kept(self._store.path(state.step) / LEARNER)
        try:
            keep, best = self._retention, self._retention.best()
            await asyncio.to_thread(self._store.prune, keep.keep, keep.keep_every, best)
        except OSError as error:  # an old checkpoint too many does not make the new one worse
            _log.warning("an old checkpoint could not be removed (%s)", error)
        return True

    def check(self) -> None:
        """Raise any error of the background writer so far."""
        if self._writing is not None and self._writing.done():
            done, self._writing = self._writing, None
            done.result()

    async def finish(self) -> None:
        """Wait until the checkpoint begun last is on the disk; nothing was trained since.

        If its writers are lost it is written by those that take their place, once.
        """
        if await self._settled():
            return
        assert self._begun is not None
        await self.begin(self._begun)
        if not await self._settled():
            raise NotKept(
                f"the checkpoint of step {self._begun.step} needs ranks that live until it is written, but they were "
                "lost twice while they wrote it; look at their logs and at the disk"
            )

    async def rescue(self, state: DriverState, elsewhere: Sequence[Path]) -> Path:
        """Save the learner as it is now: in its place, without the older checkpoints if there is no room, or
        `elsewhere`.

        Returns where it lies. Raises what was wrong with its place, if no folder of `elsewhere` takes it either.
        """
        first: OpdError | OSError | None = None
        for store in self._places(elsewhere):
            self._store = store
            try:
                await self.begin(state)
                await self.finish()
                return store.path(state.step)
            except (RanksLost, NotKept):  # nothing is wrong with the place
                raise
            except (OpdError, OSError) as error:
                first = first or error
        assert first is not None
        raise first

    def _places(self, elsewhere: Sequence[Path]) -> Iterator[CheckpointStore]:
        store = self._store
        yield store
        if store.make_room(self._retention.keep_every, self._retention.best()):
            yield store
        yield from map(CheckpointStore, elsewhere)

    async def _settled(self) -> bool:
        """Wait for the checkpoint under way; False if it was given up."""
        if self._writing is None:
            return True
        running, self._writing = self._writing, None
        return await running

    async def give_up(self, *, at_once: bool) -> None:
        """Finish a checkpoint that is being written, if possible, or leave it (`at_once`): the run has failed."""
        if self._writing is None:
            return
        running, self._writing = self._writing, None
        if at_once:
            running.cancel()
        (error,) = await asyncio.gather(running, return_exceptions=True)
        if isinstance(error, Exception):  # the run's own failure may be the reason; it is reported beside this
            _log.warning("the checkpoint under way could not be finished (%s)", error)


async def _to_its_end(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` in a thread to its end. A thread cannot be stopped, so a cancelled caller waits until it has ended."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.gather(running, return_exceptions=True)
        raise
