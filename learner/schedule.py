"""The learning rate as a function of the update: transformers' schedules, by their names and with their shapes."""

import math
from enum import Enum
from typing import assert_never


class Schedule(Enum):
    """Shapes of the learning rate: transformers' `lr_scheduler_type`, and one of ours for what was measured with it."""

    CONSTANT = "constant"  # no warm-up
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    LINEAR = "linear"
    COSINE = "cosine"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"
    # Ours: a ramp from 1 / warm-up, times a line over the whole run. Tables older than the others were made with it.
    WARMUP_TIMES_LINEAR = "warmup_times_linear"

    @classmethod
    def _missing_(cls, value: object) -> "Schedule | None":
        """Other names of the same shapes: `cosine_with_min_lr` is COSINE with a floor, as COSINE has one here."""
        return {"cosine_with_min_lr": cls.COSINE, "wsd": cls.WARMUP_STABLE_DECAY}.get(str(value))

    @property
    def constant(self) -> bool:
        """Whether the rate is independent of how many updates there will be."""
        return self in (Schedule.CONSTANT, Schedule.CONSTANT_WITH_WARMUP)


def rate(schedule: Schedule, update: int, total: int, *, lr: float, warmup: int, decay: int, floor: float) -> float:
    """The rate of update number `update` (from 0) of `total`, of which `lr` is the most.

    As in transformers (`optimization.py`), a warm-up rises from 0 at update 0 to `lr` at update `warmup`, and what
    falls would arrive at `floor * lr` at update `total`, one after the last. The floor is that of
    `cosine_with_min_lr`: `floor + (1 - floor) * shape`; for LINEAR that is `polynomial` with power 1 and
    `lr_end = floor * lr`. WARMUP_STABLE_DECAY falls as half a cosine in the last `decay` updates, and its warm-up
    begins at the floor.
    """
    rising, left = update / max(1, warmup), _left(schedule, update, total, warmup, decay)
    if schedule is Schedule.WARMUP_TIMES_LINEAR:
        return lr * min(1.0, (update + 1) / max(1, warmup)) * (floor + (1.0 - floor) * left)
    if schedule is Schedule.CONSTANT:
        return lr
    if update < warmup:
        return lr * (rising * (1.0 - floor) + floor if schedule is Schedule.WARMUP_STABLE_DECAY else rising)
    return lr if schedule.constant else lr * (left * (1.0 - floor) + floor)


def _left(schedule: Schedule, update: int, total: int, warmup: int, decay: int) -> float:
    """Share of the decay that is left at an update after the warm-up, from 1 to 0."""
    if schedule in (Schedule.CONSTANT, Schedule.CONSTANT_WITH_WARMUP):
        return 1.0
    if schedule is Schedule.LINEAR:
        return max(0.0, (total - update) / max(1, total - warmup))
    if schedule is Schedule.COSINE:
        return _half_cosine((update - warmup) / max(1, total - warmup))
    if schedule is Schedule.WARMUP_STABLE_DECAY:
        return _half_cosine((update - (total - decay)) / max(1, decay)) if update < total else 0.0
    if schedule is Schedule.WARMUP_TIMES_LINEAR:
        return 1.0 - min(1.0, update / max(1, total - 1))
    assert_never(schedule)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
