"""Weights by how far the teacher's continuation is from the student's own text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import floor
from typing import ClassVar

import numpy as np
import xxhash
from jaxtyping import Bool, Float, UInt64

from opd.loss.readings import VocabularyReverseKL
from opd.method.slots import WeightLimit
from opd.ports import Context, Reading
from opd.settings.ranges import Fraction
from opd.settings.validation import settings
from opd.types import FutureScores, Scored, Scores, Trajectory

_ROUNDING = 1e-9  # of a product of a fraction and a count, which may be meant to be whole


class Part(Enum):
    """Candidates of a step whose loss is capped."""

    LOW = "low"  # those whose windows are nearest: a matter of wording
    HIGH = "high"  # as many drawn from those in the upper half: real forks, the control


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class CapAtMedian:
    """Weight `min(1, median / loss)` of chosen tokens of high loss, 1 of all others (arXiv 2606.00305, mechanism test).

    `loss` is the exact reverse KL of a token before the step, `median` that of its text's sampled tokens: a chosen
    token counts no more than the median one. Of a step's `n` tokens with a distance (`FutureDistances`), LOW is the
    `floor(share * n)` with the least, and those as near as the last of them; HIGH as many of those with a distance not
    below the median one, by numbers that are drawn by each text alone. Nothing depends on the order of a step. That a
    cap scales a gradient without turning it, and that HIGH is the upper half, is INFERRED.
    """

    consumes: ClassVar[type[Scores]] = FutureScores
    reads_sampled_tokens: ClassVar[bool] = True
    readings: ClassVar[Sequence[Reading]] = (VocabularyReverseKL(),)

    # share of a step's tokens of high loss that are capped
    share: Fraction = 0.3
    # which of them: the nearest continuations (LOW), or as many of the far ones (HIGH)
    part: Part = Part.LOW

    @property
    def limits(self) -> tuple[WeightLimit, ...]:
        """`share = 0` caps none."""
        return (WeightLimit(name="share = 0 is every token alike", weight=replace(self, share=0.0)),)

    def __call__(self, scored: Sequence[Scored[FutureScores]], context: Context) -> list[Float[np.ndarray, " T"]]:
        return [self._weights(s, chosen) for s, chosen in zip(scored, self.chosen(scored), strict=True)]

    def _weights(self, scored: Scored[FutureScores], chosen: Bool[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
        weights, mask = np.ones(len(scored.trajectory)), scored.trajectory.loss_mask
        if not chosen.any():
            return weights
        losses = np.asarray(scored.readings[self.readings[0]], dtype=np.float64)
        median = max(float(np.median(losses[mask])), 0.0)
        high = chosen & (np.where(mask, losses, 0.0) > median)
        weights[high] = median / losses[high]
        return weights

    def chosen(self, scored: Sequence[Scored[FutureScores]]) -> list[Bool[np.ndarray, " T"]]:
        """Masks of the tokens of a step that are capped."""
        ahead = [np.asarray(s.scores.ahead, dtype=np.float64) for s in scored]
        known = [(far >= 0) & s.trajectory.loss_mask for far, s in zip(ahead, scored, strict=True)]
        every = np.concatenate([np.zeros(0), *(far[mask] for far, mask in zip(ahead, known, strict=True))])
        number = floor(self.share * len(every) + _ROUNDING)
        if not number:
            return [np.zeros(len(far), dtype=bool) for far in ahead]
        least = np.sort(every)[number - 1]
        if self.part is Part.LOW:
            return [mask & (far <= least) for far, mask in zip(ahead, known, strict=True)]
        middle, count = np.median(every), int((every <= least).sum())
        eligible = [mask & (far >= middle) for far, mask in zip(ahead, known, strict=True)]
        draws = [_draws(s.trajectory) for s in scored]
        drawn = np.sort(np.concatenate([draw[mask] for draw, mask in zip(draws, eligible, strict=True)]))
        return [mask & (draw <= drawn[:count][-1]) for draw, mask in zip(draws, eligible, strict=True)]


def _draws(trajectory: Trajectory) -> UInt64[np.ndarray, " T"]:
    """A number for every token of a text, drawn by the text alone."""
    text = trajectory.prompt.id.encode() + trajectory.token_ids.tobytes()
    return np.random.Generator(np.random.Philox(key=xxhash.xxh64_intdigest(text))).integers(
        2**64, size=len(trajectory), dtype=np.uint64
    )
