"""Ratios and times of day, which are both written with colons: 12:00 is no ratio of 12 to nothing."""

import re
from math import gcd

from launch.inputs.answers import expressions
from launch.inputs.answers.kinds import Clock, Expression, Ratio

_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)\s*(?:([AaPp])\.?\s?[Mm]\.?)?")
_DAY = 24 * 60


def clock(text: str) -> Clock | None:
    """A time of day: one with its half of the day, with a zero before its minutes, or not in lowest terms."""
    match = _CLOCK.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip())
    if match is None:
        return None
    hour, minute, half = int(match[1]), int(match[2]), (match[3] or "").lower()
    if hour > 24 or (half and not 1 <= hour <= 12):
        return None
    sure = bool(half) or match[2][0] == "0" or gcd(hour, minute) > 1
    return Clock(hour=hour, minute=minute, half=half) if sure else None


def same_time(gold: Clock, given: Clock | Ratio) -> bool:
    """Whether two times are one, if a half of the day that one of them leaves out is the other's."""
    other = given if isinstance(given, Clock) else _as_time(given)
    if other is None:
        return False
    left, right = _minutes(gold), _minutes(other)
    if bool(gold.half) != bool(other.half):  # 3:00 may be 3 p.m.; 15:00 is no morning
        named, plain = (gold, other) if gold.half else (other, gold)
        return (left - right) % _DAY == 0 or (plain.hour <= 12 and _minutes(named) % 720 == _minutes(plain) % 720)
    return left == right


def _minutes(time: Clock) -> int:
    hour = time.hour % 12 + 12 * (time.half == "p") if time.half else time.hour
    return 60 * hour + time.minute


def _as_time(ratio: Ratio) -> Clock | None:
    texts = [item.latex for item in ratio.items if isinstance(item, Expression)]
    match = _CLOCK.fullmatch(":".join(texts))
    return Clock(hour=int(match[1]), minute=int(match[2]), half="") if match and len(texts) == 2 else None


def same_ratio(gold: Ratio | Expression | Clock, given: Ratio | Expression | Clock) -> bool:
    """Whether two ratios are one; `a : b` may be the number a/b."""
    left, right = (_terms(one) for one in (gold, given))
    if left is None or right is None or len(left) != len(right):
        return False
    if [expressions.equal(i, "0") for i in left] != [expressions.equal(i, "0") for i in right]:
        return False  # where a term is 0, any products with it are equal
    return all(
        expressions.equal(_product(left[i], right[j]), _product(left[j], right[i]))
        for j in range(len(left))
        for i in range(j)
    )


def _terms(one: Ratio | Expression | Clock) -> list[str] | None:
    if isinstance(one, Clock):
        return None if one.half else [str(one.hour), str(one.minute)]
    if isinstance(one, Expression):
        return [one.latex, "1"]
    texts = [item.latex for item in one.items if isinstance(item, Expression)]
    return texts if len(texts) == len(one.items) else None


def _product(left: str, right: str) -> str:
    factor = expressions.number(right)
    return f"({left}) \\cdot ({right})" if factor is None else expressions.times(left, factor)
