"""The 'shop' task: follow a stock day by day, one written and checked line per day.

A problem:    ``has 3 7 ; Mon gives 8 Tue buys 4 ?``
Its solution: ``Mon 3 7 - 8 = 2 9 ok Tue 2 9 + 4 = 3 3 ok # 3 3``

Numbers are written digit by digit, so a line that crosses a ten needs a carry or a borrow. A line may be
rejected with ``no`` and written again. Problems are drawn, not stored: every step can have new ones.

Two corpora can be written for a problem. `ShopTask.solution` is the truth, with mistakes that are rejected
and repaired: a teacher learns from it. `ShopTask.pupil_solution` is the writing of a pupil that often forgets
the carry: a student learns its weakness from it. That weakness is put there on purpose, so what a
distillation run gains on this task shows the mechanism; it is no evidence about language models at large.

`<bos>` and `<eos>` never appear in the texts of this module: the tokenizer writes the first, and the
trainer or sampler handles the second.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

Sign = Literal["+", "-"]

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
VERBS: dict[Sign, tuple[str, ...]] = {"+": ("buys", "finds", "gets"), "-": ("gives", "loses", "sells")}
SPECIAL_WORDS = ("<pad>", "<bos>", "<eos>")

VOCABULARY: tuple[str, ...] = (
    *SPECIAL_WORDS,
    *"0123456789",
    *("+", "-", "=", ";", "#", "?"),
    *("ok", "no", "has"),
    *VERBS["+"],
    *VERBS["-"],
    *DAYS,
    "<unk>",
)
"""Every word of the task; the position is the token id (``<pad>`` = 0, ``<bos>`` = 1, ``<eos>`` = 2)."""

_WORDS_PER_LINE = 9
_WORDS_OF_ANSWER = 3
_RETRIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """True event of one day, e.g. ``Step(day="Mon", before=37, sign="-", amount=8, after=29)``."""

    day: str
    before: int
    sign: Sign
    amount: int
    after: int


Rule = Callable[[Step], int]
"""What a teacher takes for a day's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopProblem:
    """A drawn problem, e.g. ``prompt="has 3 7 ; Mon gives 8 ?"``, ``answer="2 9"`` and its one `Step`."""

    prompt: str
    answer: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """A written solution, word by word, with its loss mask (False for injected mistakes).

    Example: ``words=("Mon", "3", "7", "-", "8", "=", "3", "9", "no", ...)`` with ``loss_mask`` False at the
    ``3`` after ``=`` (37 - 8 is 29) and True elsewhere.
    """

    words: tuple[str, ...]
    loss_mask: tuple[bool, ...]

    @property
    def text(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(self.words)


@dataclass(slots=True)
class _Writer:
    """Builder of a `Working`, word by word."""

    words: list[str] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)

    def line(self, step: Step, result: int, verdict: str) -> None:
        """Write one day; only the wrong words are masked from the loss: those after them are trained."""
        self._add(step.day, *_digits(step.before), step.sign, str(step.amount), "=")
        for digit, right in zip(_digits(result), _digits(step.after), strict=True):
            self._add(digit, learn=digit == right)
        # An `ok` after a wrong line is a mistake as well; a `no` after one is exactly what should be learned.
        self._add(verdict, learn=(result == step.after) == (verdict == "ok"))

    def answer(self, value: int) -> None:
        self._add("#", *_digits(value))

    def working(self, *, learn_all: bool = False) -> Working:
        mask = [True] * len(self.words) if learn_all else self.loss_mask
        return Working(words=tuple(self.words), loss_mask=tuple(mask))

    def _add(self, *words: str, learn: bool = True) -> None:
        self.words.extend(words)
        self.loss_mask.extend([learn] * len(words))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopTask:
    """Distribution of problems and of a pupil's errors, e.g. ``ShopTask(min_days=6)`` for long problems only.

    The pupil forgets the carry on a line that crosses a ten with probability `forget_carry`, is off by one
    with probability `slip` on a line where it did not, and rejects a wrong line with probability `notice`.
    """

    min_days: int = 4
    max_days: int = 6
    max_change: int = 9
    forget_carry: float = 0.5
    slip: float = 0.03
    notice: float = 0.3

    def __post_init__(self) -> None:
        if not 1 <= self.min_days <= self.max_days <= len(DAYS):
            raise ValueError(
                f"ShopTask needs 1 <= min_days <= max_days <= {len(DAYS)} (one day per weekday), "
                f"but got min_days={self.min_days} and max_days={self.max_days}."
            )
        if not 1 <= self.max_change <= 9:
            raise ValueError(
                f"ShopTask writes an amount as one digit, so max_change must be 1..9, got {self.max_change}."
            )

    @property
    def max_completion_words(self) -> int:
        """Room for every day, two rejected lines, the answer and the end-of-text token: 76 for six days."""
        return _WORDS_PER_LINE * (self.max_days + 2) + _WORDS_OF_ANSWER + 1

    def problem(self, rng: random.Random) -> ShopProblem:
        """Draw a problem; the stock stays a two-digit number (10..99) on every day."""
        value = rng.randint(10, 99)
        words = ["has", *_digits(value), ";"]
        steps: list[Step] = []
        for day in DAYS[: rng.randint(self.min_days, self.max_days)]:
            step = self._step(day, value, rng)
            words += [day, rng.choice(VERBS[step.sign]), str(step.amount)]
            steps.append(step)
            value = step.after
        return ShopProblem(prompt=" ".join([*words, "?"]), answer=" ".join(_digits(value)), steps=tuple(steps))

    def solution(
        self, problem: ShopProblem, rng: random.Random, mistakes: float = 0.0, rule: Rule = lambda step: step.after
    ) -> Working:
        """The true solution (or that of another `rule`), with `mistakes` for a teacher to learn to repair.

        With ``mistakes=0`` this is the plain truth and its grade is 1. Otherwise each day begins, with that
        probability, with a wrong line that is rejected and repaired (at most twice), and with a quarter of it
        the day ends in an unnoticed slip: the following days go on from the wrong stock, as a
        student's text would, so that the teacher sees such states too. Mistakes are kept from the loss.
        """
        writer = _Writer()
        value = problem.steps[0].before
        for planned in problem.steps:
            step = _from_stock(planned, value)
            step = replace(step, after=rule(step))
            for _ in range(_RETRIES):
                if rng.random() >= mistakes:
                    break
                writer.line(step, _wrong_result(step, rng), "no")
            value = step.after
            if rng.random() < mistakes / 4:
                value = (value + rng.choice((10, -10, 1, -1))) % 100
            writer.line(step, value, "ok")
        writer.answer(value)
        return writer.working()

    def pupil_solution(self, problem: ShopProblem, rng: random.Random) -> Working:
        """A pupil's solution: imitated mistakes and all, so nothing is masked from the loss."""
        writer = _Writer()
        value = problem.steps[0].before
        for planned in problem.steps:
            step = _from_stock(planned, value)
            for attempt in range(_RETRIES + 1):
                value = self._pupil_result(step, rng)
                noticed = value != step.after and attempt < _RETRIES and rng.random() < self.notice
                writer.line(step, value, "no" if noticed else "ok")
                if not noticed:
                    break
        writer.answer(value)
        return writer.working(learn_all=True)

    def _step(self, day: str, before: int, rng: random.Random) -> Step:
        while True:
            sign: Sign = rng.choice(("+", "-"))
            amount = rng.randint(1, self.max_change)
            after = before + amount if sign == "+" else before - amount
            if 10 <= after <= 99:
                return Step(day=day, before=before, sign=sign, amount=amount, after=after)

    def _pupil_result(self, step: Step, rng: random.Random) -> int:
        forgotten = without_carry(step)
        if forgotten is not None and rng.random() < self.forget_carry:
            return forgotten
        if rng.random() < self.slip:
            return (step.after + rng.choice((1, -1))) % 100
        return step.after


