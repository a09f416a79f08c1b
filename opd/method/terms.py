"""Terms of a method's loss: summands with a scorer, token weights, an objective and a normalizer of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import ConfigurationError
from opd.loss.metrics import diagnosed
from opd.loss.packing import Normalizer, TokenMean
from opd.method.schedules import Factor, Schedule
from opd.method.slots import Objective, Scorer, TokenWeight
from opd.settings.validation import settings
from opd.types import Batch, TokenLoss

MAIN = "main"
"""Name of the term that stands in a method's own fields; its metrics have no prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Term:
    """One summand of a method's loss: `coefficient * sum_t weight_t * loss_t / normalizer`.

    Example, a KL to the initial student that fades: `Term(scorer=OfTeacher(teacher="start"),
    objective=FullReverseKL(), coefficient=LinearSchedule(first=0.1, last=0.0))`.
    """

    scorer: Scorer
    objective: Objective
    # parts that weigh tokens, by name; their weights are multiplied
    weights: Mapping[str, TokenWeight] = field(default_factory=dict)
    # what a step's sum of losses is divided by
    normalizer: Normalizer = field(default_factory=TokenMean)
    # factor of the term: a number, or a schedule over steps; with the number 0 there is no term, and no scorer is asked
    coefficient: Factor | Schedule = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOfTerms:
    """Objective of several terms in one pass: `Z_1 sum_k c_k w_k loss_k / Z_k` per token, from the terms of a batch.

    Metrics of a term are `NAME/metric`, those of `MAIN` keep their names; a token that a term does not train has none
    of its metrics (NaN). `NAME/loss` is the term's loss per token and `NAME/coefficient` its coefficient.
    """

    objectives: Mapping[str, Objective]

    def __call__(self, student: Any, batch: Batch[Any]) -> TokenLoss:
        if batch.terms.keys() != self.objectives.keys():
            raise ConfigurationError(
                f"the method has the terms {sorted(self.objectives)}, but the batch was packed for "
                f"{sorted(batch.terms)}; pack it with opd.loss.packing.pack_terms"
            )
        total, metrics = None, dict[str, Tensor]()
        for name, objective in self.objectives.items():
            term = batch.terms[name]
            own = replace(batch, scores=term.scores, weights=term.weights, denominator=term.denominator, terms={})
            result = diagnosed(objective, student, own)
            trained = term.weights > 0
            # Over the first term's own divisor this is 1, so that a term that trains nothing changes no bit of it.
            factor = term.coefficient * (batch.denominator / term.denominator)
            part = term.weights * torch.where(trained, result.loss, 0.0) * factor
            total = part if total is None else total + part
            prefix = "" if name == MAIN else f"{name}/"
            seen = {f"{prefix}{metric}": values for metric, values in result.metrics.items()}
            seen |= {
                f"{name}/loss": result.loss.detach(),
                f"{name}/coefficient": torch.full_like(result.loss.detach(), term.coefficient),
            }
            metrics |= {metric: torch.where(trained, values, torch.nan) for metric, values in seen.items()}
        assert total is not None
        return TokenLoss(loss=total, metrics=metrics)
