"""Guided rollouts: the student writes some of its texts from the teacher's context."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from opd.ports import Context, GenerateRequest, Need, needs_of
from opd.rollouts.mixed import RolloutLimit
from opd.rollouts.seeds import heads
from opd.rollouts.student import StudentRollout, trajectory
from opd.settings.ranges import In, Seed
from opd.settings.validation import settings
from opd.types import Prompt, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class GuidedRollout:
    """The student's texts, a share of which it writes after reading what its teacher reads (EDGE-OPD, 2605.23493).

    So it writes tokens that it would never sample from its own prompt. Learner and scorers keep the student's prompt: a
    guided text is learned as if the student had written it without guidance, and `behavior` has the log-probabilities
    with it. Which texts are guided is a pure function of the seed, the prompt and the number of the sample.
    """

    # how the student generates
    student: StudentRollout
    # share of texts that are guided (the paper's rho_g)
    fraction: Annotated[float, In(0, 1, because="published is 0.5")] = 0.5
    # of the coin
    seed: Seed = 0

    @property
    def records(self) -> type[TokenScores]:
        return self.student.records

    @property
    def needs_engines(self) -> frozenset[Need]:
        return needs_of(self.student)

    @property
    def on_policy(self) -> bool:
        return self.fraction == 0

    @property
    def truncated(self) -> bool:
        return self.student.truncated

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        none = replace(self, fraction=0.0)
        return (RolloutLimit(name="without guided texts it is the student", rollout=none, equals=self.student),)

    def guided(self, prompt_id: str, sample: int) -> bool:
        """Whether a text is written from the teacher's context."""
        return heads(self.seed, f"{prompt_id}\x1f{sample}", self.fraction)

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        sampling = self.student.sampling
        requests = [
            GenerateRequest(
                prompt_id=p.id,
                sample=i,
                context_ids=p.teacher_ids if self.guided(p.id, i) else p.student_ids,
                sampling=sampling,
            )
            for i, p in enumerate(group)
        ]
        completions = await context.student.generate(requests)
        return [trajectory(p, i, c) for i, (p, c) in enumerate(zip(group, completions, strict=True))]
