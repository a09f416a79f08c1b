"""Certificates: rows of properties, each with a measured number, a bound and a verdict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Bound(Enum):
    """Side of the tolerance on which a measured number must lie."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A measured property. Example: `Row(name="ranks", measured=3e-16, bound=Bound.AT_MOST, tolerance=1e-9)`.

    `note` is what else was seen where it does not hold; "" if nothing.
    """

    name: str
    measured: float
    tolerance: float
    bound: Bound = Bound.AT_MOST
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the number is within its bound; one that is not finite never is."""
        if not math.isfinite(self.measured):
            return False
        above = self.measured >= self.tolerance
        return above if self.bound is Bound.AT_LEAST else self.measured <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A property that does not apply, and why."""

    name: str
    why: str


Finding = Row | Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Certificate of a method. `skipped` has the properties that do not apply, each with the reason."""

    method: str
    promise: str
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """Names of the properties that do not hold."""
        return [row.name for row in self.rows if not row.passed]


def at_least(name: str, measured: float, tolerance: float) -> Row:
    """Row whose number must not be below its bound."""
    return Row(name=name, measured=measured, tolerance=tolerance, bound=Bound.AT_LEAST)


def worst(rows: list[Row]) -> Row:
    """Row that fails or is nearest to failing, of the same property in several worlds."""
    broken = [row for row in rows if not row.passed]
    sign = 1 if rows[0].bound is Bound.AT_LEAST else -1
    return broken[0] if broken else min(rows, key=lambda row: sign * row.measured)
