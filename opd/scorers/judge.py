"""Group-relative advantages from a model that judges whole answers (RLAIF)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Int32

from opd.errors import ConfigurationError
from opd.method.templates import encoded
from opd.ports import Context, Need, Role, SampledToken, ScoreKinds, ScoreRequest, Tokenizer
from opd.scorers.reward import group_advantages
from opd.scorers.teacher import ask_teacher_of
from opd.settings.ranges import In, Names, Template
from opd.settings.validation import settings
from opd.types import AdvantageScores, Prompt, Scores, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class JudgeAdvantage:
    """Advantage of an answer from a judge's verdict: `P(yes) / (P(yes) + P(no))` after the answer and a question.

    The judge is a teacher of the run, named `judge` (`teachers.judge.path=...`, of any backend: its deadline, retries
    and token are those of teachers). It reads `before`, the answer, `after`, and is asked for the log-probability of
    the first token of each verdict; it writes nothing. The reward lies in 0 .. 1, and is taken relative to the group
    as by `GroupAdvantage`. An answer that the token limit cut is judged as it is.

    What the student wrote is data: its own token ids stand in the judge's context, without special ones, and no text of
    it is encoded again, so that nothing spelled like a special token or a template becomes one. `before` and `after`
    are the user's text, with `{prompt}` (the first alone) and `{answer}`, the reference; for conversations `after`
    begins with what ends the assistant's turn.
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = AdvantageScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})
    min_group: ClassVar[int] = 2

    # teacher of the run that judges
    judge: Names = "judge"
    # what the judge reads before the answer
    before: Template = "{prompt}"
    # what it reads behind it
    after: Template = "\n\nIs this answer right? Reply yes or no:"
    # verdict for an answer; its first token counts
    yes: Template = " yes"
    # verdict against it; its first token counts
    no: Template = " no"
    # divide advantages by the group's standard deviation
    scale_by_std: bool = True
    # added to that standard deviation
    epsilon: Annotated[float, In(1e-12, 1, because="it keeps a division finite")] = 1e-4

    @property
    def needs_engines(self) -> frozenset[Need]:
        return frozenset({Need(Role.READER, self.judge)})

    @property
    def questions(self) -> Mapping[str, Sequence[str]]:
        return {self.judge: (self.before + self.after,)}

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        prompt = trajectories[0].prompt
        verdicts = self._verdicts(context.tokenizer)
        around = (encoded(self.before, prompt, {"answer": prompt.answer}, context), self._question(prompt, context))
        requests = [
            ScoreRequest(context_ids=_within(around, t, context), token_ids=verdict, kinds=(SampledToken(),))
            for t in trajectories
            for verdict in verdicts
        ]
        answers = await ask_teacher_of(replace(prompt, teacher=self.judge), requests, context)
        found = [float(scores.logprobs[0]) for (scores,) in answers if isinstance(scores, TokenScores)]
        odds = np.asarray(found, dtype=np.float64).reshape(-1, 2)
        rewards = np.exp(odds[:, 0] - np.logaddexp(odds[:, 0], odds[:, 1]))
        return group_advantages(trajectories, rewards, self.epsilon if self.scale_by_std else None)

    def check_spelling(self, tokenizer: Tokenizer) -> None:
        """Refuse verdicts that begin with the same token. Raises `ConfigurationError`."""
        self._verdicts(tokenizer)

    def _verdicts(self, tokenizer: Tokenizer) -> list[Int32[np.ndarray, " 1"]]:
        skip = len(tokenizer.encode(""))
        yes, no = (tokenizer.encode(text)[skip:][:1] for text in (self.yes, self.no))
        if not (len(yes) and len(no)) or yes[0] == no[0]:
            raise ConfigurationError(
                f"scorer JudgeAdvantage tells verdicts by their first tokens, but yes={self.yes!r} begins with "
                f"{yes.tolist()} and no={self.no!r} with {no.tolist()} in the student's tokenizer; choose words that "
                "begin with different tokens"
            )
        return [yes, no]

    def _question(self, prompt: Prompt, context: Context) -> Int32[np.ndarray, " Q"]:
        text = self.after.replace("{answer}", prompt.answer)
        return context.tokenizer.encode(text)[len(context.tokenizer.encode("")) :]


def _within(around: Sequence[np.ndarray], trajectory: Trajectory, context: Context) -> Int32[np.ndarray, " Q"]:
    """Ids of an answer between what stands before and behind it, without special tokens."""
    special = [i for i in set(trajectory.token_ids.tolist()) if not context.tokenizer.decode(np.asarray([i]))]
    said = trajectory.token_ids[~np.isin(trajectory.token_ids, special)]
    return np.concatenate([around[0], said, around[1]]).astype(np.int32)
