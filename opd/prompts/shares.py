"""Apportionment of a step's prompts to sources by weights: a pure function of how many came before."""

from collections.abc import Sequence
from fractions import Fraction


def apportioned(weights: Sequence[float], total: int) -> list[int]:
    """Parts of `total` by `weights` (Sainte-Lague), which never shrink when `total` grows; equal claims go by order.

    So the first `n` prompts are in proportion for every `n`, as nearly as whole numbers can be.
    Example: `apportioned([3, 1], 6)` is `[5, 1]`, and of 8 it is `[6, 2]`.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    parts = [int(total * share + Fraction(1, 2)) for share in shares]
    while sum(parts) < total:
        claims = [share / (2 * part + 1) for share, part in zip(shares, parts, strict=True)]
        parts[claims.index(max(claims))] += 1
    while sum(parts) > total:
        claims = [share / (2 * part - 1) if part else 2 for share, part in zip(shares, parts, strict=True)]
        parts[len(claims) - 1 - claims[::-1].index(min(claims))] -= 1
    return parts


def window(weights: Sequence[float], start: int, count: int) -> list[tuple[int, int]]:
    """`(start, count)` of every source in the mixture's positions `start .. start + count`, each in its own order."""
    before, after = apportioned(weights, start), apportioned(weights, start + count)
    return [(first, last - first) for first, last in zip(before, after, strict=True)]
