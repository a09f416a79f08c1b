"""Equality of a given answer and the reference. The rules are in docs/grading.md."""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from launch.inputs.answers import expressions, ratios, units
from launch.inputs.answers.kinds import (
    BARE,
    SET,
    TUPLE,
    Answer,
    Choice,
    Clock,
    Expression,
    Group,
    Matrix,
    Named,
    Ratio,
    Relation,
    Text,
    Union,
    Unreadable,
)

_LESS = {"<": "(", "\\le": "["}


def same(gold: Answer, given: Answer) -> bool:
    """Whether two values are equal; `gold` is the reference, whose brackets and names count."""
    if isinstance(gold, Unreadable) or isinstance(given, Unreadable):
        return False
    if gold == given:
        return True
    if isinstance(gold, Choice) or isinstance(given, Choice):
        return _choices(gold, given)
    if isinstance(gold, Named | Relation) or isinstance(given, Named | Relation):
        return _relations(gold, given)
    if isinstance(gold, Group | Union | Matrix) or isinstance(given, Group | Union | Matrix):
        return _collections(gold, given)
    if isinstance(gold, Clock) and isinstance(given, Clock | Ratio):
        return ratios.same_time(gold, given)
    if isinstance(gold, Expression) and isinstance(given, Expression):
        return _expressions(gold, given)
    if isinstance(gold, Ratio | Expression) and isinstance(given, Ratio | Expression | Clock):
        return ratios.same_ratio(gold, given)
    return isinstance(gold, Text | Expression) and isinstance(given, Text | Expression) and _words(gold, given)


def _words(gold: Text | Expression, given: Text | Expression) -> bool:
    left, right = (
        a.words if isinstance(a, Text) else f"{a.latex} {a.unit}".replace("\\", "").strip().casefold()
        for a in (gold, given)
    )
    return left == right


def _choices(gold: Answer, given: Answer) -> bool:
    if isinstance(gold, Choice) and isinstance(given, Choice):
        return gold.letter == given.letter
    choice, other = (gold, given) if isinstance(gold, Choice) else (given, gold)
    assert isinstance(choice, Choice)
    if choice.of is not None and same(*((choice.of, other) if choice is gold else (other, choice.of))):
        return True
    if isinstance(other, Expression):
        letter = other.latex.strip("() ")
        return not other.unit and choice.letter == (letter.upper() if choice is gold else letter)
    if isinstance(other, Named):  # "the answer is B" in signs
        return same(gold, other.value) if choice is gold else same(other.value, given)
    if isinstance(other, Group) and other.brackets != BARE and len(other.items) == 1:
        return same(choice, other.items[0])
    return isinstance(other, Text) and other.words == choice.letter.casefold()


def _relations(gold: Answer, given: Answer) -> bool:
    if isinstance(gold, Named) and isinstance(given, Named):
        if gold.name == given.name or _wordy(gold.name) or _wordy(given.name):
            return same(gold.value, given.value)
        return _equations(gold, given)
    if isinstance(gold, Named) and not isinstance(given, Relation):
        return same(gold.value, given)
    if isinstance(given, Named) and not isinstance(gold, Relation):
        return same(gold, given.value)
    if isinstance(gold, Relation) and isinstance(given, Relation):
        return _same_relation(gold, given) or _both_intervals(gold, given)
    if isinstance(gold, Relation | Named) and isinstance(given, Relation | Named):
        return _equations(gold, given) or _both_intervals(gold, given)
    return _both_intervals(gold, given)


def _wordy(name: str) -> bool:
    """Whether a name only describes the value, e.g. `Area` or `f(x)` against `y`."""
    return "\\text" in name or (len(name) > 2 and name.isalpha())


def _sides(answer: Answer) -> tuple[str, str] | None:
    """Two sides of an equation as LaTeX."""
    if isinstance(answer, Relation):
        return (answer.sides[0], answer.sides[1]) if answer.signs == ("=",) else None
    if isinstance(answer, Named) and not answer.member and isinstance(answer.value, Expression):
        return answer.name, answer.value.latex
    return None


