"""Gradability of references: notation is checked first, which is cheap, and the math library last."""

import re
from collections.abc import Iterator

from launch.inputs.answers import expressions, finding
from launch.inputs.answers.kinds import (
    Answer,
    Choice,
    Clock,
    Expression,
    Group,
    Matrix,
    Named,
    Ratio,
    Relation,
    Union,
    Unreadable,
)
from launch.inputs.answers.notation import FUNCTIONS

_KNOWN = FUNCTIONS | frozenset(
    re.findall(
        r"\w+",
        "frac sqrt pi cdot times div infty binom pm le ge neq alpha beta gamma delta epsilon theta lambda mu nu rho "
        "sigma tau phi psi omega Delta Gamma Lambda Omega Phi Sigma lfloor rfloor lceil rceil degree text hbar ell",
    )
)
_BROKEN = re.compile(r"[-+/^_]\s*$|^\s*[/^_]|[+/^_]\s*[+/^_]|\{\s*\}|\(\s*\)")


def doubtful(answer: str) -> str | None:
    """Reason why a reference cannot be read; "" if nothing is wrong with it, None if only the library can decide."""
    unknown = False
    for leaf in _leaves(finding.reference(answer)):
        if isinstance(leaf, Unreadable):
            return leaf.why
        if expressions.number(leaf) is not None:
            continue
        if _BROKEN.search(leaf):
            return f"{leaf!r} is no formula"
        unknown |= not set(re.findall(r"\\([A-Za-z]+)", leaf)) <= _KNOWN
    return None if unknown else ""


def trouble(answer: str) -> str:
    """Reason why a reference cannot be graded, "" if it can. Every formula is parsed and evaluated, which may never
    end.
    """
    for leaf in _leaves(finding.reference(answer)):
        if isinstance(leaf, Unreadable):
            return leaf.why
        if not expressions.evaluated(leaf):
            return f"{leaf!r} is no formula that can be read"
    return ""


def _leaves(answer: Answer) -> Iterator[str | Unreadable]:
    """All formulas of an answer, and its unreadable parts."""
    match answer:
        case Expression():
            if not answer.base:
                yield answer.latex
        case Unreadable():
            yield answer
        case Relation():
            yield from answer.sides
        case Named():
            yield from _leaves(answer.value)
        case Choice() | Clock():
            pass
        case Group() | Union() | Ratio():
            for item in answer.items:
                yield from _leaves(item)
        case Matrix():
            for row in answer.rows:
                for cell in row:
                    yield from _leaves(cell)
        case _:
            pass
