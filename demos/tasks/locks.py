"""The 'locks' task: find the codes of two locks by trying; only the teacher's copy of the prompt has them.

A lock has three keys and an opening value; a key is a fixed permutation of five values. The code is the value that the
keys lead, one after the other, to the opening value. Trying a value is three look-ups and a comparison:

A problem:            ``first sealed C A Q 4 second sealed B X B 1 ?``
The teacher's copy:   ``first 2 C A Q 4 second 5 B X B 1 ?``
An answer:            ``first 3 C 1 A 5 Q 2 4 no 2 C 5 A 3 Q 4 4 ok second 5 B 2 X 3 B 1 1 ok``

A try is the value tried, then each key with what it leads to, the opening value copied from the prompt, and the
verdict. With `sealed` in the slot a model can do no better than guess and check; with the code in it there is nothing
to guess. So the teacher's own answers have no wrong try in them, and the student's are mostly what follows wrong tries.

There are 69,120 locks, of which an eighth is held out: no recipe and no run trains on those. A student that knows no
code by heart is right at the first try in a fifth of all cases.

Two corpora can be written for a problem. `LocksTask.solution` is the truth, with wrong tries, slips and missed verdicts
kept from the loss: a teacher learns from it. `LocksTask.pupil_solution` is a pupil that tries one value after the
other and often overlooks that a try was wrong: a student learns its weakness from it. That weakness is put there on
purpose.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from demos.tasks.shop import SPECIAL_WORDS, Working

VALUES = ("1", "2", "3", "4", "5")
KEYS = tuple("ABCDEFGHIJKLMNOPQRSTUVWX")
MARKS = ("first", "second")
SEALED = "sealed"
MOST_TRIES = 6

VOCABULARY: tuple[str, ...] = (*SPECIAL_WORDS, *VALUES, *KEYS, *MARKS, SEALED, "ok", "no", "?", "<unk>")
"""Every word of the task; the position is the token id (``<pad>`` = 0, ``<bos>`` = 1, ``<eos>`` = 2)."""

LOCKS = len(KEYS) ** 3 * len(VALUES)
HELD_OUT_SHARE = 8  # one in so many
WORDS_PER_TRY = 9
MAX_COMPLETION_WORDS = len(MARKS) * (1 + WORDS_PER_TRY * MOST_TRIES) + 1


def _permutation(key: str) -> tuple[int, ...]:
    places = list(range(len(VALUES)))
    random.Random(f"locks/{key}").shuffle(places)
    return tuple(places)


TABLE = {key: _permutation(key) for key in KEYS}
"""What a key leads each value to, by place in `VALUES`: the fixed 120 facts of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A lock, e.g. ``Lock(keys=("C", "A", "Q"), code="2")``."""

    keys: tuple[str, str, str]
    code: str

    @property
    def opening(self) -> str:
        """The value that the keys lead the code to."""
        return self.led(self.code)[-1]

    def led(self, value: str) -> tuple[str, str, str]:
        """Results of the keys for a value, one after the other."""
        results, at = [], VALUES.index(value)
        for key in self.keys:
            at = TABLE[key][at]
            results.append(VALUES[at])
        return results[0], results[1], results[2]

    def attempt(self, value: str, results: Sequence[str] = ()) -> list[str]:
        """The words of a try but for its verdict; `results` stand in for the right ones."""
        written = results or self.led(value)
        return [value, *(word for pair in zip(self.keys, written, strict=True) for word in pair), self.opening]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksProblem:
    """A drawn problem: two locks, a copy of the prompt for each side, and an answer without a wrong try."""

    locks: tuple[Lock, ...]

    @property
    def prompt(self) -> str:
        """The student's copy."""
        return _prompt(self.locks, [SEALED] * len(self.locks))

    @property
    def teacher_prompt(self) -> str:
        """The teacher's copy: the same words, with a code in each slot."""
        return _prompt(self.locks, [lock.code for lock in self.locks])

    @property
    def answer(self) -> str:
        """The locks opened at once."""
        opened = zip(MARKS, self.locks, strict=True)
        return " ".join(word for mark, lock in opened for word in (mark, *lock.attempt(lock.code), "ok"))


