"""Equality of two formulas: exact for numbers, at several points for those with variables. Imports sympy lazily."""

import logging
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

_DIGITS = 6  # of a decimal, from which on it may stand for a number that it only rounds
_POINTS = ((7, 3), (11, 5), (23, 7), (3, 11), (5, 13), (13, 9), (2, 17))
"""Where formulas with variables are compared: no likely roots or poles."""
_SIGNS = ("+++--+-", "+-++---", "++--+-+", "+--+++-")
"""Signs of the variables at these points, by their order; any two variables come with all four."""
_NATURAL = ((4, 1), (6, 1), (9, 1))
_WHOLE = (*_NATURAL, (5, 1), (7, 1), (8, 1), (11, 1))
"""Where formulas that mean integers are compared: all remainders of small divisors."""
_NOTHING = 1e-25  # of a value: what two ways of evaluating it may differ by
_SPREAD = 17  # moves the points of a second variable off the first's
_PRECISION = 40
_SIMPLE = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?:(?P<whole>\d+)\s*)?\\frac\{\s*(?P<up>-?\d+)\s*\}\{\s*(?P<down>-?\d+)\s*\}"
    r"|(?:(?P<whole2>\d+)\s+)?(?P<up2>\d+)\s*/\s*(?P<down2>\d+))"
)
_DECIMAL = re.compile(r"[+-]?\s*(?:\d+(?:\.\d*)?|\.\d+)")
_SCIENTIFIC = re.compile(r"([+-]?\s*(?:\d+(?:\.\d*)?|\.\d+))\s*\\(?:times|cdot)\s*10\^\{([+-]?\d{1,4})\}")


def number(latex: str) -> Fraction | None:
    """Value of a plain number (decimal, fraction, mixed number, scientific), else None."""
    latex = latex.strip()
    if _DECIMAL.fullmatch(latex):
        return Fraction(re.sub(r"\s", "", latex).rstrip("."))
    if match := _SCIENTIFIC.fullmatch(latex):
        return Fraction(re.sub(r"\s", "", match.group(1)).rstrip(".")) * Fraction(10) ** int(match.group(2))
    if match := _SIMPLE.fullmatch(latex):
        up, down = int(match["up"] or match["up2"]), int(match["down"] or match["down2"])
        whole = match["whole"] or match["whole2"]
        if not down or (whole and (up < 0 or down < 0)):
            return None
        value = Fraction(up, down) + int(whole or 0)
        return -value if match["sign"] == "-" else value
    return None


def equal(gold: str, given: str) -> bool:
    """Whether two formulas have the same value."""
    if gold == given:
        return True
    left, right = number(gold), number(given)
    if left is not None and right is not None:
        return left == right or _rounded(gold, given, left, right)
    return _equal_formulas(gold, given)


def times(latex: str, factor: Fraction) -> str:
    """A formula `factor` times as large."""
    value = number(latex)
    if value is not None:
        value *= factor
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    return f"({latex}) \\cdot \\frac{{{factor.numerator}}}{{{factor.denominator}}}"


def evaluated(latex: str) -> bool:
    """Whether a formula can be read. It is evaluated too, so that an endless evaluation shows."""
    if number(latex) is not None:
        return True
    found = formula(latex)
    if found is None:
        return False
    list(_values(found, found))
    return True


def proportional(gold: tuple[str, str], given: tuple[str, str], *, directed: bool) -> bool:
    """Whether `left - right` of one pair is a constant multiple of the other's (a positive one if `directed`)."""
    import mpmath

    first, second = (formula(f"({left})-({right})") for left, right in (gold, given))
    if first is None or second is None or first.free_symbols != second.free_symbols:
        return False
    with mpmath.workdps(_PRECISION):
        ratios = [up / down for up, down in _values(first, second) if down]
        if len(ratios) < 2 or not ratios[0]:
            return False
        if directed and (mpmath.im(ratios[0]) or mpmath.re(ratios[0]) < 0):
            return False
        return all(abs(ratio - ratios[0]) <= abs(ratios[0]) * _NOTHING for ratio in ratios)


def _rounded(gold: str, given: str, left: Fraction, right: Fraction) -> bool:
    """Whether the shorter of two decimals is the longer one, or the fraction, rounded to its own number of digits."""
    for short, text, long, other in ((left, gold, right, given), (right, given, left, gold)):
        digits = _significant(text)
        if digits is None or digits < _DIGITS or (_significant(other) or 10**6) <= digits:
            continue
        if abs(short - long) <= Fraction(1, 2) * _last_place(text):
            return True
    return False


def _significant(latex: str) -> int | None:
    """Number of digits of a decimal with a point; None for anything else, which is exact."""
    if not re.fullmatch(r"[+-]?\s*\d*\.\d+", latex):
        return None
    return len(re.sub(r"\D", "", latex).lstrip("0"))


def _last_place(latex: str) -> Fraction:
    return Fraction(1, 10 ** len(latex.partition(".")[2]))


def _equal_formulas(gold: str, given: str) -> bool:
    first, second = formula(gold), formula(given)
    if first is None or second is None:
        return re.sub(r"\s", "", gold) == re.sub(r"\s", "", given)
    if first == second:
        return True
    import mpmath

    agreed = 0
    with mpmath.workdps(_PRECISION):
        for a, b in _values(first, second):
            size = max(abs(a), abs(b))
            if abs(a - b) > size * _NOTHING and not _rounds(gold, a, b) and not _rounds(given, b, a):
                return False
            agreed += 1
    return agreed >= 2 or (agreed == 1 and not (first.free_symbols | second.free_symbols)) or _same(first, second)


