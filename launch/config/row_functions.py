"""Permission of functions that maps and filters of prompts name: code of a user's that a file may not name unasked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.errors import ConfigurationError

_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")
_NAMES = ("map", "filter")
_OWN = "opd.prompts."  # whose functions shipped options name


def check_row_functions(values: Mapping[str, Any], allowed: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse a function that neither the command line names itself nor `allow_targets` allows."""
    by_hand = {override.lstrip("+").partition("=")[2].strip("'\"") for override in overrides}
    for place, name in _functions(values, ""):
        package = f"{name.partition(':')[0]}."
        if name not in by_hand and not any(package.startswith(f"{prefix.rstrip('.')}.") for prefix in (_OWN, *allowed)):
            raise ConfigurationError(
                f"{place}={name} would run code of {package[:-1]!r}, which a file named; add it to allow_targets if "
                "you trust it, or name it on the command line"
            )


def _functions(values: Any, place: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items() if isinstance(values, Mapping) else ():
        where = f"{place}.{name}" if place else str(name)
        if name in _NAMES and isinstance(value, str) and _FUNCTION.fullmatch(value):
            yield where, value
        else:
            yield from _functions(value, where)
