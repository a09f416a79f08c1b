"""Sums and counts of per-token metrics that add up over chunks, micro-batches and ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.errors import DataError

MAXIMA = ("probs_diff", "logprob_gap")
"""Metrics of which the greatest value is reported too, as `<name>_max`: one wrong token disappears in a mean."""


_DIFFERENT = "metrics of one step must have the same names in every chunk and micro-batch, got"
_ADVICE = "an objective reports NaN where a metric is not defined, instead of leaving it out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Of `M` metrics: the sum, the number of tokens where each is defined, and the greatest value (float64).

    Lives on the device until somebody asks for `means`; `plus` is associative and commutative up to float64
    rounding, so the result does not depend on how tokens were split. Example: of one metric with values
    `[1, NaN, 5]`, all active: `Tally(names=("x",), totals=[6.0], counts=[2.0], greatest=[5.0])`.
    """

    names: tuple[str, ...]
    totals: Float[Tensor, " M"]
    counts: Float[Tensor, " M"]
    greatest: Float[Tensor, " M"]

    @staticmethod
    def of(metrics: Mapping[str, Float[Tensor, " L"]], active: Bool[Tensor, " L"]) -> "Tally":
        """Count the `active` tokens; NaN means "not defined at this token" and is left out."""
        names = tuple(sorted(metrics))
        empty = torch.zeros((0, len(active)), dtype=torch.float64, device=active.device)
        values = torch.stack([metrics[name].detach().double() for name in names]) if names else empty
        defined = active & ~values.isnan()
        least = values.new_full((len(names), 1), -inf)  # so that no tokens at all have a greatest value
        return Tally(
            names=names,
            totals=torch.where(defined, values, 0.0).sum(-1),
            counts=defined.sum(-1, dtype=torch.float64),
            greatest=torch.cat([least, torch.where(defined, values, -inf)], dim=-1).amax(-1),
        )

    @staticmethod
    def joined(blocks: Sequence[Mapping[str, Float[Tensor, " _l"]]], active: Bool[Tensor, " L"]) -> "Tally":
        """The tally of metrics that are given in blocks of rows, one after another.

        Raises:
            DataError: the blocks do not have the same metrics.
        """
        names = {tuple(sorted(block)) for block in blocks}
        if len(names) > 1:
            raise DataError(f"{_DIFFERENT} {' and '.join(map(str, sorted(names)))}; {_ADVICE}")
        found = blocks[0] if blocks else {}
        return Tally.of({name: torch.cat([block[name].detach() for block in blocks]) for name in found}, active)

    def plus(self, other: "Tally") -> "Tally":
        """Both together.

        Raises:
            DataError: they are of different metrics, so a mean would be of neither.
        """
        if self.names != other.names:
            raise DataError(f"{_DIFFERENT} {self.names} and {other.names}; {_ADVICE}")
        return Tally(
            names=self.names,
            totals=self.totals + other.totals,
            counts=self.counts + other.counts,
            greatest=torch.maximum(self.greatest, other.greatest),
        )

    def means(self) -> dict[str, float]:
        """Mean per metric over the tokens where it is defined, and `<name>_max` for `MAXIMA`.

        A metric that was defined nowhere is absent. Waits for the device.
        """
        table = torch.stack([self.totals, self.counts, self.greatest]).tolist()
        found: dict[str, float] = {}
        for name, total, count, greatest in zip(self.names, *table, strict=True):
            if count:
                found[name] = total / count
                if name in MAXIMA:
                    found[f"{name}_max"] = greatest
        return found