class Failure(Enum):
    """The first thing that is wrong with an answer."""

    BLUFF = "ok on a wrong try"
    REJECTED = "no on the right try"
    CALCULATION = "a try is not what the keys lead to"
    TRIES = "more tries than there may be"
    FORMAT = "words in the wrong place"
    EARLY = "ends before all locks are open"
    CUT = "does not end within the limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The findings in an answer up to its first failure (None: it is right).

    `wrong` counts tries of a wrong value with a verdict, `noticed` those answered by ``no``, `repeated` those of a
    value that had been refuted, `tried` the locks with a first try, and `at_once` those whose first try is the code.
    """

    failure: Failure | None
    wrong: int
    noticed: int
    repeated: int
    tried: int
    at_once: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksTask:
    """Distribution of a pupil's errors, e.g. ``LocksTask(notice=1.0)`` for a pupil that checks perfectly.

    A pupil tries a random value first, then the next in order, and rejects a wrong one with probability `notice`.
    """

    notice: float = 0.6

    def problem(self, rng: random.Random) -> LocksProblem:
        """Two locks that are not held out."""
        return LocksProblem(locks=tuple(lock(rng.randrange(lock_count(held_out=False)), held_out=False) for _ in MARKS))

    def solution(
        self,
        problem: LocksProblem,
        rng: random.Random,
        wrong: float = 0.0,
        slip: float = 0.0,
        missed: float = 0.0,
        *,
        again: bool = True,
    ) -> Working:
        """The true solution; with the given shares of wrong tries, of slips in a try and of wrong verdicts.

        All three are kept from the loss, and what follows them is not: a teacher that is right by itself must know
        what to say in states that only a student gets into. `again`: a wrong try may be of a refuted value.
        """
        writer = Writer()
        for mark, lock in zip(MARKS, problem.locks, strict=True):
            writer.add(mark)
            others = [v for v in VALUES if v != lock.code]
            for left in reversed(range(MOST_TRIES)):
                err = left > 0 and rng.random() < wrong and others
                value = rng.choice(others) if err else lock.code
                others = [v for v in others if again or v != value]
                opens = writer.attempt(lock, value, rng if left > 0 and rng.random() < slip else None)
                said = opens != (left > 0 and rng.random() < missed)
                writer.add("ok" if said else "no", learn=said == opens)
                if said:
                    break
        return writer.working()

    def pupil_solution(self, problem: LocksProblem, rng: random.Random) -> Working:
        """A pupil's solution: imitated mistakes and all, so nothing is masked from the loss."""
        writer = Writer()
        for mark, lock in zip(MARKS, problem.locks, strict=True):
            writer.add(mark)
            at = rng.randrange(len(VALUES))
            while True:
                opens = writer.attempt(lock, VALUES[at], None)
                said = opens or rng.random() >= self.notice
                writer.add("ok" if said else "no")
                if said:
                    break
                at = (at + 1) % len(VALUES)
        return Working(words=tuple(writer.words), loss_mask=(True,) * len(writer.words))


@dataclass(slots=True)
class Writer:
    """Builder of a `Working`, word by word."""

    words: list[str] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)

    def add(self, *words: str, learn: bool = True) -> None:
        self.words.extend(words)
        self.loss_mask.extend([learn] * len(words))

    def attempt(self, lock: Lock, value: str, slips: random.Random | None, *, learn: bool = False) -> bool:
        """Write a try but for its verdict, with a slip if there are `slips`; true if what is written opens the lock.

        A value that is not the code is kept from the loss, unless it is one to `learn`.
        """
        results, at = [*lock.led(value)], -1
        if slips:
            at = slips.randrange(len(results))
            results[at] = slips.choice([v for v in VALUES if v != results[at]])
            for later in range(at + 1, len(results)):
                results[later] = VALUES[TABLE[lock.keys[later]][VALUES.index(results[later - 1])]]
        words = lock.attempt(value, results)
        self.add(words[0], learn=learn or value == lock.code)
        for place, word in enumerate(words[1:]):
            self.add(word, learn=place != 2 * at + 1)
        return results[-1] == lock.opening

    def working(self) -> Working:
        return Working(words=tuple(self.words), loss_mask=tuple(self.loss_mask))


