"""Rewards of a sampled token as a function of its log-ratio to the teacher: clipped, compressed, bounded, or fixed.

All are policy gradients `-p/mu sg(reward)` on the sampled token, or what those expect. The reward `d = log q - log p`
itself is `SampledReverseKL`. It has no lower bound: one token that the teacher rules out can decide a step, and these
forms are published against that.
"""

from dataclasses import dataclass, replace
from math import log
from typing import Annotated, Any, ClassVar

import torch

from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.method import reward_promises as rewards
from opd.method.shapes import Clip, Floor, ProximalTeacher, Shape
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, TokenScores, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class _Shaped:
    """Common part of both: the shape, and what it promises."""

    # reward as a function of the log-ratio
    shape: Shape

    @property
    def promise(self) -> exact.Promise:
        return self.shape.promise

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        return _limits(self)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class ShapedReverseKL(_Shaped):
    """Policy gradient on a function of the sampled token's log-ratio: loss `-p/mu sg(shape(log q - log p))`.

    Direction: reverse. Support: the sampled token. p is the current student, so the expected gradient is exact for
    stale text, too. Where `shape` changes nothing it is `SampledReverseKL(signal=STUDENT)`, bit for bit. Reports
    `reverse_kl`, of the log-ratio as it is, and `reward_changed`, the mean distance of the reward from it.
    """

    consumes: ClassVar[type[Scores]] = TokenScores
    on_policy: ClassVar[bool] = True

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        log_ratio = logprobs.detach() - batch.scores.logprobs
        cost = -self.shape.reward(-log_ratio)
        ratio = (logprobs - batch.behavior_logprobs).exp()
        changed = (cost - log_ratio).abs()
        return TokenLoss(loss=ratio * cost, metrics={"reverse_kl": log_ratio, "reward_changed": changed})


def _limits(part: Any) -> tuple[exact.LimitingCase, ...]:
    """Ends at which a shape changes nothing."""
    ends = (
        ("limit -> infinity is the reverse KL", Clip(limit=1e6)),
        ("alpha = 1 is the reverse KL", ProximalTeacher(alpha=1.0)),
        ("mixture = 0 is the reverse KL", Floor(mixture=0.0)),
    )
    return tuple(
        exact.LimitingCase(name=name, objective=replace(part, shape=end), promise=exact.ReverseKL(), tolerance=1e-6)
        for name, end in ends
        if isinstance(end, type(part.shape))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class FullShapedReverseKL(_Shaped):
    """Expectation of `ShapedReverseKL` in a state: `-sum_v p sg(shape(log q - log p))` over the whole vocabulary.

    Direction: reverse. Support: the whole vocabulary. Without a draw in it, so token weights that compare a token with
    the others of its step go with it. Reports `reward_changed`, the expected distance of the reward from the log-ratio.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p = student.logprobs
        log_ratio = batch.scores.vocabulary_logprobs - p.detach()
        reward = self.shape.reward(log_ratio)
        changed = torch.linalg.vecdot(p.detach().exp(), (reward - log_ratio).abs())
        return TokenLoss(loss=-torch.linalg.vecdot(p.exp(), reward), metrics={"reward_changed": changed})


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class FixedAdvantage:
    """The same advantage for every sampled token, without a teacher: loss `-p/mu advantage`.

    The control arm of "Does On-Policy Distillation Really Distill?" (arXiv 2608.31046 section 3.2), which found -0.5 on
    the least likely fifth of tokens as good as a teacher. On every token of a state the expected gradient is exactly 0,
    whatever the advantage: nothing is promised (`reward_promises.Nothing`), and what is learned comes from elsewhere,
    such as noise, the optimizer, or a divisor that knows how long a text became. With `below` under 1 the tokens that
    the student gives less than that probability are counted alone, and their mass is what descends.
    """

    consumes: ClassVar[type[Scores]] = Scores
    on_policy: ClassVar[bool] = True

    # advantage of every counted token; published are -0.5 and, to show what it breaks, 0.2
    advantage: Annotated[float, In(-1e3, 1e3, because="below 0 it makes what was sampled less likely")] = -0.5
    # tokens are counted while the current student gives them less than this probability; 1 is all
    below: Annotated[float, In(1e-9, 1, because="1 counts every token")] = 1.0

    def __post_init__(self) -> None:
        if not self.advantage:
            raise ConfigurationError(
                "objective FixedAdvantage needs an advantage other than 0, of which every gradient is 0 and nothing is "
                "trained; set method.objective.advantage=-0.5, as published"
            )

    @property
    def promise(self) -> exact.Promise:
        if self.below == 1:
            return rewards.Nothing()
        return exact.Weighted(weight=-self.advantage, of=rewards.UnlikelyMass(below=self.below))

    def __call__(self, student: StudentLogits, batch: Batch[Scores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        loss = -self.advantage * (logprobs - batch.behavior_logprobs).exp()
        if self.below < 1:
            counted = logprobs.detach() < log(self.below)
            return TokenLoss(loss=torch.where(counted, loss, 0.0), metrics={"unlikely_share": counted.to(loss.dtype)})
        return TokenLoss(loss=loss, metrics={})
