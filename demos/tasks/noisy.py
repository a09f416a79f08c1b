"""The 'noisy' task: problems of the shop, on two known thirds of which the teacher is wrong or unsure.

Which third a problem belongs to, its first verb says: ``Mon buys`` and ``Mon gives`` are clean, ``finds`` and ``loses``
wrong, ``gets`` and ``sells`` unsure. On a wrong problem the teacher never carries, and rejects lines that do; on an
unsure one half of its results are drawn at random. Grades are the shop's everywhere.
"""

import random
from dataclasses import dataclass
from enum import Enum

from demos.tasks.shop import VERBS, ShopProblem, ShopTask, Step, Working, without_carry


class Part(Enum):
    """Part of the problems, by what the teacher knows of them; the values are places in `VERBS`."""

    CLEAN = 0
    WRONG = 1
    UNSURE = 2


_VERB = 5  # its place in a prompt's words
_PART_OF = {verb: Part(place) for verbs in VERBS.values() for place, verb in enumerate(verbs)}


def part_of(problem: ShopProblem) -> Part:
    """Part that a problem belongs to. Example: that of ``has 3 7 ; Mon gives 8 ?`` is `CLEAN`."""
    return _PART_OF[problem.prompt.split()[_VERB]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyTask:
    """Distribution of problems of some parts, and what the teacher writes about them.

    Example: `NoisyTask(part=Part.WRONG)` for problems on which the teacher is wrong; None draws from all parts.
    """

    part: Part | None = None
    guesses: float = 0.5

    def problem(self, rng: random.Random) -> ShopProblem:
        """Draw a problem."""
        while True:
            problem = ShopTask().problem(rng)
            if self.part in (None, part_of(problem)):
                return problem

    def solution(self, problem: ShopProblem, rng: random.Random, mistakes: float = 0.0) -> Working:
        """The teacher's solution, with `mistakes` (by its own rule) that it rejects and repairs."""
        part = part_of(problem)
        if part is Part.CLEAN:
            return ShopTask().solution(problem, rng, mistakes)
        if part is Part.WRONG:
            return ShopTask().solution(problem, rng, mistakes, rule=_never_carries)
        return ShopTask().solution(problem, rng, rule=lambda step: self._guess(step, rng))

    def _guess(self, step: Step, rng: random.Random) -> int:
        return rng.randint(10, 99) if rng.random() < self.guesses else step.after


def _never_carries(step: Step) -> int:
    forgotten = without_carry(step)
    return step.after if forgotten is None else forgotten