def _rounds(latex: str, short: Any, long: Any) -> bool:
    """Whether `latex` is a decimal of value `short` with enough digits, and `long` its value before rounding."""
    digits = _significant(latex)
    return digits is not None and digits >= _DIGITS and abs(short - long) <= 0.5000001 * float(_last_place(latex))


def _same(first: Any, second: Any) -> bool:
    """math-verify's own comparison, for formulas that have no value at a point."""
    from math_verify import verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # that there is no deadline: the caller has one
    return bool(verify(first, second, timeout_seconds=None))


def _values(first: Any, second: Any) -> Iterator[tuple[Any, Any]]:
    """Values of both formulas where both have one: at rational points, and natural ones where these give too few."""
    from sympy import Abs, Product, Sum

    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    real = _real(first, second)
    counted = first.has(Sum, Product) or second.has(Sum, Product)  # up to a number that must be natural
    whole = any(_means_integers(one) for one in (first, second))
    found = 0
    for points in (_NATURAL,) if counted else (_WHOLE,) if whole else (_POINTS, _NATURAL):
        if found >= 2:
            return
        signs = len(symbols) == 1 or first.has(Abs) or second.has(Abs)
        places = [_place(symbols, j, point, signs) for j, point in enumerate(points if symbols else points[:1])]
        inside = [at for at in places if _inside(first, at) and _inside(second, at)] if real and symbols else places
        for at in inside if len(inside) >= 2 else places:
            a, b = _value(first, at, real), _value(second, at, real)
            if a is not None and b is not None:
                found += 1
                yield a, b


def _place(symbols: Sequence[Any], j: int, point: tuple[int, int], signs: bool) -> dict[Any, Any]:
    """Values of the variables at the `j`-th point, natural ones at a natural point.

    Several variables are mostly quantities, such as lengths and masses: they are positive unless `signs`.
    """
    from sympy import Rational

    up, down = point
    if down == 1:
        return {symbol: Rational(up + 3 * i) for i, symbol in enumerate(symbols)}
    at = {}
    for i, symbol in enumerate(symbols):
        far = i if j % 2 else len(symbols) - 1 - i  # so that any two variables come in both orders
        value = Rational(up + _SPREAD * far, down + 2 * far)
        at[symbol] = -value if signs and _SIGNS[i % len(_SIGNS)][j] == "-" else value
    return at


def _inside(found: Any, at: dict[Any, Any]) -> bool:
    """Whether every root and logarithm of a formula is real at a point; equal ones may have other branches beyond."""
    from sympy import Function, Pow

    return all(_with_real_roots(part.subs(at)).is_real is not False for part in found.atoms(Pow, Function))


def _real(first: Any, second: Any) -> bool:
    """Whether two formulas are about real numbers."""
    from sympy import I

    return not first.has(I) and not second.has(I)


def _means_integers(found: Any) -> bool:
    """Whether a formula has a meaning at integers alone, e.g. `(-1)^n`, or is mostly used there, e.g. a floor."""
    from sympy import Pow, ceiling, floor

    return bool(found.free_symbols) and (
        found.has(floor, ceiling) or any(p.base.is_negative and p.exp.free_symbols for p in found.atoms(Pow))
    )


def _with_real_roots(value: Any) -> Any:
    """A number with the real cube root of -8 (-2) in place of the principal one, and all odd roots likewise."""
    return value.replace(
        lambda e: e.is_Pow and e.base.is_negative and e.exp.is_Rational and e.exp.q % 2 and e.exp.q > 1,
        lambda e: (-1) ** e.exp.p * (-e.base) ** e.exp,
    )


def _value(expression: Any, values: dict[Any, Any], real: bool) -> Any:
    """Value of a formula at a point to many digits, or None where it has none."""
    import mpmath

    try:
        result = expression.subs(values).doit()
        result = (_with_real_roots(result) if real else result).evalf(_PRECISION)
        real, imaginary = result.as_real_imag()
        with mpmath.workdps(_PRECISION):
            found = mpmath.mpc(str(real), str(imaginary)) if imaginary else mpmath.mpf(str(real))
            return found if mpmath.isfinite(found) else None
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError):
        return None  # sympy's, of what has no value here


@lru_cache(maxsize=4096)
def formula(latex: str) -> Any:
    """A sympy expression, or None where the formula cannot be read. Decimals are exact, symbols keep their case."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Expr, I

    spelled = re.sub(r"\d*\.\d+|\d+\.(?!\d)", _fraction, latex)
    spelled = re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\1", spelled).replace("\\%", "").replace("\\lg", "\\log_{10}")
    try:
        found = latex2sympy(
            spelled,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # noqa: BLE001  the library raises bare Exceptions for what it cannot parse
        return None
    if not isinstance(found, Expr):
        return None
    return found.subs({symbol: I for symbol in found.free_symbols if str(symbol) in ("i", "imath")})


def _fraction(decimal: re.Match[str]) -> str:
    whole, _, part = decimal.group().partition(".")
    return f"\\frac{{{int(whole + part or '0')}}}{{{10 ** len(part)}}}"
