"""Sentinel: check that an engine computes with the published weights, by a fixed text that engine and learner read.

Two right programs differ by rounding. How much is measured once per engine, on the same text, before any weights
arrive, when both hold the unchanged checkpoint; later versions may differ by a few times that, and wrong weights (a
tensor missing, misplaced or of another version) show as more, on average, at many tokens or at one.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import inf

import numpy as np
from jaxtyping import Float, Int32

SHORTEST, LONGEST = 32, 128  # tokens of the text
TIMES = 4.0  # what later versions may differ by, in what the unchanged checkpoint did: a student grows sharper
_HIGH = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """|a - b| of two readings of the same tokens in nats: mean, 0.9 quantile and maximum. A NaN in either is in all."""

    mean: float
    high: float
    greatest: float

    @classmethod
    def of(cls, a: Float[np.ndarray, " S"], b: Float[np.ndarray, " S"]) -> "Gap":
        """The gap of two readings."""
        gaps = np.abs(a.astype(np.float64) - b.astype(np.float64))
        return cls(mean=float(gaps.mean()), high=float(np.quantile(gaps, _HIGH)), greatest=float(gaps.max()))

    def within(self, bound: "Gap") -> bool:
        """Whether all its values are at most `bound`; NaN is within nothing."""
        return all(mine <= most for mine, most in zip(astuple(self), astuple(bound), strict=True))

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats on average, {self.high:.2g} at the 0.9 quantile, {self.greatest:.2g} at most"


LEAST = {False: Gap(mean=3e-5, high=1e-4, greatest=1e-3), True: Gap(mean=0.03, high=0.1, greatest=0.5)}
"""What is never called wrong, in float32 and (True) where one side computes in bfloat16: the rounding of a student that
becomes sharper while it is trained. Greatest gaps over whole runs were 1.7e-5 and 0.34 (docs/lora.md), and once in
float32 1.2e-4, at one of 31 tokens that were 6e-6 apart on average (docs/log.md)."""

NUMERICS = {False: 0.02, True: 0.25}
"""The mean gap on the unchanged checkpoint above which the programs differ by more than rounding (TF32 is 5e-3)."""


def allowed(floor: Gap, *, coarse: bool, experts: bool = False) -> Gap:
    """Allowed gap of a version whose unchanged checkpoint differed by `floor`.

    In bfloat16 a mixture of `experts` sends a token to another expert by a rounding now and then (1 choice in 150 on a
    tiny one), which the two programs then compute otherwise: the greatest gap says nothing of the weights there.
    """
    least = LEAST[coarse]
    return Gap(
        mean=max(least.mean, TIMES * floor.mean),
        high=max(least.high, TIMES * floor.high),
        greatest=inf if coarse and experts else max(least.greatest, TIMES * floor.greatest),
    )


def text(prompt: Sequence[int], vocabulary: int, longest: int) -> Int32[np.ndarray, " S"]:
    """Ids of the sentinel: the run's first prompt, cut to `LONGEST` tokens (and below `longest`, the engine's limit).

    One shorter than `SHORTEST` is filled up with pseudo-random ids of the tokenizer's `vocabulary`, never of padding.
    """
    filled = np.random.default_rng(20240607).integers(0, vocabulary, max(0, SHORTEST - len(prompt)))
    whole = np.concatenate([np.asarray(prompt, dtype=np.int64), filled])
    return whole[: min(LONGEST, longest - 1)].astype(np.int32)
