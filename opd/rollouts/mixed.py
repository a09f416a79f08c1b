"""Mixture of on-policy and fixed text (GKD's lambda), and the data set's own answers as text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, ClassVar

import numpy as np

from opd.errors import DataError
from opd.method.promises import RolloutLimit
from opd.method.slots import Rollout
from opd.ports import Completion, Context, Need, needs_of
from opd.rollouts.seeds import heads
from opd.rollouts.student import StudentRollout, trajectory
from opd.settings.ranges import In, Seed, Tokens
from opd.settings.validation import settings
from opd.types import NO_VERSION, Prompt, StopReason, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class AnswerRollout:
    """The data set's own answers as completions, each followed by the end-of-text token; no model generates.

    A data set has no log-probabilities: they are 0 everywhere, as of a model that is certain, and used by diagnostics
    alone.
    """

    records: ClassVar[type[TokenScores]] = TokenScores
    needs_engines: ClassVar[frozenset[Need]] = frozenset()
    on_policy: ClassVar[bool] = False
    truncated: ClassVar[bool] = True

    # longest answer
    max_tokens: Tokens

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        start = context.tokenizer.encode("")  # what a template puts before every text
        return [self._one(prompt, i, len(start), context) for i, prompt in enumerate(group)]

    def _one(self, prompt: Prompt, sample: int, skip: int, context: Context) -> Trajectory:
        if not prompt.answer:
            raise DataError(
                f"rollout AnswerRollout needs an answer for every prompt, but {prompt.id!r} has none; set "
                "prompts.answer_column or choose rollout TeacherRollout"
            )
        ids = np.append(context.tokenizer.encode(prompt.answer)[skip:], context.tokenizer.eos_id).astype(np.int32)
        kept = ids[: self.max_tokens]
        completion = Completion(
            token_ids=kept,
            behavior=TokenScores(logprobs=np.zeros(len(kept), dtype=np.float32)),
            versions=np.full(len(kept), NO_VERSION, dtype=np.int32),
            stop=StopReason.END if len(kept) == len(ids) else StopReason.LENGTH,
        )
        return trajectory(prompt, sample, completion)


class Coin(Enum):
    """Unit that one flip of the coin of `Mixed` decides about."""

    GROUP = "group"
    STEP = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Mixed:
    """Mixture of two rollouts: the student with probability `fraction`, otherwise `fixed` (GKD, arXiv 2306.13649).

    `fraction` is the paper's lambda, the share of on-policy text. Which source a group gets is a pure function of the
    seed and its prompt's id, or with `coin=STEP`, as in the paper, of the seed and the step: runs repeat, ranks
    agree. With `coin=GROUP` a prompt that comes again gets the same source again.
    """

    # how the student generates
    student: StudentRollout
    # where the rest of the text comes from
    fixed: Rollout
    # share of groups that the student generates (GKD's lambda)
    fraction: Annotated[float, In(0, 1, because="GKD's lambda: the paper uses 0, 0.5 and 1")] = 0.5
    # what the coin is flipped for: each GROUP, or a whole STEP (as published)
    coin: Coin = Coin.GROUP
    # of the coin
    seed: Seed = 0

    @property
    def records(self) -> type[TokenScores]:
        student, fixed = self.student.records, self.fixed.records
        return fixed if issubclass(student, fixed) else TokenScores

    @property
    def needs_engines(self) -> frozenset[Need]:
        return needs_of(self.student) | needs_of(self.fixed)

    @property
    def on_policy(self) -> bool:
        return self.fraction == 1

    @property
    def truncated(self) -> bool:
        return self.student.truncated or (self.fraction < 1 and self.fixed.truncated)

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        return (
            RolloutLimit(name="lambda = 0 is the fixed set", rollout=replace(self, fraction=0.0), equals=self.fixed),
            RolloutLimit(name="lambda = 1 is the student", rollout=replace(self, fraction=1.0), equals=self.student),
        )

    def student_generates(self, prompt_id: str, step: int = 0) -> bool:
        """Side of the coin for the group of a prompt at a step."""
        unit = prompt_id if self.coin is Coin.GROUP else f"step\x1f{step}"
        return heads(self.seed, unit, self.fraction)

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        source = self.student if self.student_generates(group[0].id, context.step) else self.fixed
        return await source(group, context)
