"""The 'peak' task: which day had most, found day by day with the record so far written down and checked.

A problem:    ``Mon has 3 7 Tue has 2 9 Wed has 4 1 ?``
Its solution: ``Mon 3 7 = Mon 3 7 ok Tue 2 9 = Mon 3 7 ok Wed 4 1 = Wed 4 1 ok # Wed``

It is written with the words of the shop task (`demos.tasks.shop`), so that models of both share a tokenizer, and asks
for something else: copying and comparing instead of adding. It exists to give one student two specialists. As in the
shop task a line may be rejected with ``no`` and written again, and pupils have a misconception that is put there on
purpose: a hasty pupil compares only the last digits.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from demos.tasks.shop import DAYS, Working

_RETRIES = 2
_WORDS_PER_LINE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Amount of one day, e.g. ``Entry(day="Mon", amount=37)``; amounts have two digits."""

    day: str
    amount: int

    @property
    def words(self) -> tuple[str, str, str]:
        """Day and digits, e.g. ``("Mon", "3", "7")``."""
        return self.day, str(self.amount // 10), str(self.amount % 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakProblem:
    """A drawn problem, e.g. ``prompt="Mon has 3 7 Tue has 2 9 ?"``, ``answer="Mon"`` and its entries."""

    prompt: str
    answer: str
    entries: tuple[Entry, ...]


@dataclass(slots=True)
class _Writer:
    words: list[str] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)

    def line(self, entry: Entry, record: Entry, right: Entry, verdict: str) -> None:
        """Write one day; a wrong record and a wrong verdict are kept from the loss."""
        self.add(*entry.words, "=")
        self.add(*record.words, learn=record == right)
        self.add(verdict, learn=(record == right) == (verdict == "ok"))

    def add(self, *words: str, learn: bool = True) -> None:
        self.words.extend(words)
        self.loss_mask.extend([learn] * len(words))


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakTask:
    """Distribution of problems and of a pupil's errors, e.g. ``PeakTask(min_days=6)`` for long problems only.

    The pupil compares only the last digits with probability `hasty` where that changes the outcome, errs with
    probability `slip` elsewhere, and rejects a wrong line with probability `notice`.
    """

    min_days: int = 4
    max_days: int = 6
    hasty: float = 0.5
    slip: float = 0.03
    notice: float = 0.3

    def __post_init__(self) -> None:
        if not 2 <= self.min_days <= self.max_days <= len(DAYS):
            raise ValueError(
                f"PeakTask needs 2 <= min_days <= max_days <= {len(DAYS)} (one day per weekday), "
                f"but got min_days={self.min_days} and max_days={self.max_days}."
            )

    @property
    def max_completion_words(self) -> int:
        """Room for every day, two rejected lines, the answer and the end-of-text token: 67 for six days."""
        return _WORDS_PER_LINE * (self.max_days + 2) + 3

    def problem(self, rng: random.Random) -> PeakProblem:
        """Draw a problem; all amounts (10..99) differ, so the answer is unique."""
        days = DAYS[: rng.randint(self.min_days, self.max_days)]
        entries = tuple(
            Entry(day=d, amount=a) for d, a in zip(days, rng.sample(range(10, 100), len(days)), strict=True)
        )
        words = [word for e in entries for word in (e.day, "has", *e.words[1:])]
        answer = max(entries, key=lambda e: e.amount).day
        return PeakProblem(prompt=" ".join([*words, "?"]), answer=answer, entries=entries)

    def solution(self, problem: PeakProblem, rng: random.Random, mistakes: float = 0.0) -> Working:
        """The true solution, with `mistakes` for a teacher to learn to repair.

        Each line begins, with that probability, with a wrong one that is rejected and repaired (at most twice), and
        with a quarter of it ends in an unnoticed slip, from which the following days go on. Mistakes are
        kept from the loss.
        """
        writer, record = _Writer(), problem.entries[0]
        for entry in problem.entries:
            right, wrong = _compare(record, entry)
            for _ in range(_RETRIES * (wrong != right)):
                if rng.random() >= mistakes:
                    break
                writer.line(entry, wrong, right, "no")
            record = wrong if rng.random() < mistakes / 4 else right
            writer.line(entry, record, right, "ok")
        writer.add("#", record.day)
        return Working(words=tuple(writer.words), loss_mask=tuple(writer.loss_mask))

    def pupil_solution(self, problem: PeakProblem, rng: random.Random) -> Working:
        """A pupil's solution: imitated mistakes and all, so nothing is masked from the loss."""
        writer, record = _Writer(), problem.entries[0]
        for entry in problem.entries:
            right, wrong = _compare(record, entry)
            written = right
            for attempt in range(_RETRIES + 1):
                written = wrong if rng.random() < self._chance_of_error(record, entry, right) else right
                noticed = written != right and attempt < _RETRIES and rng.random() < self.notice
                writer.line(entry, written, right, "no" if noticed else "ok")
                if not noticed:
                    break
            record = written
        writer.add("#", record.day)
        return Working(words=tuple(writer.words), loss_mask=(True,) * len(writer.words))

    def _chance_of_error(self, record: Entry, entry: Entry, right: Entry) -> float:
        return self.hasty if hasty_choice((record, entry)) != right else self.slip


def hasty_choice(entries: Sequence[Entry]) -> Entry:
    """The day whose last digit is largest, the earlier one on a tie: a pupil's wrong choice of the largest amount.

    Example: of Mon 37 and Tue 29 it is Tue.
    """
    return max(entries, key=lambda e: e.amount % 10)


def grade(completion: str, answer: str) -> float:
    """1.0 if the completion ends with ``#`` and the right day, else 0.0.

    Example: ``grade("Mon 3 7 = Mon 3 7 ok # Mon", "Mon") == 1.0``.
    """
    return float(completion.split()[-2:] == ["#", answer])


def answer_of(completion: str) -> str:
    """Answer of a completion: the word behind the ``#`` with which it ends, else ""."""
    words = completion.split()
    return words[-1] if words[-2:-1] == ["#"] else ""


def _compare(record: Entry, entry: Entry) -> tuple[Entry, Entry]:
    """The right record after `entry`, and the wrong one (the same where there is nothing to compare)."""
    return (record, entry) if record.amount > entry.amount else (entry, record)