def _equations(gold: Answer, given: Answer) -> bool:
    left, right = _sides(gold), _sides(given)
    return left is not None and right is not None and expressions.proportional(left, right, directed=False)


def _same_relation(gold: Relation, given: Relation) -> bool:
    if gold.signs == given.signs and all(expressions.equal(a, b) for a, b in zip(gold.sides, given.sides, strict=True)):
        return True
    if len(gold.signs) != 1 or gold.signs != given.signs:
        return False
    directed = gold.signs[0] in _LESS
    return expressions.proportional(gold.sides[:2], given.sides[:2], directed=directed)  # type: ignore[arg-type]


def _both_intervals(gold: Answer, given: Answer) -> bool:
    left, right = interval(gold), interval(given)
    if left is None or right is None or (left == gold and right == given):
        return False
    return same(left, right)


def interval(answer: Answer) -> Answer | None:
    r"""A set of numbers as intervals: `1 < x \le 3` as `(1, 3]`, `x < 1 or x > 3` as a union."""
    if isinstance(answer, Named):
        return interval(answer.value)
    if isinstance(answer, Union) or (isinstance(answer, Group) and answer.brackets != BARE):
        return answer
    if isinstance(answer, Group):
        pieces = [interval(item) for item in answer.items]
        return None if any(p is None for p in pieces) else Union(items=tuple(p for p in pieces if p is not None))
    if isinstance(answer, Relation) and answer.signs == ("\\neq",) and re.fullmatch(r"[A-Za-z]", answer.sides[0]):
        point = Expression(latex=answer.sides[1])
        below = Group(brackets=TUPLE, items=(Expression(latex="-\\infty"), point))
        return Union(items=(below, Group(brackets=TUPLE, items=(point, Expression(latex="\\infty")))))
    if not isinstance(answer, Relation) or any(sign not in _LESS for sign in answer.signs):
        return None
    if len(answer.sides) == 2 and (size := re.fullmatch(r"\|([A-Za-z])\|", answer.sides[0])):
        bounds = (f"-({answer.sides[1]})", size.group(1), answer.sides[1])
        return interval(Relation(sides=bounds, signs=answer.signs * 2))
    names = [side.isalpha() and len(side) == 1 for side in answer.sides]
    if sum(names) != 1:
        return None
    at = names.index(True)
    low, high = Expression(latex="-\\infty"), Expression(latex="\\infty")
    opening, closing = "(", ")"
    if at > 0:
        low, opening = Expression(latex=answer.sides[at - 1]), _LESS[answer.signs[at - 1]]
    if at + 1 < len(answer.sides):
        high = Expression(latex=answer.sides[at + 1])
        closing = {"(": ")", "[": "]"}[_LESS[answer.signs[at]]]
    return Group(brackets=(opening, closing), items=(low, high)) if len(answer.sides) <= 3 else None


def _collections(gold: Answer, given: Answer) -> bool:
    if isinstance(gold, Matrix) and isinstance(given, Matrix):
        return [len(r) for r in gold.rows] == [len(r) for r in given.rows] and all(
            same(a, b) for p, q in zip(gold.rows, given.rows, strict=True) for a, b in zip(p, q, strict=True)
        )
    if isinstance(gold, Matrix) or isinstance(given, Matrix):
        left, right = _vector(gold), _vector(given)
        return left is not None and right is not None and _ordered(left, right)
    if isinstance(gold, Union) or isinstance(given, Union):
        left, right = (interval(a) for a in (gold, given))
        if isinstance(left, Union) and isinstance(right, Union):
            return matched(left.items, right.items, same)
        return False
    if isinstance(gold, Group) and isinstance(given, Group):
        return _groups(gold, given)
    group, other = (gold, given) if isinstance(gold, Group) else (given, gold)
    assert isinstance(group, Group)
    if len(group.items) == 1 and group.brackets == SET:
        return same(group.items[0], other) if group is gold else same(other, group.items[0])
    return _letters(group, other)


