"""The 'long' task: go a round of rooms eighteen times, by a list; the text is long, and nearly all of it is repetition.

A problem:  ``C h D * A b B C ?`` (shortened: a list has 20 rooms)
An answer:  ``1 A b B C h D 2 A b B C h D ... 18 A b B C h D end``

The list is a circle that begins anywhere; its first room is repeated at its end, and ``*`` stands where a round begins.
Rooms have capital letters, stairs small ones. From the second round on, what comes next can be known from two places:
the list, and the rounds that are already written. In every true text they say the same, so a teacher that is educated
on true texts has no reason to tell one from the other.

`LongTask.solution` is the truth: a teacher learns from it. `LongTask.pupil_solution` is a pupil that goes by its last
round instead of by the list: stairs that it once forgot, it leaves out ever after. A student learns its weakness from
it. That weakness is put there on purpose; what a run shows with it is a mechanism, and no evidence about language
models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from demos.tasks.shop import SPECIAL_WORDS, Working

ROOMS = tuple("ABCDEFGHIJKLMNOPQRSTUVWX")
STAIRS = tuple("abcdefgh")
ROUNDS = 18
MARKS = tuple(str(number) for number in range(1, ROUNDS + 1))
BEGIN, END = "*", "end"

VOCABULARY: tuple[str, ...] = (*SPECIAL_WORDS, *ROOMS, *STAIRS, *MARKS, BEGIN, END, "?", "<unk>")
"""Every word of the task; the position is the token id (``<pad>`` = 0, ``<bos>`` = 1, ``<eos>`` = 2)."""

ROOMS_OF_ROUND, STAIRS_OF_ROUND = 15, 5
WORDS_PER_ROUND = 1 + ROOMS_OF_ROUND + STAIRS_OF_ROUND
MAX_COMPLETION_WORDS = ROUNDS * WORDS_PER_ROUND + 2  # with the last word and the end-of-text token

_NEXT_MARK = dict(zip(MARKS, (*MARKS[1:], END), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class LongProblem:
    """A drawn problem: the rooms of a round from its first to its last, and how many of them the list begins with.

    Example: ``LongProblem(circle=("A", "b", "B", "C", "h", "D"), begins=3)`` is that of the module's docstring.
    """

    circle: tuple[str, ...]
    begins: int

    @property
    def prompt(self) -> str:
        """The list, closed by its first room."""
        listed = (*self.circle[self.begins :], BEGIN, *self.circle[: self.begins])
        return " ".join((*listed, listed[0], "?"))

    @property
    def answer(self) -> str:
        """The rooms of one round."""
        return " ".join(self.circle)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongTask:
    """Distribution of problems and of a pupil's errors, e.g. ``LongTask(forget=0.0)`` for a pupil without any.

    In every round a pupil forgets each of the stairs that it still knows with probability `forget`.
    """

    forget: float = 0.08

    def problem(self, rng: random.Random) -> LongProblem:
        """Draw a problem; no round begins or ends with stairs, and none are next to each other."""
        rooms, stairs = rng.sample(ROOMS, ROOMS_OF_ROUND), iter(rng.sample(STAIRS, STAIRS_OF_ROUND))
        before = {*rng.sample(range(1, ROOMS_OF_ROUND), STAIRS_OF_ROUND)}
        circle = [w for at, room in enumerate(rooms) for w in ((next(stairs), room) if at in before else (room,))]
        # The list begins inside the round, so that nothing stands at the same distance in it as in a text.
        return LongProblem(circle=tuple(circle), begins=rng.randrange(1, len(circle)))

    def solution(self, problem: LongProblem) -> Working:
        """The true text."""
        return _working([problem.circle] * ROUNDS)

    def pupil_solution(self, problem: LongProblem, rng: random.Random) -> Working:
        """A pupil's text: imitated mistakes and all, so nothing is masked from the loss."""
        rounds, known = [], problem.circle
        for _ in range(ROUNDS):
            known = tuple(word for word in known if word not in STAIRS or rng.random() >= self.forget)
            rounds.append(known)
        return _working(rounds)


def _working(rounds: Sequence[Sequence[str]]) -> Working:
    words = (*(word for mark, went in zip(MARKS, rounds, strict=True) for word in (mark, *went)), END)
    return Working(words=words, loss_mask=(True,) * len(words))


def due(words: Sequence[str], circle: Sequence[str]) -> list[str | None]:
    """The word that the list asks for at every place of a text and behind it, given what stands before.

    A text that has left the truth is followed from where it is: behind a room comes the next one of the list. None
    where nothing is due: behind `END`, or behind a word that the round does not have.
    """
    follows = dict(pairwise(circle))
    mark = ""
    asked: list[str | None] = [MARKS[0]]
    for word in words:
        mark = word if word in _NEXT_MARK else mark
        if word in _NEXT_MARK:
            asked.append(circle[0])
        elif word == circle[-1]:
            asked.append(_NEXT_MARK.get(mark, MARKS[0]))
        else:
            asked.append(follows.get(word))
    return asked


def first_slip(words: Sequence[str], circle: Sequence[str]) -> int | None:
    """Place of the first word that was not due; None if there is none, however far the text goes."""
    asked = due(words, circle)
    return next((at for at, word in enumerate(words) if word != asked[at]), None)


def grade(completion: str, answer: str) -> float:
    """Share of the rounds that are right: those that stand under their own mark, once, with every room of the list.

    A text that does not begin with the first mark or does not end with `END` is worth nothing. The completion comes
    without its end-of-text token; one cut off before it is the caller's to refuse.
    """
    words, circle = completion.split(), answer.split()
    if words[-1:] != [END] or words[0] != MARKS[0]:
        return 0.0
    ends = [at for at, word in enumerate(words) if word in _NEXT_MARK or word == END]
    under = [(words[start], words[start + 1 : end]) for start, end in pairwise(ends)]
    return sum([went for mark, went in under if mark == own] == [circle] for own in MARKS) / ROUNDS
