"""Lookahead rewards: how sure the teacher would be after a token, among those that the student could have sampled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float, Int

from opd.ports import Context, Need, Role, SampledToken, ScoreKinds, ScoreRequest, TopK
from opd.scorers.teacher import ask_teacher_of
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import CreditScores, Scores, TokenScores, TopKScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """Look at what follows `tokens` at `position` of trajectory `number`; the last of them is the sampled one."""

    number: int
    position: int
    tokens: Int[np.ndarray, " n"]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class LookaheadReward:
    """The teacher's log-probability of each sampled token, and its lookahead group reward (LGR, arXiv 2605.30833).

    At a token that the student was uncertain about (entropy above `threshold`), the teacher's confidence `c(v) = max_u
    q(u | before, v)` is asked for after each of the student's recorded top-k candidates `v`. The credit of the sampled
    token is `(c(y) - mean c) / (std c + epsilon)` over the candidates; elsewhere it is 0. INFERRED, since the paper
    itself could not be read: entropy in nats, the standard deviation of the k, and a sampled token beyond them, which
    gets its own confidence and the group's mean and deviation. A group that differs by no more than `epsilon` gives no
    credit. The last token of a text gets none, either: nothing follows it.

    The entropy is that of the k recorded probabilities and the rest as one more, at most that of the distribution; the
    rollout's `record_topk` is the number of candidates. Every candidate is a request of its own to the teacher, about
    the text up to there: k + 1 at most for every such token, equal ones of a group once. The paper's tree attention,
    which reads all candidates in one pass, has no counterpart here.
    """

    needs: ClassVar[type[Scores]] = TopKScores
    produces: ClassVar[type[Scores]] = CreditScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken, TopK})
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.READER)})
    min_group: ClassVar[int] = 1
    looks_ahead: ClassVar[bool] = True  # the teacher is also asked about tokens that no text has

    # entropy in nats above which a token is looked ahead from
    threshold: Annotated[float, In(0, 100)] = 0.2
    # added to the standard deviation of a group's confidences, and what it must exceed
    epsilon: Annotated[float, In(1e-15, 1)] = 1e-6

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        looks = [look for number, t in enumerate(trajectories) for look in self._looks(number, t)]
        own = [
            ScoreRequest(context_ids=t.prompt.teacher_ids, token_ids=t.token_ids, kinds=(SampledToken(),))
            for t in trajectories
        ]
        further = {key: r for look in looks for key, r in _requests(look, trajectories[look.number])}  # equal ones once
        answers = await ask_teacher_of(trajectories[0].prompt, [*own, *further.values()], context)
        confidence = {key: _confidence(answer[0]) for key, answer in zip(further, answers[len(own) :], strict=True)}
        credit = [np.zeros(len(t), dtype=np.float32) for t in trajectories]
        for look in looks:
            found = np.asarray([confidence[key] for key, _ in _requests(look, trajectories[look.number])])
            credit[look.number][look.position] = standing(found[-1], found[:-1], self.epsilon)
        return [_credited(answer[0], c) for answer, c in zip(answers, credit, strict=False)]

    def _looks(self, number: int, trajectory: Trajectory) -> Iterator[_Look]:
        behavior = trajectory.behavior
        assert isinstance(behavior, TopKScores)
        uncertain = (entropy(behavior) > self.threshold) & trajectory.loss_mask
        for position in np.flatnonzero(uncertain[:-1]):
            tokens = np.append(np.asarray(behavior.topk_ids)[position], trajectory.token_ids[position])
            yield _Look(number=number, position=int(position), tokens=tokens.astype(np.int32))


def entropy(scores: TopKScores) -> Float[np.ndarray, " T"]:
    """Entropy in nats of the support's probabilities and the rest as one: at most that of the distribution."""
    logs = np.concatenate([scores.topk_logprobs, np.asarray(scores.rest)[:, None]], axis=1).astype(np.float64)
    probabilities = np.exp(logs)
    return -(probabilities * np.where(probabilities > 0, logs, 0.0)).sum(-1)


def standing(own: float, group: Float[np.ndarray, " K"], epsilon: float) -> float:
    """Distance of `own` from the mean of `group` in its standard deviations; 0 where the group hardly differs."""
    spread = float(group.std())
    return float((own - group.mean()) / (spread + epsilon)) if spread > epsilon else 0.0


def _requests(look: _Look, trajectory: Trajectory) -> Iterator[tuple[tuple[bytes, int], ScoreRequest]]:
    """Requests about what follows each token, with a key of all that is read: the second row of two, not its id."""
    before = np.concatenate([trajectory.prompt.teacher_ids, trajectory.token_ids[: look.position]]).astype(np.int32)
    after = trajectory.token_ids[look.position + 1]
    for token in look.tokens:
        pair = np.asarray([token, after], dtype=np.int32)
        yield (before.tobytes(), int(token)), ScoreRequest(context_ids=before, token_ids=pair, kinds=(TopK(k=1),))


def _confidence(scores: Scores) -> float:
    assert isinstance(scores, TopKScores)
    return float(np.exp(np.float64(np.asarray(scores.topk_logprobs)[1, 0])))


def _credited(scores: Scores, credit: Float[np.ndarray, " T"]) -> CreditScores:
    assert isinstance(scores, TokenScores)
    return CreditScores(logprobs=scores.logprobs, credit=credit)
