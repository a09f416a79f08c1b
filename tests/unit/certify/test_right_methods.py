"""Right methods of one's own that no shipped one is like: a certificate that refused them would be of no use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from jaxtyping import Float
from torch import Tensor

from opd.certify.certify import certify
from opd.loss.chunked import StudentLogits
from opd.method.method import Method
from opd.method.promises import Promise, States
from opd.objectives.sampled import ClippedPolicyGradient
from opd.ports import Context, Need, Role, SampledToken, ScoreKinds
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import SampledTokens, TeacherHidden
from opd.types import (
    AdvantageScores,
    Batch,
    Scores,
    TokenLoss,
    TokenScores,
    Trajectory,
    VocabularyScores,
)

Divergence = Callable[[Tensor, Tensor], Tensor]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p.exp() - q.exp()).abs().sum(-1)


def chi_squared(p: Tensor, q: Tensor) -> Tensor:
    """Of densities e^p and e^q; the ratio of two far ones is e^80."""
    return (2 * p - q).exp().sum(-1) - 1


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True, slots=True)
class Of:
    """Promise of a divergence."""

    divergence: Divergence

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return self.divergence(states.student, states.teacher)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """A divergence over the whole vocabulary, by autograd."""

    divergence: Divergence
    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    @property
    def promise(self) -> Promise:
        return Of(self.divergence)

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        return TokenLoss(loss=self.divergence(student.logprobs, batch.scores.vocabulary_logprobs), metrics={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """Policy gradient with this cost of a sampled token, by its log-ratio."""

    divergence: Divergence
    cost: Callable[[Tensor], Tensor]
    consumes: ClassVar[type[Scores]] = TokenScores
    on_policy: ClassVar[bool] = True

    @property
    def promise(self) -> Promise:
        return Of(self.divergence)

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        ratio = (logprobs - batch.behavior_logprobs).exp()
        return TokenLoss(loss=ratio * self.cost(logprobs - batch.scores.logprobs).detach(), metrics={})


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscountedReturns:
    """Return of each token: the teacher's log-ratios of it and of later ones, with a discount."""

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = AdvantageScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.READER)})
    min_group: ClassVar[int] = 1
    gamma: float = 0.9

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        found = []
        for text, scores in zip(trajectories, await SampledTokens()(trajectories, context), strict=True):
            assert isinstance(scores, TokenScores)
            gains = np.where(text.loss_mask, np.asarray(scores.logprobs) - text.behavior.logprobs, 0.0)
            later = np.arange(len(gains)) - np.arange(len(gains))[:, None]
            returns = np.where(later >= 0, self.gamma ** np.maximum(later, 0), 0.0) @ gains
            advantages = np.where(text.loss_mask, returns, 0.0).astype(np.float32)
            found.append(AdvantageScores(advantages=advantages, rewards=gains.astype(np.float32)))
        return found


RIGHT = {
    **{d.__name__: (TeacherHidden(), Exact(divergence=d)) for d in (total_variation, chi_squared)},
    "a cost with a baseline": (SampledTokens(), Estimated(divergence=reverse_kl, cost=lambda d: d - 1.0)),
    "returns of one's own": (DiscountedReturns(), ClippedPolicyGradient()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_method_is_certified(name: str) -> None:
    scorer, objective = RIGHT[name]
    found = certify(Method(name="own", rollout=StudentRollout(max_tokens=8), scorer=scorer, objective=objective))
    assert found.passed, {row.name: row.measured for row in found.rows if not row.passed}


def test_a_baseline_hides_no_wrong_cost() -> None:
    objective = Estimated(divergence=reverse_kl, cost=lambda d: d / 3 - 1.0)
    method = Method(name="own", rollout=StudentRollout(max_tokens=8), scorer=SampledTokens(), objective=objective)
    assert "zero where the student equals its teacher" in certify(method).failures


def test_what_is_no_divergence_is_seen_where_nothing_is_left_to_learn() -> None:
    """It trains what it promises: only that it goes on where student and teacher are equal shows it."""

    def certainty(p: Tensor, q: Tensor) -> Tensor:
        return -(p.exp() * q).sum(-1)

    method = Method(
        name="own",
        rollout=StudentRollout(max_tokens=8),
        scorer=TeacherHidden(),
        objective=Exact(divergence=certainty),
    )
    assert certify(method).failures == ["zero where the student equals its teacher"]
