"""Near futures: what the teacher would write next, how far that is from the student's text, and soft labels of it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, ClassVar, Protocol, cast

import numpy as np
import xxhash
from jaxtyping import Float, Int

from opd.ports import (
    AtIds,
    Context,
    GenerateRequest,
    LastHidden,
    Need,
    Role,
    SampledToken,
    Sampling,
    ScoreKind,
    ScoreKinds,
)
from opd.scorers.teacher import ask_several
from opd.scorers.transport import Costs, GroundCost, Labels, Transport, averaged, distance, labels
from opd.settings.ranges import Fraction, In, Temperature, Tokens
from opd.settings.validation import settings
from opd.types import FutureScores, HiddenScores, Scores, TargetScores, TokenScores, TopKScores, Trajectory

NO_CANDIDATE = -1.0  # distance of a token of which none was measured
_ROUNDING = 1e-9  # of a product of a fraction and a count, which may be meant to be whole


class TokenLoss(Protocol):
    """Part that gives the loss of every token, by which it becomes a candidate, before a teacher writes anything."""

    @property
    def needs(self) -> type[Scores]:
        """Type that `Trajectory.behavior` must have at least."""
        ...

    @property
    def requires(self) -> ScoreKinds:
        """Score kind that it requests of the teacher."""
        ...

    def kind(self, trajectory: Trajectory) -> ScoreKind[Scores]:
        """Question to the teacher about a trajectory."""
        ...

    def losses(self, trajectory: Trajectory, answer: Any) -> Float[np.ndarray, " T"]:
        """Loss of every token from the answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedReverseKL:
    """KL(student||teacher) on the student's recorded top-k with all other ids as one: at most that of all of them.

    The student is the policy that wrote.
    """

    needs: ClassVar[type[Scores]] = TopKScores
    requires: ClassVar[ScoreKinds] = frozenset({AtIds})

    def kind(self, trajectory: Trajectory) -> ScoreKind[Scores]:
        behavior = cast(TopKScores, trajectory.behavior)
        return AtIds(ids=np.asarray(behavior.topk_ids, dtype=np.int32))

    def losses(self, trajectory: Trajectory, answer: TopKScores) -> Float[np.ndarray, " T"]:
        p, q = (_whole(scores) for scores in (cast(TopKScores, trajectory.behavior), answer))
        return (np.exp(p) * (p - q)).sum(-1)


