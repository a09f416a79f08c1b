"""Objectives over distributions, read at another temperature or weighted by bounded importance ratios."""

from dataclasses import dataclass, replace
from math import log
from typing import Annotated, Any, ClassVar

from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.method.reweighted_promises import AtTemperature as PromiseAtTemperature
from opd.method.reweighted_promises import RatioWeighted
from opd.method.slots import Objective
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, VocabularyScores


def _refuse_estimates(part: Any) -> None:
    """Refuse an inner objective that is an estimate from sampled tokens."""
    if getattr(part.of, "on_policy", False):
        raise ConfigurationError(
            f"objective {type(part).__name__} needs an objective over distributions, but {type(part.of).__name__} is "
            "an estimate from sampled tokens, which has its own importance ratio; choose one such as TopKDivergence "
            "or JensenShannon"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class AtTemperature:
    """`of` between both distributions at `temperature`: their logits are divided by it (Hinton et al., 1503.02531).

    OPSD (arXiv 2601.18734, released code) reads both at the temperature at which it samples. The gradient is not
    multiplied by the temperature's square. At 1 it is `of`, bit for bit.
    """

    on_policy: ClassVar[bool] = False
    consumes: ClassVar[type[Scores]] = VocabularyScores

    # objective over the whole vocabulary
    of: Objective
    # what the logits of student and teacher are divided by
    temperature: Annotated[float, In(0.01, 100, because="1 is the models' own distributions")] = 1.0

    def __post_init__(self) -> None:
        _refuse_estimates(self)
        if self.of.consumes is not VocabularyScores:
            raise ConfigurationError(
                f"objective AtTemperature needs one over the whole vocabulary, since a support says nothing of the "
                f"rest at another temperature, but {type(self.of).__name__} reads {self.of.consumes.__name__}; choose "
                "one such as JensenShannon"
            )

    @property
    def promise(self) -> exact.Promise:
        return PromiseAtTemperature(of=self.of.promise, temperature=self.temperature)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        one = replace(self, temperature=1.0)
        return (
            exact.LimitingCase(
                name="temperature 1 is the objective", objective=one, promise=self.of.promise, tolerance=1e-6
            ),
        )

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        if self.temperature == 1:
            return self.of(student, batch)
        taught = (batch.scores.vocabulary_logprobs / self.temperature).log_softmax(-1)
        softened = replace(batch, scores=replace(batch.scores, vocabulary_logprobs=taught))
        return self.of(replace(student, logits=student.logits / self.temperature), softened)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class ImportanceWeighted:
    """`of` at every token times `min(p / mu, max_ratio)`, detached, with `p / mu` of the sampled token.

    As in the released code of SDPO (arXiv 2601.20802) and TRL's SDFT, with `max_ratio` 2 in both: a token that the
    current student would hardly write counts less, one that it would write more often at most `max_ratio` times. On
    fresh text the ratio is 1 and this is `of`. Reports `ratio_truncated`, the share of tokens where the bound acts.
    """

    on_policy: ClassVar[bool] = True

    # objective over distributions
    of: Objective
    # ratios count as this at most
    max_ratio: Annotated[float, In(1, 1e6, because="below 1 it would act on fresh text")] = 2.0

    def __post_init__(self) -> None:
        _refuse_estimates(self)

    @property
    def consumes(self) -> type[Scores]:
        return self.of.consumes

    @property
    def promise(self) -> exact.Promise:
        return RatioWeighted(of=self.of.promise, max_ratio=self.max_ratio)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        free = replace(self, max_ratio=1e6)
        return (
            exact.LimitingCase(
                name="a bound that no ratio reaches is the objective",
                objective=free,
                promise=self.of.promise,
                tolerance=1e-6,
            ),
        )

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        result = self.of(student, batch)
        log_ratio = student.at(batch.target_ids).detach() - batch.behavior_logprobs
        bound = log(self.max_ratio)
        truncated = (log_ratio > bound).to(result.loss.dtype)
        weighted = result.loss * log_ratio.clamp(max=bound).exp()
        return replace(result, loss=weighted, metrics={**result.metrics, "ratio_truncated": truncated})
