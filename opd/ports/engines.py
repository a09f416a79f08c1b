"""Protocols of the engines that a method may call, and the context in which it calls them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from opd.ports.embeddings import Embeddings, NoEmbeddings
from opd.ports.environment import MakeEnvironment
from opd.ports.requests import Completion, GenerateRequest, ScoreAnswer, ScoreRequest
from opd.ports.weights import PublishedWeights, WeightAck
from opd.types.prompt_rows import PromptText


@runtime_checkable
class TextEngine(Protocol):
    """An engine that generates text: the student's, or that of a teacher."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in order."""
        ...


@runtime_checkable
class StudentEngine(TextEngine, Protocol):
    """The student's engine: it generates, and takes in new weights."""

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        """Make `weights` live everywhere. Raises and keeps refusing work if the loaded model is wrong."""
        ...


@runtime_checkable
class LogprobTeacher(Protocol):
    """A teacher that scores given tokens."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        """Scores per request, in order: one value per kind it names; hidden states as `RemoteRows`."""
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
    """A grader that can check reference answers before a run."""

    def unreadable(self, answer: str) -> str:
        """Reason why a reference answer cannot be graded against; "" if it can."""
        ...


@runtime_checkable
class NamesAnswers(Protocol):
    """A grader that can tell which answer a completion gives, so that several of one prompt can be counted as votes."""

    async def named(self, completions: Sequence[str], answer: str) -> list[str]:
        """Name of each completion's answer, one for equal answers, "" where it gives none; all are of one prompt.

        `answer` is the prompt's reference. It may say what kind of answer is looked for, and not which is right.
        """
        ...


class Tokenizer(Protocol):
    """Conversion of text to ids and back. Encoded text begins as the model's texts do (e.g. with one `<bos>`)."""

    eos_id: int

    def encode(self, text: str) -> Int32[np.ndarray, " P"]:
        """Ids of a plain prompt."""
        ...

    def encode_all(self, prompts: Sequence[PromptText]) -> list[Int32[np.ndarray, " P"]]:
        """Ids of each prompt; those of a conversation end where the assistant's turn begins."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Text without special tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """All engines that the parts of a method may call.

    `graders` and `environments` have the names of the tasks (`Prompt.task`). The order of `teachers` numbers their
    output matrices (`HiddenScores.head`), in the learner too. `writers` are teachers that generate text.
    `embeddings` are the student's, for parts that compare tokens.
    """

    student: StudentEngine
    teachers: Mapping[str, LogprobTeacher]
    writers: Mapping[str, TextEngine]
    graders: Mapping[str, Grader]
    tokenizer: Tokenizer
    environments: Mapping[str, MakeEnvironment] = field(default_factory=dict)
    embeddings: Embeddings = field(default_factory=NoEmbeddings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(Engines):
    """The engines at a step of a run: the one argument of rollouts, scorers, token weights and schedules beside
    data, and the last one of updates.

    `step` counts the steps before: 0 to `steps - 1` for a step that is trained, `steps` in an evaluation after the
    last one. `seed` is the run's. So a part may follow a schedule and is still a pure function of its arguments: a
    step that is generated again, or resumed, gets the same context.
    """

    step: int = 0
    steps: int = 1
    seed: int = 0

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done, in [0, 1]: `step / steps`."""
        return self.step / self.steps

    def at(self, step: int) -> "Context":
        """The same at another step."""
        return replace(self, step=step)

    @classmethod
    def of(cls, engines: Engines, *, step: int, steps: int, seed: int) -> "Context":
        """`engines` at a step of a run."""
        own = {f.name: getattr(engines, f.name) for f in fields(Engines)}
        return cls(**own, step=step, steps=steps, seed=seed)
