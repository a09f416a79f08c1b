"""Order of a finite collection's items over steps: a pure function of (seed, step)."""

import random
from array import array
from collections import Counter
from functools import lru_cache


def draw(seed: int, size: int, start: int, count: int, shuffle: bool) -> list[int]:
    """Item numbers at the running positions `start .. start + count`, every item once per epoch.

    Each epoch has its own order. Where epochs meet, an item may come twice: it then stands next to itself, because
    equal prompts of a step are one group (two groups would be sampled with the same seeds).
    Example: `draw(seed=0, size=5, start=5, count=2, shuffle=True)`.
    """
    chosen: list[int] = []
    for epoch in range(start // size, (start + count - 1) // size + 1):
        first, last = max(start - epoch * size, 0), min(start + count - epoch * size, size)
        chosen += _order(seed, epoch, size)[first:last] if shuffle else range(first, last)
    return list(Counter(chosen).elements())


@lru_cache(maxsize=16)  # a step needs one or two per source; drawing them anew would be linear in the file
def _order(seed: int, epoch: int, size: int) -> "array[int]":
    order = list(range(size))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return array("q", order)
