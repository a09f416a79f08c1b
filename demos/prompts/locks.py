"""Prompts of the embedded locks task, whose codes only the teacher reads."""

from dataclasses import dataclass
from typing import ClassVar

from demos.tasks.locks import MARKS, LocksProblem, LocksTask, lock, lock_count
from opd.prompts.generated import GeneratedPrompts
from opd.prompts.order import draw
from opd.settings.validation import settings


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class LocksPrompts(GeneratedPrompts):
    """Problems of `demos.tasks.locks`; other fields as in `GeneratedPrompts`.

    The locks come in an order of the seed: none comes twice before all have come, which takes 30,240 problems of
    training, or 4,320 that are held out. Sets with different seeds are different orders of the same locks.
    """

    task: ClassVar[str] = "locks"
    make: ClassVar = LocksTask().problem

    # problems of held-out locks, instead of the others
    held_out: bool = False

    def problem(self, number: int) -> LocksProblem:
        """See `GeneratedPrompts`."""
        count = lock_count(held_out=self.held_out)
        numbers = draw(self.seed, count, number * len(MARKS), len(MARKS), shuffle=True)
        return LocksProblem(locks=tuple(lock(n, held_out=self.held_out) for n in numbers))
