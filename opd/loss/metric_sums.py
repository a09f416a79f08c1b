"""Sums and counts of per-token metrics that add up over chunks, micro-batches and ranks."""

from collections.abc import Mapping
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
class MetricSums:
    """Of `M` metrics: the sum, the number of tokens where each is defined, and the greatest value (float64).

    Stays on the device until `means` is called; `plus` is associative and commutative up to float64
    rounding, so the result does not depend on how tokens were split. Example: of one metric with values
    `[1, NaN, 5]`, all active: `MetricSums(names=("x",), totals=[6.0], counts=[2.0], maxima=[5.0])`.
    """

    names: tuple[str, ...]
    totals: Float[Tensor, " M"]
    counts: Float[Tensor, " M"]
    maxima: Float[Tensor, " M"]

    @staticmethod
    def of(metrics: Mapping[str, Float[Tensor, " L"]], active: Bool[Tensor, " L"]) -> "MetricSums":
        """Count the `active` tokens; NaN means "not defined at this token" and is left out."""
        table = MetricTable(rows=len(active), device=active.device)
        table.write(0, metrics)
        return table.sums(active)

    def plus(self, other: "MetricSums") -> "MetricSums":
        """Both together.

        Raises:
            DataError: they are of different metrics, so a mean would be of neither.
        """
        if self.names != other.names:
            raise DataError(f"{_DIFFERENT} {self.names} and {other.names}; {_ADVICE}")
        return MetricSums(
            names=self.names,
            totals=self.totals + other.totals,
            counts=self.counts + other.counts,
            maxima=torch.maximum(self.maxima, other.maxima),
        )

    def means(self) -> dict[str, float]:
        """Mean per metric over the tokens where it is defined, and `<name>_max` for `MAXIMA`.

        A metric that was defined nowhere is absent. Waits for the device.
        """
        table = torch.stack([self.totals, self.counts, self.maxima]).tolist()
        found: dict[str, float] = {}
        for name, total, count, maxima in zip(self.names, *table, strict=True):
            if count:
                found[name] = total / count
                if name in MAXIMA:
                    found[f"{name}_max"] = maxima
        return found


class MetricTable:
    """The metrics of `rows` tokens, filled block by block; what the blocks made can be freed at once.

    One array from the start: many small ones, kept between the large ones that come and go, would cut the heap into
    pieces that no large one fits in any more, and the process would grow with every block.
    """

    def __init__(self, *, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._names: tuple[str, ...] | None = None
        self._values = torch.empty((0, rows), dtype=torch.float64, device=device)

    @torch.no_grad()
    def write(self, start: int, metrics: Mapping[str, Float[Tensor, " _n"]]) -> None:
        """The metrics of rows `start` to `start + n`.

        Raises:
            DataError: other blocks had other metrics.
        """
        names = tuple(sorted(metrics))
        if self._names is None:
            self._names = names
            self._values = torch.full((len(names), self._rows), torch.nan, dtype=torch.float64, device=self._device)
        if names != self._names:
            raise DataError(f"{_DIFFERENT} {self._names} and {names}; {_ADVICE}")
        if names:
            block = torch.stack([metrics[name] for name in names])
            self._values[:, start : start + block.shape[1]] = block

    def sums(self, active: Bool[Tensor, " L"]) -> MetricSums:
        """Sums and counts over the `active` rows."""
        defined = active & ~self._values.isnan()
        least = self._values.new_full((len(self._values), 1), -inf)  # so that no tokens at all have a greatest value
        return MetricSums(
            names=self._names or (),
            totals=torch.where(defined, self._values, 0.0).sum(-1),
            counts=defined.sum(-1, dtype=torch.float64),
            maxima=torch.cat([least, torch.where(defined, self._values, -inf)], dim=-1).amax(-1),
        )
