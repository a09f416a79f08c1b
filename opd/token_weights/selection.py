"""Selection of a step's tokens: the fraction with the highest score, over all trajectories at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import ceil
from typing import Annotated, Any, ClassVar, Protocol, Self

import numpy as np
from jaxtyping import Bool, Float

from opd.loss.readings import Compatibility, StudentTopEntropy, UnionForwardKL
from opd.method.method import readings_of
from opd.method.slots import TokenWeight, WeightLimit
from opd.ports import Context, Reading
from opd.settings.ranges import Fraction, In, TopIds
from opd.settings.validation import settings
from opd.token_weights.special_tokens import look_up
from opd.types import Scored, Scores

_ROUNDING = 1e-9  # of a product of a fraction and a count, which may be meant to be whole
_EPSILON = 1e-8  # added to a range that is divided by: the paper's has no number


class TokenScore(Protocol):
    """Score of every token of a step, by which tokens are selected."""

    @property
    def readings(self) -> Sequence[Reading]:
        """Readings that it is made of."""
        ...

    def __call__(
        self, readings: Mapping[Reading, Float[np.ndarray, " N"]], kept: Bool[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        """Scores from readings at all sampled tokens of a step; statistics of it are of the tokens `kept`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class ByReading:
    """A reading as it is: tokens where it is greatest come first, or with `lowest` those where it is least.

    With `StudentEntropy` these are the uncertain tokens (the "80/20" selection of arXiv 2506.01939, there by the
    policy's own entropy in reinforcement learning), with `VocabularyReverseKL` the tokens of greatest disagreement.
    """

    reading: Reading
    # whether tokens with the least values come first
    lowest: bool = False

    @property
    def readings(self) -> Sequence[Reading]:
        return (self.reading,)

    def __call__(
        self, readings: Mapping[Reading, Float[np.ndarray, " N"]], kept: Bool[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        return -readings[self.reading] if self.lowest else readings[self.reading]


class Signal(Enum):
    """Combination of disagreement D, compatibility C (both normalized) and the student's entropy H."""

    LEARNABLE = "learnable"  # D C: the teacher differs, among tokens that the student considers
    INCOMPATIBLE = "incompatible"  # D (1 - C): it differs elsewhere
    DISAGREEMENT = "disagreement"  # D
    COMPATIBILITY = "compatibility"  # C
    DISAGREEMENT_OR_ENTROPY = "disagreement or entropy"  # H + D - H D (TIP, arXiv 2604.14084, as TA-OPD's code has it)
    LEARNABLE_OR_ENTROPY = "learnable or entropy"  # H + s - H s with s = D C


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Teachability:
    """Teachability of a token: disagreement times compatibility (TA-OPD, arXiv 2605.26844).

    `D` is KL(teacher||student) renormalized on the union of both top-k, `C` the teacher's mass on the student's top-k,
    each normalized over the step: `N(z) = clip((z - Q_low) / (Q_high - Q_low), 0, 1)`. The other signals are the
    paper's baselines; their entropy is that of the student's renormalized top-k over log k, as in the released code.
    """

    # likeliest tokens of each model
    k: TopIds = 16
    # quantile over the step that becomes 0
    low: Fraction = 0.05
    # quantile over the step that becomes 1
    high: Fraction = 0.95
    # what of disagreement, compatibility and entropy is the score
    signal: Signal = Signal.LEARNABLE

    @property
    def readings(self) -> Sequence[Reading]:
        d, c, h = UnionForwardKL(k=self.k), Compatibility(k=self.k), StudentTopEntropy(k=self.k)
        match self.signal:
            case Signal.LEARNABLE | Signal.INCOMPATIBLE:
                return (d, c)
            case Signal.DISAGREEMENT:
                return (d,)
            case Signal.COMPATIBILITY:
                return (c,)
            case Signal.DISAGREEMENT_OR_ENTROPY:
                return (d, h)
            case Signal.LEARNABLE_OR_ENTROPY:
                return (d, c, h)

    def __call__(
        self, readings: Mapping[Reading, Float[np.ndarray, " N"]], kept: Bool[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        def normal(reading: Reading) -> Float[np.ndarray, " N"]:
            return self.normalized(readings[reading], kept)

        d, c, h = UnionForwardKL(k=self.k), Compatibility(k=self.k), StudentTopEntropy(k=self.k)
        match self.signal:
            case Signal.LEARNABLE:
                return normal(d) * normal(c)
            case Signal.INCOMPATIBLE:
                return normal(d) * (1 - normal(c))
            case Signal.DISAGREEMENT:
                return normal(d)
            case Signal.COMPATIBILITY:
                return normal(c)
            case Signal.DISAGREEMENT_OR_ENTROPY:
                return _either(readings[h], normal(d))
            case Signal.LEARNABLE_OR_ENTROPY:
                return _either(readings[h], normal(d) * normal(c))

    def normalized(self, values: Float[np.ndarray, " N"], kept: Bool[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """`N(values)`, with the quantiles of the tokens that are `kept`; 0 everywhere if there are none."""
        if not kept.any():
            return np.zeros_like(values)
        low, high = np.quantile(values[kept], [self.low, self.high])
        return np.clip((values - low) / (max(high - low, 0.0) + _EPSILON), 0.0, 1.0)


def _either(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a + b - a * b


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TopFraction:
    """Weight 1 of the fraction of a step's tokens with the highest score, 0 of all others.

    Their number is `ceil(fraction * tokens)` over all trajectories of the step; of equal scores the earlier
    trajectory's, and there the earlier token's, comes first. `per_trajectory` tokens of each trajectory, its best, are
    taken before that (then there may be more). `filters` are weight parts that leave tokens out before any are
    counted; put them here instead of beside this part. A token's weight depends on all others of the step, so the part
    is not for estimates from sampled tokens.
    Example: `TopFraction(by=ByReading(reading=StudentEntropy()), fraction=0.2)`.
    """

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = True

    # score by which tokens are selected
    by: TokenScore
    # share of the step's tokens that is trained
    fraction: Annotated[float, In(1e-6, 1, because="0 trains nothing")] = 0.1
    # least number of tokens of each trajectory (all, if it has fewer)
    per_trajectory: Annotated[int, In(0, 1_000_000)] = 0
    # weight parts that leave tokens out before any are counted
    filters: Mapping[str, TokenWeight] = field(default_factory=dict)

    @property
    def readings(self) -> Sequence[Reading]:
        """Readings of the score and of the filters."""
        return tuple(dict.fromkeys([*self.by.readings, *readings_of(*self.filters.values())]))

    @property
    def limits(self) -> tuple[WeightLimit, ...]:
        """`fraction = 1` leaves no token out."""
        return (WeightLimit(name="fraction = 1 is every token", weight=replace(self, fraction=1.0, filters={})),)

    def known(self, vocabulary: Mapping[str, int]) -> Self:
        """The same, with the ids of the tokens that its filters name (`special_tokens.NamesTokens`)."""
        return replace(self, filters=look_up(self.filters, vocabulary))

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        weights = [s.trajectory.loss_mask.astype(np.float64) for s in scored]
        for part in self.filters.values():
            weights = [a * b for a, b in zip(weights, part(scored, context), strict=True)]
        masks = [s.trajectory.loss_mask for s in scored]
        kept = np.concatenate([w[m] > 0 for w, m in zip(weights, masks, strict=True)]) if weights else np.zeros(0, bool)
        if not kept.any():
            return weights
        scores = self.by({reading: flat(scored, reading) for reading in self.by.readings}, kept)
        trajectory = np.repeat(np.arange(len(masks)), [int(m.sum()) for m in masks])
        chosen = spread(scored, self._chosen(scores, kept, trajectory).astype(np.float64))
        return [w * c for w, c in zip(weights, chosen, strict=True)]

    def _chosen(
        self, scores: Float[np.ndarray, " N"], kept: Bool[np.ndarray, " N"], trajectory: np.ndarray
    ) -> Bool[np.ndarray, " N"]:
        """The selected ones of all sampled tokens, which stand in order of their trajectories."""
        order = np.argsort(-scores, kind="stable")
        order = order[kept[order]]
        chosen = np.zeros(len(scores), dtype=bool)
        if self.per_trajectory:
            by_trajectory = order[np.argsort(trajectory[order], kind="stable")]
            sizes = np.bincount(trajectory[by_trajectory])
            rank = np.arange(len(by_trajectory)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            chosen[by_trajectory[rank < self.per_trajectory]] = True
        number = ceil(self.fraction * len(order) - _ROUNDING)
        rest = order[~chosen[order]]
        chosen[rest[: max(number - int(chosen.sum()), 0)]] = True
        return chosen


def flat(scored: Sequence[Scored[Any]], reading: Reading) -> Float[np.ndarray, " N"]:
    """Values of a reading at all sampled tokens of a step, one trajectory after the other; float64."""
    values = [s.readings[reading][s.trajectory.loss_mask] for s in scored if s.trajectory.loss_mask.any()]
    return np.concatenate([np.zeros(0), *values]).astype(np.float64)


def spread(scored: Sequence[Scored[Any]], values: Float[np.ndarray, " N"]) -> list[Float[np.ndarray, " _T"]]:
    """Values at all sampled tokens of a step per trajectory, 0 at tokens that were not sampled."""
    found, start = [], 0
    for s in scored:
        mask = s.trajectory.loss_mask
        row = np.zeros(len(mask))
        count = int(mask.sum())
        row[mask] = values[start : start + count]
        start += count
        found.append(row)
    return found