def without_carry(step: Step) -> int | None:
    """Result of a line whose carry or borrow was forgotten; None where there is none to forget.

    Example: 37 - 8 gives 39 (the borrow from the 3 is missing), 33 + 4 gives None.
    """
    tens = step.before // 10
    crossing = (step.before % 10 + step.amount > 9) if step.sign == "+" else (step.before % 10 < step.amount)
    return tens * 10 + step.after % 10 if crossing else None


def grade(completion: str, answer: str) -> float:
    """1.0 if the completion ends with ``#`` and the two digits of the answer, else 0.0.

    The completion comes without its end-of-text token; one cut off before it is the caller's to refuse.
    Example: ``grade("Mon 3 7 - 8 = 2 9 ok # 2 9", "2 9") == 1.0``.
    """
    return float(completion.split()[-_WORDS_OF_ANSWER:] == ["#", *answer.split()])


def answer_of(completion: str) -> str:
    """Answer of a completion: the two words behind its last ``#``, where it ends with them, else "".

    Example: ``answer_of("Mon 3 7 - 8 = 2 9 ok # 2 9") == "2 9"``.
    """
    mark, *answer = completion.split()[-_WORDS_OF_ANSWER:] or [""]
    return " ".join(answer) if mark == "#" and len(answer) == _WORDS_OF_ANSWER - 1 else ""


def _digits(value: int) -> tuple[str, str]:
    return str(value // 10), str(value % 10)


def _apply(before: int, sign: Sign, amount: int) -> int:
    # Modulo 100: from a wrong stock a day may lead out of the two digits, and must still be writable.
    return (before + amount if sign == "+" else before - amount) % 100


def _from_stock(step: Step, value: int) -> Step:
    """The same event from another stock: an earlier mistake may have left the true path."""
    return replace(step, before=value, after=_apply(value, step.sign, step.amount))


def _wrong_result(step: Step, rng: random.Random) -> int:
    """A wrong result: mostly a pupil's, where there is a carry to forget; else a small error."""
    forgotten = without_carry(step)
    if forgotten not in (None, step.after) and rng.random() < 0.6:
        return forgotten
    return (step.after + rng.choice((1, -1, 2, -2, 10, -10))) % 100
