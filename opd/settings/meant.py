"""Values that a text may mean where a number or a truth value is wanted, for the remedy in an error."""

import re

_NUMBER = re.compile(
    r"\s*[a-z_]*?([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)\s*", re.IGNORECASE | re.ASCII
)
_UNITS = (
    {"": 1, "f": 1, "s": 1, "min": 60, "h": 3600}
    | {"%": 0.01, "k": 10**3, "kb": 10**3, "mb": 10**6, "m": 10**6, "gb": 10**9, "g": 10**9, "tb": 10**12}
    | {
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
        "tib": 1 << 40,
    }
)
_BOOLS = {"yes": True, "y": True, "on": True, "true": True, "1": True} | dict.fromkeys(
    ("no", "n", "off", "false", "0", "none"), False
)


def read_as(base: type, text: str) -> int | float | bool | None:
    """Value that a text may mean, e.g. 4000 of `4k`, 0.001 of `1e-3f`, 2 of `zero2`, true of `yes`; else None."""
    if base is bool:
        return _BOOLS.get(text.strip().casefold())
    if not (found := _NUMBER.fullmatch(text)):
        return None
    if (unit := _UNITS.get(found[2].casefold())) is None:
        return None
    number = float(found[1]) * unit
    return int(number) if base is int and number.is_integer() else number
