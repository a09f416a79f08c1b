"""A teacher reads what was written: written tokens, its own top-k, the student's top-k, or hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from opd.errors import ConfigurationError
from opd.ports import AtIds, Engines, LastHidden, SampledToken, ScoreKind, ScoreKinds, ScoreRequest, TopK
from opd.scorers.validation import verify
from opd.settings.ranges import TopIds
from opd.settings.validation import settings
from opd.types import HiddenScores, Scores, TokenScores, TopKScores, Trajectory


async def ask(
    trajectories: Sequence[Trajectory], wants: Sequence[ScoreKind], engines: Engines
) -> Sequence[TokenScores]:
    """Ask the prompts' teacher (one per group), verify the answer, and note whose output matrix reads it."""
    requests = [
        ScoreRequest(context_ids=t.prompt.teacher_ids, token_ids=t.token_ids, kind=kind)
        for t, kind in zip(trajectories, wants, strict=True)
    ]
    name = trajectories[0].prompt.teacher
    if name not in engines.teachers:
        raise ConfigurationError(
            f"prompt {trajectories[0].prompt.id!r} asks for teacher {name!r}, but the run has "
            f"{sorted(engines.teachers)}; name one of those in the prompt data"
        )
    answers = await engines.teachers[name].score(requests)
    verify(requests, answers)
    number = list(engines.teachers).index(name)
    return [
        replace(a, head=np.full(len(a.logprobs), number, dtype=np.int32)) if isinstance(a, HiddenScores) else a
        for a in answers
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _TeacherScorer:
    """What all scorers that ask one teacher about whole trajectories share."""

    needs: ClassVar[type[Scores]] = TokenScores
    min_group: ClassVar[int] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens(_TeacherScorer):
    """The teacher's log-probability of each written token (one float per token)."""

    produces: ClassVar[type[Scores]] = TokenScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})

    async def __call__(self, trajectories: Sequence[Trajectory], engines: Engines) -> Sequence[Scores]:
        return await ask(trajectories, [SampledToken()] * len(trajectories), engines)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TeacherTopK(_TeacherScorer):
    """The teacher's own `k` likeliest tokens at every position."""

    produces: ClassVar[type[Scores]] = TopKScores
    requires: ClassVar[ScoreKinds] = frozenset({TopK})

    # teacher's likeliest tokens at each position
    k: TopIds

    async def __call__(self, trajectories: Sequence[Trajectory], engines: Engines) -> Sequence[Scores]:
        return await ask(trajectories, [TopK(k=self.k)] * len(trajectories), engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTopK(_TeacherScorer):
    """The teacher's log-probabilities at the student's own top-k, which the student recorded while it wrote."""

    needs: ClassVar[type[Scores]] = TopKScores
    produces: ClassVar[type[Scores]] = TopKScores
    requires: ClassVar[ScoreKinds] = frozenset({AtIds})

    async def __call__(self, trajectories: Sequence[Trajectory], engines: Engines) -> Sequence[Scores]:
        wants: list[ScoreKind] = []
        for trajectory in trajectories:
            assert isinstance(trajectory.behavior, TopKScores)
            wants.append(AtIds(ids=np.asarray(trajectory.behavior.topk_ids, dtype=np.int32)))
        return await ask(trajectories, wants, engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHidden(_TeacherScorer):
    """The teacher's last hidden states: with its head, the exact distribution over the whole vocabulary."""

    produces: ClassVar[type[Scores]] = HiddenScores
    requires: ClassVar[ScoreKinds] = frozenset({LastHidden})

    async def __call__(self, trajectories: Sequence[Trajectory], engines: Engines) -> Sequence[Scores]:
        return await ask(trajectories, [LastHidden()] * len(trajectories), engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscored(_TeacherScorer):
    """Nobody testifies: likelihood training on the text alone."""

    produces: ClassVar[type[Scores]] = Scores
    requires: ClassVar[ScoreKinds] = frozenset()

    async def __call__(self, trajectories: Sequence[Trajectory], engines: Engines) -> Sequence[Scores]:
        return [Scores() for _ in trajectories]
