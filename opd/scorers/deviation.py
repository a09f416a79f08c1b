"""Deviation of a teacher from itself: movements of its log-probabilities under probes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np

from opd.method.templates import encoded
from opd.ports import Context, SampledToken, ScoreKinds, ScoreRequest
from opd.scorers.teacher import ask_teacher_of
from opd.settings.ranges import Length, Template
from opd.settings.validation import settings
from opd.types import DeviationScores, Scores, TokenScores, Trajectory

RIGHT = "{prompt}\n\nFeedback on the answer that follows: it is correct."
WRONG = "{prompt}\n\nFeedback on the answer that follows: it is wrong."


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SelfDeviation:
    """The teacher's log-probability of each sampled token, and its extremes under probes (Cal-OPD, arXiv 2609.21619).

    A probe is another context for the same tokens: a template around the student's prompt (`{prompt}`; `{answer}` is
    the reference answer). `falls` is the largest fall of a token's log-probability under any of them, `rises` the
    largest rise, both at least 0: which probe moves it which way is not assumed. The teacher reads each text once in
    its own context and once more per probe. Published are one positive and one negative evaluation of the text, told
    whatever it is worth; their wording, and that it stands behind the prompt, is INFERRED. A probe with the solution
    (`{answer}`) is published to filter too much.
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = DeviationScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})
    min_group: ClassVar[int] = 1

    # contexts in which the teacher reads a text again, by name
    probes: Annotated[Mapping[str, Template], Length(1)] = field(
        default_factory=lambda: {"right": RIGHT, "wrong": WRONG}
    )

    @property
    def questions(self) -> Mapping[str, Sequence[str]]:
        return {"": tuple(self.probes.values())}

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        first = trajectories[0].prompt  # of a group: what is read around a text is the same for all
        probes = [encoded(template, first, {"answer": first.answer}, context) for template in self.probes.values()]
        requests = [
            ScoreRequest(context_ids=ids, token_ids=t.token_ids, kinds=(SampledToken(),))
            for t in trajectories
            for ids in (t.prompt.teacher_ids, *probes)
        ]
        answers = await ask_teacher_of(first, requests, context)
        found = [np.asarray(scores.logprobs) for (scores,) in answers if isinstance(scores, TokenScores)]
        size = 1 + len(probes)
        return [_deviation(found[i], found[i + 1 : i + size]) for i in range(0, len(found), size)]


def _deviation(plain: np.ndarray, probed: Sequence[np.ndarray]) -> DeviationScores:
    shifts = np.stack([np.zeros_like(plain), *(other - plain for other in probed)])
    return DeviationScores(logprobs=plain, falls=-shifts.min(0), rises=shifts.max(0))
