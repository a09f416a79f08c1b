"""Scores by one teacher: at the sampled tokens, at its own top-k, at the student's top-k, or hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np

from opd.errors import ConfigurationError
from opd.ports import (
    AtIds,
    Context,
    LastHidden,
    SampledToken,
    ScoreAnswer,
    ScoreKind,
    ScoreKinds,
    ScoreRequest,
    TopK,
)
from opd.ports.score_kinds import A
from opd.scorers.validation import validate_scores
from opd.settings.ranges import TopIds
from opd.settings.validation import settings
from opd.types import HiddenScores, Prompt, Scores, TokenScores, TopKScores, Trajectory


async def ask(trajectories: Sequence[Trajectory], kinds: Sequence[ScoreKind[A]], context: Context) -> list[A]:
    """Scores of one kind per trajectory, validated: `kinds[i]` is the kind for `trajectories[i]`."""
    answers = await ask_several(trajectories, [(kind,) for kind in kinds], context)
    return [cast(A, scores) for (scores,) in answers]


async def ask_several(
    trajectories: Sequence[Trajectory], kinds: Sequence[tuple[ScoreKind[Scores], ...]], context: Context
) -> list[ScoreAnswer]:
    """Scores of several kinds per trajectory, validated, from one forward of the prompts' teacher (one per group).

    Hidden states are given the number of the output matrix that reads them.
    """
    requests = [
        ScoreRequest(context_ids=t.prompt.teacher_ids, token_ids=t.token_ids, kinds=wanted)
        for t, wanted in zip(trajectories, kinds, strict=True)
    ]
    return await ask_teacher_of(trajectories[0].prompt, requests, context)


async def ask_teacher_of(prompt: Prompt, requests: Sequence[ScoreRequest], context: Context) -> list[ScoreAnswer]:
    """Validated answers of a prompt's teacher about any texts."""
    name = prompt.teacher
    if name not in context.teachers:
        raise ConfigurationError(
            f"prompt {prompt.id!r} asks for teacher {name!r}, but the run has "
            f"{sorted(context.teachers)}; name one of those in the prompt data"
        )
    answers = await context.teachers[name].score(requests)
    validate_scores(requests, answers)
    number = list(context.teachers).index(name)
    return [tuple(_with_head(scores, number) for scores in answer) for answer in answers]


def _with_head(scores: Scores, number: int) -> Scores:
    if not isinstance(scores, HiddenScores):
        return scores
    return replace(scores, head=np.full(len(scores.logprobs), number, dtype=np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class _TeacherScorer:
    """Declarations common to all scorers that ask one teacher about whole trajectories."""

    needs: ClassVar[type[Scores]] = TokenScores
    min_group: ClassVar[int] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens(_TeacherScorer):
    """The teacher's log-probability of each sampled token (one float per token)."""

    produces: ClassVar[type[Scores]] = TokenScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await ask(trajectories, [SampledToken()] * len(trajectories), context)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TeacherTopK(_TeacherScorer):
    """The teacher's own `k` likeliest tokens at every position."""

    produces: ClassVar[type[Scores]] = TopKScores
    requires: ClassVar[ScoreKinds] = frozenset({TopK})

    # teacher's likeliest tokens at each position
    k: TopIds

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await ask(trajectories, [TopK(k=self.k)] * len(trajectories), context)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTopK(_TeacherScorer):
    """The teacher's log-probabilities at the student's own top-k, which the student recorded while it sampled."""

    needs: ClassVar[type[Scores]] = TopKScores
    produces: ClassVar[type[Scores]] = TopKScores
    requires: ClassVar[ScoreKinds] = frozenset({AtIds})

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        kinds: list[AtIds] = []
        for trajectory in trajectories:
            assert isinstance(trajectory.behavior, TopKScores)
            kinds.append(AtIds(ids=np.asarray(trajectory.behavior.topk_ids, dtype=np.int32)))
        return await ask(trajectories, kinds, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHidden(_TeacherScorer):
    """The teacher's last hidden states: with its head, the exact distribution over the whole vocabulary."""

    produces: ClassVar[type[Scores]] = HiddenScores
    requires: ClassVar[ScoreKinds] = frozenset({LastHidden})

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await ask(trajectories, [LastHidden()] * len(trajectories), context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscored(_TeacherScorer):
    """No scores: likelihood training on the text alone, without a teacher."""

    produces: ClassVar[type[Scores]] = Scores
    requires: ClassVar[ScoreKinds] = frozenset()

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return [Scores() for _ in trajectories]
