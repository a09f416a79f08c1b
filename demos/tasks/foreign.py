"""The 'foreign' task: problems of the shop, solved by a teacher that writes the units of every number first.

Its line for a day is ``Mon 7 3 - 8 = 9 2 ok`` where the shop has ``Mon 3 7 - 8 = 2 9 ok``; the answer, ``# 2 9``, is
written as in the shop, and graded so. Both ways solve a problem in as many words, of the same vocabulary, and what one
writes is wrong in the eyes of the other.
"""

import random
from dataclasses import dataclass

from demos.tasks.shop import ShopProblem, ShopTask, Working

_LINE = 9  # words of a day
_SWAPPED = ((1, 2), (6, 7))  # places of the digits of a day's stock before and after


@dataclass(frozen=True, slots=True)
class ForeignTask:
    """Distribution of the shop's problems with solutions whose numbers begin with their units."""

    def problem(self, rng: random.Random) -> ShopProblem:
        """Draw a problem of the shop."""
        return ShopTask().problem(rng)

    def solution(self, problem: ShopProblem, rng: random.Random, mistakes: float = 0.0) -> Working:
        """The teacher's solution, with `mistakes` that it rejects and repairs as the shop's teacher does."""
        return units_first(ShopTask().solution(problem, rng, mistakes))


def units_first(working: Working) -> Working:
    """The same lines with the digits of every stock exchanged; the answer at the end stays as it is."""
    words, mask = list(working.words), list(working.loss_mask)
    for start in range(0, words.index("#"), _LINE):
        for one, other in _SWAPPED:
            one, other = start + one, start + other
            words[one], words[other] = words[other], words[one]
            mask[one], mask[other] = mask[other], mask[one]
    return Working(words=tuple(words), loss_mask=tuple(mask))
