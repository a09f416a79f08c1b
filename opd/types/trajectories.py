"""Prompts and their trajectories."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic

import numpy as np
from jaxtyping import Bool, Float32, Int32

from opd.types.prompt_rows import PromptText
from opd.types.scores import S, Scores, TokenScores

NO_VERSION = -1
"""The version of tokens that no policy of the run wrote: a teacher's text, or text of a data set."""


class StopReason(Enum):
    """Reason why a completion ended."""

    END = "end"  # the model wrote its end-of-text token
    LENGTH = "length"  # the token limit cut it
    PREFIX = "prefix"  # the method generates only so much of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as token ids for student and teacher, with its answer.

    `teacher_ids` equals `student_ids` unless the teacher is privileged. `source` is the student's prompt as text, from
    which parts can write another for the teacher; None where it is not known. Prompts of one step that share an
    `id` form a group. `weight` >= 0 is how much the prompt counts where a method asks for it
    (`opd.token_weights.teachers.PromptWeight`). Example: `Prompt(id="shop/17", student_ids=[1, 40, 6],
    teacher_ids=[1, 40, 6], teacher="default", task="shop", answer="2 4")`.
    """

    id: str
    student_ids: Int32[np.ndarray, " P"]
    teacher_ids: Int32[np.ndarray, " Q"]
    teacher: str = "default"
    task: str = ""
    answer: str = ""
    weight: float = 1.0
    source: PromptText | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A prompt and one completion of it.

    `behavior` has the log-probabilities of the *actual* sampling distribution, after temperature and truncation;
    `versions` has the policy version that sampled each token (`NO_VERSION`: not the student); `loss_mask` is
    False where a token is context only, or nothing is to be learned from it. `sample` is its number within the group.
    `digests` names the published weights behind each of those versions (`Completion.digests`); it is empty for text
    that no student engine wrote.
    `reward` is what an environment gave for all of it; None where none did.
    """

    prompt: Prompt
    sample: int
    token_ids: Int32[np.ndarray, " T"]
    behavior: TokenScores
    loss_mask: Bool[np.ndarray, " T"]
    versions: Int32[np.ndarray, " T"]
    stop: StopReason
    digests: Mapping[int, str] = field(default_factory=dict)
    reward: float | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Generic[S]):
    """A trajectory and its scores; `terms` are those of the method's further terms, by name (`opd.method.terms`).

    `readings` are what the learner read at its tokens before a step was weighed, by `opd.ports.Reading`, NaN where the
    loss mask is False; there are only those that a token weight declares, and only while it weighs.
    """

    trajectory: Trajectory
    scores: S
    terms: Mapping[str, Scores] = field(default_factory=dict)
    readings: Mapping[Any, Float32[np.ndarray, " T"]] = field(default_factory=dict)
