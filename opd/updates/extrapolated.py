"""Extrapolated updates: jumps along the way that the weights have come, as far as a probe gets better."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated

from opd.errors import ConfigurationError
from opd.ports import Context, Learner, LossFunction
from opd.settings.ranges import In, Length, Matches
from opd.settings.validation import settings
from opd.types import Batch, Scores, StepReport

MATRICES = r"(attn|attention|mlp)\.(?!.*(norm|bias))"
"""Weight matrices of attention and feed-forward modules, by the names that transformers gives them."""

FROM, HERE, BEST = "extrapolation_from", "extrapolation_here", "extrapolation_best"  # snapshots of the learner


class Origin(Enum):
    """Weights from which the next way is measured."""

    ACCEPTED = "accepted"  # those that the last search ended with, as in the released code
    STEPPED = "stepped"  # those of the last search before it jumped, as the paper writes


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class ExtrapolatedStep:
    """An optimizer step, and a search along the way behind it after steps 1, 2, 4, 8, ... (EffOPD, arXiv 2605.11739).

    With `D` = weights now less those of the last search (at first: of the start), the candidates are
    `now + stride * k * D`, k = 1 .. `trials`, in float32. Each is probed; the first that is not better than the one
    before ends the search, and the weights become those of the last better one, bit for bit those of now if there was
    none. Optimizer and schedule stay as they are.

    The probe is the value of `metric` on the step's own batch, which the learner evaluates without a gradient; smaller
    is better. The paper generates answers to 50 training examples instead and compares their accuracy. Engines
    never get a candidate: they hold published versions alone, which other rollouts may be using. An estimate from
    sampled tokens is a poor probe far from the policy that sampled them; a metric over whole distributions is none.

    Nothing is kept here: which steps search follows from `context.step`, and all weights are snapshots of the learner,
    which checkpoints have and new ranks get. With 0 trials it is `OptimizerStep`. Metrics of a step that searches:
    `probes_accepted`, `probes_rejected`, and `probe_before` and `probe_after` of the search.
    """

    # most candidates of a search; 0 never searches
    trials: Annotated[int, In(0, 100)] = 5
    # candidates are this many times the way apart
    stride: Annotated[float, In(0, 1000)] = 2.0
    # regular expression, found in the names of the parameters that are moved; the others keep the step's values
    parameters: Annotated[str, Length(1)] = MATRICES
    # what is probed: loss, or a metric of the objective or the scores that is smaller where the student is better
    metric: Annotated[str, Matches(r"[A-Za-z][\w/]{0,99}", "as metrics are named")] = "loss"
    # a candidate that is as good as the one before is accepted (the paper's text), too, or refused (its code)
    accept_equal: bool = False
    # weights from which the next search measures its way
    origin: Origin = Origin.ACCEPTED

    def __post_init__(self) -> None:
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ConfigurationError(
                f"method.update.parameters needs a regular expression, got {self.parameters!r} ({error}); correct it"
            ) from None

    def searches(self, step: int) -> bool:
        """Whether the update after `step` others ends with a search: it is the first, second, fourth, eighth, ..."""
        return self.trials > 0 and (step + 1) & step == 0

    async def __call__(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction, context: Context
    ) -> StepReport:
        if not self.trials:
            return await learner.step(batches, objective)
        # At every step, since the first ones may have had nothing to train and made no call.
        await learner.snapshot(FROM, keep_older=True)
        report = await learner.step(batches, objective)
        if not self.searches(context.step):
            return report
        found = await self._search(learner, batches, objective)
        return replace(report, metrics={**report.metrics, **found})

    async def _search(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction
    ) -> dict[str, float]:
        """Metrics of a search, after which the learner has its outcome."""
        before = best = await self._probe(learner, batches, objective)
        await learner.snapshot(HERE)
        accepted, rejected = 0, 0
        while accepted < self.trials and not rejected:
            await self._move(learner, accepted + 1)
            value = await self._probe(learner, batches, objective)
            if value < best or (self.accept_equal and value == best):  # NaN is no better
                best, accepted = value, accepted + 1
            else:
                rejected = 1
        if rejected:
            await self._move(learner, accepted)
        await self._note_origin(learner, jumped=accepted > 0)
        return {
            "probes_accepted": float(accepted),
            "probes_rejected": float(rejected),
            "probe_before": before,
            "probe_after": best,
        }

    async def _move(self, learner: Learner, candidate: int) -> None:
        """Make the weights those of a candidate; 0 is the step's own. Always from `HERE`: so one has the same bits
        whenever it is made."""
        await learner.restore(HERE)
        if candidate:
            await learner.extrapolate(FROM, self.stride * candidate, only=self.parameters)

    async def _note_origin(self, learner: Learner, *, jumped: bool) -> None:
        if self.origin is Origin.ACCEPTED or not jumped:
            await learner.snapshot(FROM)
            return
        await learner.snapshot(BEST)
        await learner.restore(HERE)
        await learner.snapshot(FROM)
        await learner.restore(BEST)

    async def _probe(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction
    ) -> float:
        metrics = await learner.evaluate(batches, objective)
        if self.metric not in metrics:
            raise ConfigurationError(
                f"update ExtrapolatedStep needs a metric that the method reports, got {self.metric!r} (reported: "
                f"{', '.join(sorted(metrics))}); correct method.update.metric"
            )
        return metrics[self.metric]
