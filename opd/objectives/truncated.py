"""Truncated importance ratios, for text that an older student sampled."""

from dataclasses import dataclass, replace
from math import log
from typing import Annotated, Any, ClassVar

import torch

from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.method.slots import Objective
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TruncatedRatio:
    """`of`, an objective over sampled tokens, with `min(p / mu, max_ratio)` for its importance ratio `p / mu`.

    Truncated importance sampling (Ionides 2008; in reinforcement learning of language models with `max_ratio` 2): the
    gradient of a token is `max_ratio / ratio` of what it was where the ratio is larger, so one token that was
    unlikely when it was sampled cannot decide a step. Variance for bias: the expected gradient is that of `of` only
    while no ratio is above the bound, as it is on-policy. AsyncOPD (arXiv 2606.24143) found untruncated ratios best for
    reverse KL, which is the default here. Reports `ratio_truncated`, the share of tokens where the bound acts.
    """

    on_policy: ClassVar[bool] = True

    of: Objective
    max_ratio: Annotated[float, In(1, 1e6)] = 2.0

    def __post_init__(self) -> None:
        name = type(self.of).__name__
        if not getattr(self.of, "on_policy", False):
            raise ConfigurationError(
                f"max_ratio={self.max_ratio} bounds importance ratios, but objective {name} has none: it compares "
                "distributions; leave max_ratio=0"
            )
        if isinstance(self.of, SampledReverseKL) and self.of.signal is LogprobSource.BEHAVIOR:
            raise ConfigurationError(
                f"max_ratio={self.max_ratio} is for stale text, on which objective {name} with signal=BEHAVIOR has the "
                "wrong expected gradient in any case; set method.objective.signal=STUDENT"
            )

    @property
    def consumes(self) -> type[Scores]:
        return self.of.consumes

    @property
    def promise(self) -> exact.Promise:
        return self.of.promise

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        own = student.at(batch.target_ids)
        # p / max(mu, p / c) is min(p / mu, c), in value and, the bound being detached, in the gradient's factor.
        bound = own.detach() - log(self.max_ratio)
        truncated = (bound > batch.behavior_logprobs).to(own.dtype)
        believed = replace(batch, behavior_logprobs=torch.maximum(batch.behavior_logprobs, bound))
        result = self.of(student, believed)
        return replace(result, metrics={**result.metrics, "ratio_truncated": truncated})
