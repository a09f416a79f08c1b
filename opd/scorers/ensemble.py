"""Mixture of the distributions of several teachers, as one teacher."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Any, ClassVar, cast

import numpy as np
from jaxtyping import Int32

from opd.errors import ConfigurationError
from opd.method.slots import Scorer
from opd.ports import Context, Need, Role, ScoreKinds
from opd.scorers.teacher import SampledTokens, StudentTopK, TeacherHidden
from opd.settings.ranges import Length, Relative
from opd.settings.validation import settings
from opd.types import EnsembleScores, HiddenScores, Prompt, Scores, TokenScores, TopKScores, Trajectory

READERS = (SampledTokens, StudentTopK, TeacherHidden)


class ContextIds(Enum):
    """The prompt's token ids before a completion, as a model is given them."""

    TEACHER = "teacher"  # `Prompt.teacher_ids`, with what a privileged teacher knows beside
    STUDENT = "student"  # `Prompt.student_ids`, as a copy of the student must read them

    def of(self, prompt: Prompt) -> Int32[np.ndarray, " P"]:
        """These ids of `prompt`."""
        return prompt.teacher_ids if self is ContextIds.TEACHER else prompt.student_ids


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Ensemble:
    """Scores of the mixture of the teachers in `shares`, which all score every trajectory: `p = sum_m shares[m] * p_m`.

    That is the mixture of distributions (a mean of probabilities), not their product (a mean of log-probabilities).
    `shares` are positive and divided by their sum. `reader` is the scorer of each member: sampled tokens, the student's
    top-k (`StudentTopK`) or hidden states, for which the mixture is exact at every id. A teacher's own top-k has no
    mixture, because each teacher would name other ids. Prompts may still name a teacher: it counts for metrics and
    balance only. Example: `Ensemble(shares={"default": 1, "peak": 1})`.
    """

    min_group: ClassVar[int] = 1

    # share of each teacher, by name; they are divided by their sum
    shares: Annotated[Mapping[str, Relative], Length(1)]
    reader: Scorer = field(default_factory=lambda: cast(Any, TeacherHidden()))
    # prompt that a teacher reads, by name, where it is not the teacher's own: STUDENT for a copy of the student
    contexts: Mapping[str, ContextIds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(self.contexts.keys() - self.shares.keys()):
            raise ConfigurationError(
                f"scorer Ensemble mixes the teachers {sorted(self.shares)}, but scorer.contexts names {unknown}; give "
                "them a share or leave them out of scorer.contexts"
            )
        if not isinstance(self.reader, READERS):
            raise ConfigurationError(
                f"scorer Ensemble mixes the scores of {', '.join(r.__name__ for r in READERS)}, but scorer.reader is "
                f"{type(self.reader).__name__}, whose ids differ between teachers; choose one of those"
            )

    @property
    def needs_engines(self) -> frozenset[Need]:
        return frozenset(Need(Role.READER, name) for name in self.shares)

    @property
    def needs(self) -> type[Scores]:
        return self.reader.needs

    @property
    def produces(self) -> type[Scores]:
        return EnsembleScores if isinstance(self.reader, TeacherHidden) else self.reader.produces

    @property
    def requires(self) -> ScoreKinds:
        return self.reader.requires

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        def rerouted(name: str) -> list[Trajectory]:
            ids = self.contexts.get(name, ContextIds.TEACHER)
            return [
                replace(t, prompt=replace(t.prompt, teacher=name, teacher_ids=ids.of(t.prompt))) for t in trajectories
            ]

        members = await asyncio.gather(*[self.reader(rerouted(name), context) for name in self.shares])
        shares = np.asarray(list(self.shares.values()), dtype=np.float64)
        return [_mixture(each, shares / shares.sum()) for each in zip(*members, strict=True)]


def _mixture(members: Sequence[Scores], shares: np.ndarray) -> TokenScores:
    """Scores of the mixture about one trajectory; those of the members are of one kind."""
    tokens = [m for m in members if isinstance(m, TokenScores)]
    logprobs = _log_mean([np.asarray(m.logprobs) for m in tokens], shares)
    hidden = tuple(m for m in tokens if isinstance(m, HiddenScores))
    if hidden:
        each = np.tile(shares.astype(np.float32), (len(logprobs), 1))
        return EnsembleScores(logprobs=logprobs, members=hidden, shares=each)
    supports = [m for m in tokens if isinstance(m, TopKScores)]
    if supports:
        at = _log_mean([np.asarray(m.topk_logprobs) for m in supports], shares)
        rest = _log_mean([np.asarray(m.rest) for m in supports], shares)
        return TopKScores(logprobs=logprobs, topk_ids=supports[0].topk_ids, topk_logprobs=at, rest=rest)
    return TokenScores(logprobs=logprobs)


def _log_mean(logprobs: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
    """`log sum_m shares[m] exp(logprobs[m])`, in float64 inside."""
    terms = [p.astype(np.float64) + np.log(share) for p, share in zip(logprobs, shares, strict=True)]
    return np.logaddexp.reduce(terms).astype(np.float32)
