"""Ranges of settings: the marks in a field's annotation, and the ranges that several fields share.

Every number has an upper end, too: what is beyond it was mistyped, and would otherwise be found when memory runs out.
`opd.settings.validation` checks them.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any


def number(value: float | int) -> str:
    """A bound in short decimal notation."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:g}"


@dataclass(frozen=True, slots=True)
class In:
    """A number from `low` to `high`; an open end is left out, `or_zero` lets 0 in (usually: none of it).

    `because` says why where it is not obvious. Example: `Annotated[float, In(0, 1, low_open=True)]`.
    """

    low: float | int
    high: float | int
    low_open: bool = False
    high_open: bool = False
    or_zero: bool = False
    because: str = ""

    def allows(self, value: Any) -> bool:
        """Whether the value is in the range; NaN is in none."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return (above and below) or (self.or_zero and value == 0)

    def says(self, kind: str) -> str:
        """The range as a sentence's object: `a number from 0 to 100`."""
        low = f"above {number(self.low)}" if self.low_open else f"from {number(self.low)}"
        high = f"below {number(self.high)}" if self.high_open else f"{number(self.high)}"
        joint = " and " if self.low_open or self.high_open else " to "
        high = f"at most {high}" if self.low_open and not self.high_open else high
        return f"{'0, or ' if self.or_zero else ''}{kind} {low}{joint}{high}"


@dataclass(frozen=True, slots=True)
class Matches:
    """A text of the form `pattern`, which errors call `form`. Example: `Matches(r"[a-z]+", "small letters")`."""

    pattern: str
    form: str
    because: str = ""

    def allows(self, value: Any) -> bool:
        """Whether the whole text has the form."""
        return re.fullmatch(self.pattern, value) is not None

    def says(self, kind: str) -> str:
        """The form as a sentence's object: `text of small letters`."""
        return f"{kind} {self.form}"


@dataclass(frozen=True, slots=True)
class Length:
    """At least `least` members (of a list or a mapping)."""

    least: int
    because: str = ""

    def allows(self, value: Any) -> bool:
        """Whether there are enough."""
        return len(value) >= self.least

    def says(self, kind: str) -> str:
        """The length as a sentence's object: `a list of texts (at least 1)`."""
        return f"{kind} (at least {self.least})"


@dataclass(frozen=True, slots=True)
class AtMost:
    """A bound known only in a planned run (`launch.plan.checks.settings`): `AtMost("the vocabulary")`."""

    fact: str


@dataclass(frozen=True, slots=True)
class Whole:
    """A fraction of a device or processor, or several whole ones: Ray's rule."""

    because: str = "a part of one, or several whole ones"

    def allows(self, value: Any) -> bool:
        """Whether there is no fraction above 1."""
        return value <= 1 or float(value).is_integer()

    def says(self, kind: str) -> str:
        """The rule as a sentence's object."""
        return f"{kind}, whole above 1"


@dataclass(frozen=True, slots=True)
class Harmless:
    """Mark of a setting (or of a group of them) that a resumed run may change: the same training comes out.

    A setting without it decides what is trained. Example: `Annotated[Replicas, HARMLESS]`.
    """


HARMLESS = Harmless()
Count = Annotated[int, In(1, 1_000_000)]
Replicas = Annotated[int, In(1, 10_000)]
Tokens = Annotated[int, In(1, 100_000_000)]
Bytes = Annotated[int, In(1, 2**50)]
Seed = Annotated[int, In(0, 2**32 - 1)]
Steps = Annotated[int, In(1, 1_000_000_000)]
Every = Annotated[int, In(0, 1_000_000_000)]  # 0: never
TopIds = Annotated[int, In(1, 1_000_000), AtMost("vocabulary")]
Fraction = Annotated[float, In(0, 1)]
Relative = Annotated[float, In(1e-6, 1e6, because="shares are divided by their sum")]
PromptsPerStep = Annotated[int, In(1, 20_000, because="a step's prompts are in memory at once")]
GroupSize = Annotated[int, In(1, 4096, because="a step's prompts are in memory at once")]
WEEK_S = 7 * 24 * 3600.0
Deadline = Annotated[float, In(1, WEEK_S, because="it bounds a wait, and a wait without an end hides what hangs")]
Temperature = Annotated[float, In(0.01, 100, or_zero=True, because="0 is greedy, 1 the model's own distribution")]
TopP = Annotated[float, In(0.001, 1)]
MemoryShare = Annotated[float, In(0.01, 1, because="it is a share of the whole device")]
TrustRegion = Annotated[float, In(0, 1e6, because="nats of a KL divergence: 0 is the student, a million any teacher")]
OptionalName = Annotated[str, Matches(r"[^\x00-\x1f]{0,200}", "of one line (up to 200 characters)")]
Names = Annotated[str, Matches(r"[^\s\x00-\x1f][^\x00-\x1f]{0,199}", "of one line (1 to 200 characters)")]
RunName = Annotated[
    str,
    Matches(
        r"([A-Za-z0-9][A-Za-z0-9._=,+-]{0,149})?",
        "of letters, digits and . _ = , + -, beginning with a letter or digit",
    ),
]
Template = Annotated[str, Matches(r"[^\x00]{0,100000}", "of at most 100000 characters")]
Line = Annotated[str, Matches(r"[^\x00-\x1f\x7f]{0,1000}", "of one line (at most 1000 characters)")]