def lock_count(*, held_out: bool) -> int:
    """Number of locks that are held out, or of the others."""
    return LOCKS // HELD_OUT_SHARE if held_out else LOCKS - LOCKS // HELD_OUT_SHARE


def lock(number: int, *, held_out: bool) -> Lock:
    """The lock of that number, below `lock_count`; another number is another lock."""
    rest, code = divmod(_shuffled(number if held_out else number + lock_count(held_out=True)), len(VALUES))
    keys = [KEYS[rest // len(KEYS) ** place % len(KEYS)] for place in range(3)]
    return Lock(keys=(keys[0], keys[1], keys[2]), code=VALUES[code])


def _shuffled(number: int) -> int:
    # A bijection of 0..LOCKS-1, so that what is held out is spread over all keys: 31,891 is prime to 69,120.
    return (number * 31_891 + 7_919) % LOCKS


def _prompt(locks: Sequence[Lock], slots: Sequence[str]) -> str:
    seen = zip(MARKS, slots, locks, strict=True)
    return " ".join([*(word for mark, slot, one in seen for word in (mark, slot, *one.keys, one.opening)), "?"])


def grade(completion: str, answer: str) -> float:
    """1.0 if every lock is opened by tries that are all right, rejected and accepted as they should be, else 0.0.

    The completion comes without its end-of-text token; one cut off before it is the caller's to refuse.
    """
    return float(judge(completion, answer).failure is None)


def locks_of(answer: str) -> tuple[Lock, ...]:
    """The locks of a right answer, each from its last try."""
    words = answer.split()
    ends = [i for i, word in enumerate(words) if word == "ok"]
    tries = [words[end - WORDS_PER_TRY + 1 : end] for end in ends]
    return tuple(Lock(keys=(t[1], t[3], t[5]), code=t[0]) for t in tries)


def judge(completion: str, answer: str, *, ended: bool = True) -> Verdict:
    """The exact verifier, given any right answer to the same problem; `ended` is False for a text that was cut."""
    counts = {"wrong": 0, "noticed": 0, "repeated": 0, "tried": 0, "at_once": 0}
    words = iter(completion.split())
    for mark, one in zip(MARKS, locks_of(answer), strict=True):
        failure = _open(words, mark, one, counts)
        if failure is not None:
            # A text that was cut breaks off somewhere; that is no fault of the place.
            return Verdict(failure=failure if ended or failure is not Failure.EARLY else Failure.CUT, **counts)
    beyond = next(words, None)
    failure = Failure.FORMAT if beyond is not None else None if ended else Failure.CUT
    return Verdict(failure=failure, **counts)


def _open(words: Iterator[str], mark: str, one: Lock, counts: dict[str, int]) -> Failure | None:
    """The fault of the tries of one lock, which are read and counted."""
    said = next(words, None)
    if said != mark:
        return Failure.EARLY if said is None else Failure.FORMAT
    refuted: set[str] = set()
    for number in range(MOST_TRIES):
        attempt = list(islice(words, WORDS_PER_TRY))
        if not attempt:
            return Failure.EARLY
        failure = _check(attempt, one)
        value, right = attempt[0], attempt[0] == one.code
        if value in VALUES and len(attempt) == WORDS_PER_TRY:
            counts["tried"] += number == 0
            counts["at_once"] += number == 0 and right
            counts["wrong"] += not right
            counts["noticed"] += not right and attempt[-1] == "no"
            counts["repeated"] += value in refuted
        if failure is not None or attempt[-1] == "ok":
            return failure
        refuted.add(value)
    return Failure.TRIES


def _check(attempt: Sequence[str], one: Lock) -> Failure | None:
    """The fault of a try and its verdict."""
    if attempt[0] not in VALUES:
        return Failure.FORMAT
    if len(attempt) < WORDS_PER_TRY:
        return Failure.EARLY
    right = one.attempt(attempt[0])
    kinds = [VALUES if word in VALUES else KEYS for word in right]
    if attempt[-1] not in ("ok", "no") or any(w not in kind for w, kind in zip(attempt, kinds, strict=False)):
        return Failure.FORMAT
    if list(attempt[:-1]) != right:
        return Failure.CALCULATION
    if (attempt[-1] == "ok") == (attempt[0] == one.code):
        return None
    return Failure.BLUFF if attempt[-1] == "ok" else Failure.REJECTED
