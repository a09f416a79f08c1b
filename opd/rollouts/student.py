"""Rollouts of one completion per prompt: by the student (on-policy), or by a teacher (the SFT baseline)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from opd.errors import ConfigurationError
from opd.ports import Completion, Context, GenerateRequest, Need, Role, Sampling, TeacherBlend, TextEngine
from opd.settings.ranges import AtMost, In, Temperature, Tokens, TopP
from opd.settings.validation import settings
from opd.types import NO_VERSION, Prompt, TokenScores, TopKScores, Trajectory


def _requests(
    group: Sequence[Prompt], sampling: Sampling, blend: TeacherBlend | None, *, as_teacher: bool
) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            prompt_id=p.id,
            sample=i,
            context_ids=p.teacher_ids if as_teacher else p.student_ids,
            sampling=sampling,
            blend=blend,
        )
        for i, p in enumerate(group)
    ]


def trajectory(prompt: Prompt, sample: int, completion: Completion) -> Trajectory:
    """A completion with its prompt; every completion token may be trained."""
    return Trajectory(
        prompt=prompt,
        sample=sample,
        token_ids=completion.token_ids,
        behavior=completion.behavior,
        loss_mask=np.ones(len(completion.token_ids), dtype=bool),
        versions=completion.versions,
        stop=completion.stop,
        digests=completion.digests,
    )


async def generate(
    group: Sequence[Prompt],
    engine: TextEngine,
    sampling: Sampling,
    *,
    as_teacher: bool = False,
    blend: TeacherBlend | None = None,
) -> list[Trajectory]:
    """One trajectory per prompt; a prompt that is n times in the group gets n different samples.

    `as_teacher`: from the teacher's context, which a privileged teacher needs.
    """
    completions = await engine.generate(_requests(group, sampling, blend, as_teacher=as_teacher))
    if as_teacher:  # no learner has published a teacher's weights
        completions = [replace(c, digests={}) for c in completions]
    return [trajectory(p, i, c) for i, (p, c) in enumerate(zip(group, completions, strict=True))]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class StudentRollout:
    """On-policy completions: the student samples from its own context.

    `record_topk` > 0 also records the student's top-k while it samples, for scorers that ask the teacher about
    the student's support. With `top_p` < 1 that is refused: what is recorded is the distribution that was sampled from,
    in which all ids beyond the nucleus are alike.
    """

    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.STUDENT)})
    on_policy: ClassVar[bool] = True

    # longest completion
    max_tokens: Tokens
    # 1 samples the model's own distribution, 0 is greedy
    temperature: Temperature = 1.0
    # share of probability that is sampled from; 1 is all of it
    top_p: TopP = 1.0
    # likeliest tokens that the student records while it samples, for scorers that need its top-k
    record_topk: Annotated[int, In(0, 1_000_000), AtMost("vocabulary")] = 0

    def __post_init__(self) -> None:
        if self.record_topk and self.top_p < 1:
            raise ConfigurationError(
                f"rollout StudentRollout needs top_p=1 to record the student's top {self.record_topk}, but got "
                f"{self.top_p}, which leaves nothing of the ids beyond the nucleus and would record any of them; set "
                "rollout.top_p=1, or let the learner choose (objective SupportDivergence with support StudentTop)"
            )

    @property
    def records(self) -> type[TokenScores]:
        return TopKScores if self.record_topk else TokenScores

    @property
    def truncated(self) -> bool:
        return self.top_p < 1 or self.temperature == 0

    @property
    def sampling(self) -> Sampling:
        """Settings of sampling that every request has."""
        return Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, topk=self.record_topk
        )

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        return await generate(group, context.student, self.sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TeacherRollout:
    """Completions by the prompt's teacher, from its own context: off-policy data for sequence-level distillation.

    A teacher never changes, so a prompt that comes again (a fixed prompt set) gets the same text again: "one
    teacher sample per prompt" is what a fixed set means.
    """

    records: ClassVar[type[TokenScores]] = TokenScores
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.WRITER)})
    on_policy: ClassVar[bool] = False

    # longest completion
    max_tokens: Tokens
    # 1 samples the teacher's own distribution, 0 is greedy
    temperature: Temperature = 1.0
    # share of probability that is sampled from; 1 is all of it
    top_p: TopP = 1.0

    @property
    def truncated(self) -> bool:
        return self.top_p < 1 or self.temperature == 0

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        sampling = Sampling(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)
        sampled = await generate(group, context.writers[group[0].teacher], sampling, as_teacher=True)
        return [replace(t, versions=np.full(len(t), NO_VERSION, dtype=np.int32)) for t in sampled]
