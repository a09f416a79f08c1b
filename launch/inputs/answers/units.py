"""Units behind a number: split off, and compared by dimension."""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

_TABLE = """
length: m meter metre =1; km kilometer kilometre =1000; cm centimeter centimetre =1/100
length: mm millimeter millimetre =1/1000
length: nm nanometer =1/1000000000; um micrometer =1/1000000; in inch inches =127/5000; ft foot feet =381/1250
length: yd yard =1143/1250; mi mile =201168/125
time: s sec second =1; ms millisecond =1/1000; min minute =60; h hr hour =3600; day =86400; week =604800
months: month =1; year yr =12
mass: kg kilogram =1; g gm gram =1/1000; mg milligram =1/1000000; ton tonne =1000; lb pound-mass =45359237/100000000
volume: l L liter litre =1; ml mL milliliter millilitre =1/1000
money: dollar usd \\$ buck =100; cent ¢ =1; euro eur € =1e; pounds £ gbp =1p; yen ¥ jpy =1y; rupee rs inr ₹ =1r
share: % =1/100
angle: degree deg =1
energy: J joule =1; kJ kilojoule =1000; erg =1/10000000; eV =1v
force: N newton =1; kN kilonewton =1000
power: W watt =1; kW kilowatt =1000
pressure: Pa pascal =1; kPa =1000
charge: C coulomb =1
frequency: Hz hertz =1; kHz =1000; MHz =1000000
temperature: K kelvin =1
amount: mol mole =1
voltage: V volt =1
current: A ampere amp =1; mA =1/1000
"""
_PREFIX = re.compile(r"^\s*(-?)\s*(\\\$|€|£|¥|₹|(?:US\s*)\\\$|USD(?=\s*\d)|Rs\.?(?=\s*\d))\s*(-?)\s*(?=[\d.(\\])")
_TEXT_SUFFIX = re.compile(
    r"\s*(\\text\{[^{}]*\}(?:\^\{-?\d+\})?(?:\s*(?:/|\\cdot|\\times)?\s*\\text\{[^{}]*\}(?:\^\{-?\d+\})?)*)\s*$"
)
_WORD = r"[A-Za-zµ]+\.?(?:\^\{-?\d+\}|[23](?![\d.]))?"
_PLAIN_SUFFIX = re.compile(rf"^(.*[\d}})])\s*?( ?)({_WORD}(?:\s*(?:/|\\cdot\s| )\s*{_WORD})*)$")
_MARK_SUFFIX = re.compile(r"^(.+?)\s*(\\%|\\degree|¢|€|£|\\\$)\s*([CF]?)$")
_EMPTY = frozenset(
    re.findall(r"\w+", "unit integer number total in each per of the approximately about altogether left")
)


@dataclass(frozen=True, slots=True)
class Unit:
    """`factor` times a product of dimensions, e.g. km/h is `Unit(Fraction(5, 18), {length: 1, time: -1})`."""

    factor: Fraction
    dimensions: frozenset[tuple[str, int]]


def _known() -> dict[str, tuple[Fraction, str]]:
    known: dict[str, tuple[Fraction, str]] = {}
    for line in _TABLE.strip().splitlines():
        dimension, _, units = line.partition(":")
        for unit in units.split(";"):
            names, _, factor = unit.partition("=")
            currency = factor.strip().lstrip("0123456789") if factor.strip()[-1].isalpha() else ""
            for name in names.split():
                known[name] = (Fraction(factor.strip().rstrip("epyrv")), dimension + currency)
    return known


_KNOWN = _known()


def split(latex: str) -> tuple[str, str]:
    """Number and unit, e.g. `12\\text{ cm}^{2}` as `("12", "cm^{2}")`; the unit is "" where there is none."""
    if money := _PREFIX.match(latex):
        rest, unit = split(money.group(1) + money.group(3) + latex[money.end() :])
        mark = money.group(2).replace("US", "").replace("USD", "\\$").strip() or "\\$"
        return rest, f"{mark} {unit}".strip() if unit and not _same_money(mark, unit) else mark
    if mark := _MARK_SUFFIX.match(latex):
        return mark.group(1), mark.group(2).lstrip("\\").replace("$", "\\$") + mark.group(3)
    if text := _TEXT_SUFFIX.search(latex):
        number, unit = latex[: text.start()].strip(), re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\1", text.group(1))
        unit = unit.strip("() .")
        if number and _is_value(number) and not re.search(r"\d", re.sub(r"\^\{?-?\d+\}?", "", unit)):
            return number, unit
    if (plain := _PLAIN_SUFFIX.match(latex)) and _is_plain_unit(plain.group(3), spaced=bool(plain.group(2))):
        return plain.group(1).strip(), plain.group(3)
    return latex, ""


def letter_unit(latex: str) -> tuple[str, str]:
    """`5 m` as number and unit although it may be a product: for callers that expect a unit."""
    match = re.fullmatch(rf"(-?[\d.,]+)\s*({_WORD}(?:\s*/\s*{_WORD})*)", latex)
    return (match.group(1), match.group(2)) if match else (latex, "")


def _same_money(mark: str, unit: str) -> bool:
    return measure(mark) == measure(unit)


def _is_value(number: str) -> bool:
    """Whether a text ends like a value, so that the text behind it can be a unit."""
    return bool(re.search(r"[\dA-Za-z})!]$", number)) and not number.endswith("\\text{}")


def _is_plain_unit(words: str, spaced: bool) -> bool:
    """Whether words are a unit and no product of symbols: known units, or longer than two letters."""
    letters = re.findall(r"[A-Za-zµ]+", re.sub(r"\^\{-?\d+\}", "", words))
    if "/" in words and all(_lookup(word) is not None for word in letters):
        return True
    if len(letters) == 1 and len(letters[0]) == 1:
        return False
    long = all(_lookup(word) is not None or len(word) > 2 or word.lower() in _EMPTY for word in letters)
    return long and (spaced or all(_lookup(w) is not None for w in letters if len(w) > 1))


def _lookup(word: str) -> tuple[Fraction, str] | None:
    for name in (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es"), word.rstrip(".")):
        if name in _KNOWN:
            return _KNOWN[name]
    return None


def measure(unit: str) -> Unit:
    """Dimensions and factor of a unit; a word that is in no table is a dimension of its own, e.g. apples."""
    unit = unit.replace("\\cdot", " ").replace("\\times", " ").replace("(", " ").replace(")", " ")
    unit = re.sub(r"\bper\b", "/", unit)
    unit = re.sub(r"\b(?:square|sq)\.?\s+([A-Za-z]+)", r"\1^{2}", unit, flags=re.IGNORECASE)
    unit = re.sub(r"\b(?:cubic|cu)\.?\s+([A-Za-z]+)", r"\1^{3}", unit, flags=re.IGNORECASE)
    factor, powers, sign = Fraction(1), Counter[str](), 1
    for slash, word, raised in re.findall(r"(/)|(\\?[A-Za-zµ%¢€£¥₹$]+)\.?(?:\^?\{?(-?\d+)\}?)?", unit):
        if slash:
            sign = -1
            continue
        power = sign * int(raised or 1)
        found = _lookup(word)
        if found is None:
            lower = word.lower()
            single = lower.removesuffix("s")
            if lower not in _EMPTY and single not in _EMPTY:
                powers[single] += power
            continue
        factor *= found[0] ** power
        powers[found[1]] += power
    return Unit(factor, frozenset((name, power) for name, power in powers.items() if power))
