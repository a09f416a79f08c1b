"""Engines that a method may call: writers, teachers, graders, the tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from opd.ports.environment import MakeEnvironment
from opd.ports.requests import Completion, GenerateRequest, ScoreRequest
from opd.ports.weights import PublishedWeights, WeightAck
from opd.types import TokenScores
from opd.types.prompt_rows import PromptText


@runtime_checkable
class TextEngine(Protocol):
    """Something that writes: the student, or a teacher that generates."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in the order asked."""
        ...


@runtime_checkable
class StudentEngine(TextEngine, Protocol):
    """The student as a writer whose weights can be replaced."""

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        """Make `weights` live everywhere. Raises and keeps refusing work if the loaded model is wrong."""
        ...


@runtime_checkable
class LogprobTeacher(Protocol):
    """A teacher that reads given tokens."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """Testimony per request, in order, of the type its `kind` names; hidden states as `RemoteRows`."""
        ...


class Grader(Protocol):
    """Task reward of a completion: a finite number; the shipped graders give 0.0 .. 1.0.

    Two attributes may be left out. `judges_cut` = True: it is also asked about completions that the token limit cut,
    which otherwise get 0. `needs_answer` = False: it grades completions of prompts that have no reference answer.
    """

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order; a completion that cannot be graded in time gets 0."""
        ...


@runtime_checkable
class ReadsReferences(Protocol):
    """A grader that knows before a run which reference answers it can grade against."""

    def unreadable(self, answer: str) -> str:
        """Why a reference answer cannot be read, "" if it can."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. What is encoded begins as the model's texts do (e.g. with one `<bos>`)."""

    eos_id: int

    def encode(self, text: str) -> Int32[np.ndarray, " P"]:
        """Ids of a plain prompt."""
        ...

    def encode_all(self, prompts: Sequence[PromptText]) -> list[Int32[np.ndarray, " P"]]:
        """Ids of each prompt; those of a conversation end where the assistant begins to write."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Text without special tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Everything the parts of a method may call.

    `graders` and `environments` have the names of the tasks (`Prompt.task`). The order of `teachers` numbers their
    output matrices (`HiddenScores.head`), in the learner too.
    """

    student: StudentEngine
    teachers: Mapping[str, LogprobTeacher]
    writers: Mapping[str, TextEngine]
    graders: Mapping[str, Grader]
    tokenizer: Tokenizer
    environments: Mapping[str, MakeEnvironment] = field(default_factory=dict)
