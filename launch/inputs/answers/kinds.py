"""Kinds of answers: a small tree whose leaves are LaTeX or words. Nothing here knows sympy."""

from dataclasses import dataclass

SET, TUPLE, BARE = ("\\{", "\\}"), ("(", ")"), ("", "")
"""Brackets of a group: braces and no brackets mean any order, round and square ones a tuple or an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """A number or a formula, e.g. `12\\text{ cm}` is `Expression(latex="12", unit="cm")`; `%` is a unit, too.

    `base` are the digits' base where it is written (`132_7`), else "".
    """

    latex: str
    unit: str = ""
    base: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Words, lower case, without punctuation, e.g. `\\text{Tuesday}` is `Text(words="tuesday")`."""

    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of the offered answers, e.g. `(B) 12` is `Choice(letter="B", of=Expression(latex="12"))`."""

    letter: str
    of: "Answer | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Several answers with the brackets around them, e.g. `[0, 1)` has brackets `("[", ")")`."""

    brackets: tuple[str, str]
    items: "tuple[Answer, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """Sets or intervals joined by a cup."""

    items: "tuple[Answer, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Rows of answers."""

    rows: "tuple[tuple[Answer, ...], ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Terms of a ratio, e.g. `3:4`."""

    items: "tuple[Answer, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A time of day, e.g. `3:05 p.m.` is `Clock(hour=3, minute=5, half="p")`; `half` is "" where it is not written."""

    hour: int
    minute: int
    half: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A value with its name, e.g. `x = 5`, `f(x) = 2x`, `x \\in (0, 1)`."""

    name: str
    value: "Answer"
    member: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """An equation, an inequality or a chain of them. `signs` are `=`, `<`, `\\le`, `\\neq`; one fewer than `sides`."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Text that no rule reads: equal to nothing but the same characters."""

    why: str


Answer = Expression | Text | Choice | Group | Union | Matrix | Ratio | Clock | Named | Relation | Unreadable
