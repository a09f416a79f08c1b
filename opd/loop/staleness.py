"""How far collecting runs ahead of training: bounds and schedules as functions of step numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from opd.errors import ConfigurationError
from opd.types import NO_VERSION, Trajectory


class WeightUpdate(Enum):
    """What becomes of text that is being written when new weights arrive."""

    IN_FLIGHT = "in_flight"  # it goes on with the new weights; every token knows its version
    DRAIN = "drain"  # it is finished first, and nothing new is begun meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessSchedule:
    """When a step's text may be written, and by which policy version.

    Version `v` is the student after `v` updates; step `s` (from 0) updates version `s`. No token that is trained at
    step `s` was written by a version below `s - max_staleness`. `max_buffer_bytes` bounds what waits to be trained:
    while more is held or expected (what is being written counts like the largest step so far), no step is begun.

    `deterministic` makes all of it a function of step numbers: the text of step `s` is written by version
    `min_version(s)` alone, whatever the speed of the engines, and is read by the teacher when the whole step is
    written. It implies `DRAIN`; `max_buffer_bytes` is not looked at. With `barrier_every` (steps between checkpoints; 0
    = never) no text is written across a checkpoint, so a run that goes on from one writes what the uninterrupted run
    wrote. Where a teacher changes with the student (`teacher_follows`) a step's text is also read before the weights
    after its own arrive.
    """

    max_staleness: int = 0
    update: WeightUpdate = WeightUpdate.IN_FLIGHT
    deterministic: bool = True
    max_buffer_bytes: int = 4 << 30
    barrier_every: int = 0
    teacher_follows: bool = False

    def __post_init__(self) -> None:
        if self.max_staleness < 0 or self.barrier_every < 0 or self.max_buffer_bytes < 1:
            raise ConfigurationError(
                "the pipeline needs max_staleness >= 0 and max_buffer_bytes >= 1, got "
                f"max_staleness={self.max_staleness} and max_buffer_bytes={self.max_buffer_bytes}; use max_staleness=0 "
                "for strictly on-policy"
            )

    @property
    def drains(self) -> bool:
        """Is text finished before new weights arrive?"""
        return self.deterministic or self.update is WeightUpdate.DRAIN

    def min_version(self, step: int, start: int = 0) -> int:
        """The oldest version that may write for `step`, which begins when it is live, in a run from step `start` on."""
        oldest = max(start, step - self.max_staleness)
        if self.deterministic and self.barrier_every:
            oldest = max(oldest, step - step % self.barrier_every)
        return oldest

    def repeats_from(self, step: int) -> bool:
        """Does a run that goes on from a checkpoint of `step` write what the uninterrupted one writes?"""
        if not self.max_staleness:
            return True
        return bool(self.deterministic and self.barrier_every and step % self.barrier_every == 0)

    def may_pause(self, step: int) -> bool:
        """May a checkpoint that is due by the clock be of `step`? With barriers only there, because of those between
        them a run could not go on as it was; without any it is of any step, since nothing is promised there."""
        return self.repeats_from(step) or not (self.deterministic and self.barrier_every)

    def reject_reason(self, trajectory: Trajectory, step: int, published: Mapping[int, str]) -> str:
        """Why `trajectory` must not be trained at `step`; "" if it may. `published` has the digest of every version.

        Text of somebody else than the student (`NO_VERSION`) has no age.
        """
        versions = trajectory.versions[trajectory.versions != NO_VERSION]
        if not len(versions):
            return ""
        if int(versions.min()) < step - self.max_staleness:
            return "stale"
        strange = not published.keys() >= set(versions.tolist()) or unknown_weights(trajectory, published)
        return "unknown weights" if strange else ""


def unknown_weights(trajectory: Trajectory, published: Mapping[int, str]) -> str:
    """Why a trajectory must not be trained on, or "" if weights that were published wrote every token of it.

    `published` has the digest of every version. A trajectory without digests claims no published weights (a teacher
    or a data set wrote it) and is fine.
    """
    if not trajectory.digests:
        return ""
    for version in sorted(set(trajectory.versions.tolist()) - {NO_VERSION}):
        held = trajectory.digests.get(version, "")
        if version not in published:
            return f"version {version} wrote it, which was never published"
        if held != published[version]:
            return (
                f"version {version} wrote it with weights {held or 'of a checkpoint'}, but {published[version]} was "
                "published under that number"
            )
    return ""