def _letters(group: Group, other: Answer) -> bool:
    """Several choices as one word: `A, C` as `AC`."""
    word = other.latex if isinstance(other, Expression) else other.words.upper() if isinstance(other, Text) else ""
    letters = [item.letter for item in group.items if isinstance(item, Choice)]
    return len(letters) == len(group.items) and group.brackets == BARE and sorted(letters) == sorted(word)


def _groups(gold: Group, given: Group) -> bool:
    unordered = (SET, BARE)
    if gold.brackets in unordered and given.brackets in unordered:
        if gold.brackets == given.brackets == BARE:
            names = [item.name if isinstance(item, Named) else "" for item in (*gold.items, *given.items)]
            half = len(gold.items)
            if len(gold.items) == len(given.items) and len(set(names[:half]) - {""}) > 1 != (
                len(set(names[half:])) > 1
            ):
                return _ordered(gold.items, given.items)  # x = 1, y = 2 against 1, 2
        return matched(gold.items, given.items, same) or _both_unions(gold, given)
    if gold.brackets == given.brackets:
        return _ordered(gold.items, given.items)
    # A pair may lose its brackets, not gain others; what reaches to infinity is an interval.
    plain = {gold.brackets, given.brackets} == {TUPLE, BARE}
    endless = any(isinstance(i, Expression) and "\\infty" in i.latex for i in (*gold.items, *given.items))
    return plain and not endless and _ordered(gold.items, given.items)


def _both_unions(gold: Group, given: Group) -> bool:
    if gold.brackets != BARE or given.brackets != BARE:
        return False
    left, right = interval(gold), interval(given)
    return left is not None and right is not None and same(left, right)


def _vector(answer: Answer) -> Sequence[Answer] | None:
    if isinstance(answer, Group):
        return answer.items if answer.brackets == TUPLE else None
    if isinstance(answer, Matrix):
        if all(len(row) == 1 for row in answer.rows):
            return [row[0] for row in answer.rows]
        return answer.rows[0] if len(answer.rows) == 1 else None
    return None


def _ordered(gold: Sequence[Answer], given: Sequence[Answer]) -> bool:
    return len(gold) == len(given) and all(same(a, b) for a, b in zip(gold, given, strict=True))


def matched(gold: Sequence[Answer], given: Sequence[Answer], equal: Callable[[Answer, Answer], bool]) -> bool:
    """Whether every item has a partner. Equality is transitive enough for the first that fits to be taken."""
    if len(gold) != len(given):
        return False
    left = list(given)
    for item in gold:
        partner = next((other for other in left if equal(item, other)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _expressions(gold: Expression, given: Expression) -> bool:
    if gold.base or given.base:
        return gold.latex.casefold() == given.latex.casefold() and (
            not (gold.base and given.base) or gold.base == given.base
        )
    if bool(gold.unit) != bool(given.unit):
        with_unit, other = (gold, given) if gold.unit else (given, gold)
        latex, unit = units.letter_unit(other.latex)
        if unit and units.measure(with_unit.unit).dimensions:
            plain = Expression(latex=latex, unit=unit)
            if _expressions(*((gold, plain) if with_unit is gold else (plain, given))):
                return True
        return expressions.equal(gold.latex, given.latex) or _converted(with_unit, other)
    left, right = units.measure(gold.unit), units.measure(given.unit)
    if left.dimensions != right.dimensions:
        return not (left.dimensions and right.dimensions) and expressions.equal(gold.latex, given.latex)
    if left.factor == right.factor:
        return expressions.equal(gold.latex, given.latex)
    return expressions.equal(expressions.times(gold.latex, left.factor), expressions.times(given.latex, right.factor))


def _converted(with_unit: Expression, other: Expression) -> bool:
    """A percentage or an angle as a plain number: 12% and 0.12, 90 degrees and pi/2."""
    if with_unit.unit == "%":
        return expressions.equal(expressions.times(with_unit.latex, Fraction(1, 100)), other.latex)
    if with_unit.unit == "degree":
        return "\\pi" in other.latex and expressions.equal(f"\\frac{{({with_unit.latex}) \\pi}}{{180}}", other.latex)
    return False