def _whole(scores: TopKScores) -> Float[np.ndarray, "T K1"]:
    return np.concatenate([scores.topk_logprobs, np.asarray(scores.rest)[:, None]], axis=1).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledLogRatio:
    """`log mu - log q` of the sampled token: an estimate of KL(mu||q) from one draw, `mu` the policy that wrote."""

    needs: ClassVar[type[Scores]] = TokenScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})

    def kind(self, trajectory: Trajectory) -> ScoreKind[Scores]:
        return SampledToken()

    def losses(self, trajectory: Trajectory, answer: TokenScores) -> Float[np.ndarray, " T"]:
        return np.asarray(trajectory.behavior.logprobs, np.float64) - np.asarray(answer.logprobs, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fork:
    """Window of trajectory `number` that begins at `start`: the student's tokens and the request to the teacher."""

    number: int
    start: int
    own: Int[np.ndarray, " n"]
    request: GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Windows:
    """Settings of windows: at which tokens both models go on, how far, and how what they write is compared.

    Candidates are the `fraction` of a trajectory's sampled tokens with the greatest `loss` (at least one; of equal ones
    the earlier). The student's window is its own `window` tokens from there on, fewer where its text ends or another
    speaks; the teacher's are at most as many, which it writes behind the text before the candidate, `x_<t`.
    """

    min_group: ClassVar[int] = 1

    # by which tokens become candidates
    loss: TokenLoss
    # how far two tokens are apart
    cost: GroundCost
    # how tokens of both windows are matched
    transport: Transport
    # longest window (the paper's K)
    window: Tokens = 50
    # share of a trajectory's sampled tokens that are candidates
    fraction: Annotated[float, In(1e-6, 1, because="0 asks the teacher nothing")] = 0.0225
    # of the teacher's windows: 0 is greedy, 1 samples its own distribution
    temperature: Temperature = 0.0

    @property
    def needs(self) -> type[Scores]:
        return self.loss.needs

    @property
    def needs_engines(self) -> frozenset[Need]:
        return frozenset({Need(Role.READER), Need(Role.WRITER)}) | self.cost.needs_engines

    def _forks(self, trajectories: Sequence[Trajectory], answers: Sequence[Any]) -> list[_Fork]:
        """Windows of all candidates, by the teacher's answers about the loss."""
        losses = [self.loss.losses(t, answer) for t, answer in zip(trajectories, answers, strict=True)]
        return [
            self._fork(number, int(start), t)
            for number, t in enumerate(trajectories)
            for start in candidates(losses[number], t.loss_mask, self.fraction)
        ]

    def _fork(self, number: int, start: int, trajectory: Trajectory) -> _Fork:
        rest = trajectory.loss_mask[start : start + self.window]
        own = trajectory.token_ids[start : start + int(np.append(rest, False).argmin())]
        before = np.concatenate([trajectory.prompt.teacher_ids, trajectory.token_ids[:start]]).astype(np.int32)
        sampling = Sampling(max_tokens=len(own), temperature=self.temperature)
        # Named by what is read, so that equal texts of a group, in any order, get the same window.
        name = f"{trajectory.prompt.id}/ahead/{len(own)}/{xxhash.xxh64_hexdigest(before.tobytes())}"
        request = GenerateRequest(prompt_id=name, sample=0, context_ids=before, sampling=sampling)
        return _Fork(number=number, start=start, own=own, request=request)

    async def _futures(self, teacher: str, forks: Sequence[_Fork], context: Context) -> list[Int[np.ndarray, " m"]]:
        """Token ids of the teacher's windows, one array per candidate; equal requests are sent once."""
        once = {fork.request.prompt_id: fork.request for fork in forks}
        if not once:
            return []
        written = await context.writers[teacher].generate([*once.values()])
        found = {name: np.asarray(one.token_ids) for name, one in zip(once, written, strict=True)}
        return [found[fork.request.prompt_id] for fork in forks]

    def _transported(
        self, forks: Sequence[_Fork], futures: Sequence[Int[np.ndarray, " m"]], context: Context
    ) -> tuple[list[Costs], Float[np.ndarray, " c"]]:
        """Plan of every candidate's windows, and its transport distance `sum gamma C`."""
        costs = self.cost.between([fork.own for fork in forks], futures, context) if forks else []
        plans = self.transport.plans(costs)
        return plans, np.asarray([distance(plan, cost) for plan, cost in zip(plans, costs, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class NearFuture(_Windows):
    """Soft labels of windows in which teacher and student part (TOPD, arXiv 2606.00305).

    A candidate is a fork if its transport distance `D = sum gamma C` is above 0 and not below the `quantile` of those
    of its trajectory. The label of token `i` of a fork's window is `n gamma_ij` at the teacher's token `j`, on the
    student's own text; where windows overlap, the target of a token is the mean of its labels, and `targets` their
    number.

    The paper gives neither cost nor marginals nor solver nor thresholds nor the temperature of windows: all of that is
    INFERRED. So is that the student's window is that of its rollout and not generated again.
    """

    produces: ClassVar[type[Scores]] = TargetScores

    # quantile of the distances of a trajectory's candidates that a fork must reach
    quantile: Fraction = 0.5
    # least probability of an id in a label; rarer ones are left out and the rest renormalized
    least: Annotated[float, In(0, 0.5)] = 1e-4

    @property
    def requires(self) -> ScoreKinds:
        return self.loss.requires

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        answers = await ask_several(trajectories, [(self.loss.kind(t),) for t in trajectories], context)
        forks = self._forks(trajectories, [answer[0] for answer in answers])
        futures = await self._futures(trajectories[0].prompt.teacher, forks, context)
        return await asyncio.to_thread(self._targets, trajectories, forks, futures, context)

    def _targets(
        self,
        trajectories: Sequence[Trajectory],
        forks: Sequence[_Fork],
        futures: Sequence[Int[np.ndarray, " m"]],
        context: Context,
    ) -> list[Scores]:
        plans, apart = self._transported(forks, futures, context)
        made: list[list[Labels]] = [[] for _ in trajectories]
        for number in dict.fromkeys(fork.number for fork in forks):
            mine = [i for i, fork in enumerate(forks) if fork.number == number]
            for i in np.asarray(mine)[divergent(apart[mine], self.quantile)]:
                made[number].append(labels(forks[i].start, plans[i], futures[i], self.least))
        return [averaged(len(t), found) for t, found in zip(trajectories, made, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class FutureDistances(_Windows):
    """The teacher's hidden states, and how far its near future is from the student's at the tokens of greatest loss.

    The distances are those of `NearFuture`, for the test of TOPD's mechanism (arXiv 2606.00305): a loss that is high
    although both models go on alike is a matter of wording, and may count less (`token_weights.far_futures`).
    """

    produces: ClassVar[type[Scores]] = FutureScores

    @property
    def requires(self) -> ScoreKinds:
        return self.loss.requires | {LastHidden}

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        kinds = [(LastHidden(), self.loss.kind(t)) for t in trajectories]
        answers = await ask_several(trajectories, kinds, context)
        forks = self._forks(trajectories, [answer[1] for answer in answers])
        futures = await self._futures(trajectories[0].prompt.teacher, forks, context)
        _, apart = await asyncio.to_thread(self._transported, forks, futures, context)
        ahead = [np.full(len(t), NO_CANDIDATE, dtype=np.float32) for t in trajectories]
        for fork, far in zip(forks, apart, strict=True):
            ahead[fork.number][fork.start] = far
        said = [cast(HiddenScores, answer[0]) for answer in answers]
        return [
            FutureScores(logprobs=s.logprobs, hidden=s.hidden, head=s.head, ahead=far)
            for s, far in zip(said, ahead, strict=True)
        ]


def candidates(losses: Float[np.ndarray, " T"], mask: np.ndarray, fraction: float) -> Int[np.ndarray, " c"]:
    """Places of the `ceil(fraction * n)` greatest losses among the `n` tokens of a mask, in order of the text."""
    order = np.argsort(-np.where(mask, losses, -np.inf), kind="stable")
    return np.sort(order[: ceil(fraction * int(mask.sum()) - _ROUNDING)])


def divergent(distances: Float[np.ndarray, " c"], quantile: float) -> np.ndarray:
    """Mask of the candidates that are forks: distances above 0 that reach the quantile of all of them."""
    least = np.quantile(distances, quantile) if len(distances) else 0.0
    return (distances > 0) & (distances >= least)
