"""Which items of a finite collection a step sees: a pure function of (seed, step)."""

import random
from collections import Counter


def draw(seed: int, size: int, start: int, count: int, shuffle: bool) -> list[int]:
    """Item numbers at the running positions `start .. start + count`, every item once per epoch.

    Each epoch has its own order. Where epochs meet, an item may come twice: it then stands next to itself, because
    equal prompts of a step are one group (two groups would be sampled with the same seeds).
    Example: `draw(seed=0, size=5, start=5, count=2, shuffle=True)`.
    """
    chosen: list[int] = []
    for epoch in range(start // size, (start + count - 1) // size + 1):
        order = list(range(size))
        if shuffle:
            random.Random(f"order/{seed}/{epoch}").shuffle(order)
        first = max(start - epoch * size, 0)
        chosen += order[first : start + count - epoch * size]
    return list(Counter(chosen).elements())
