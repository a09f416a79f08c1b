"""Needs: which engines a part of a method calls, so that a plan starts those and no others."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from opd.types import AdvantageScores


class Role(Enum):
    """The kind of engine that a part calls; the value is its name in sentences."""

    STUDENT = "student"  # `Engines.student` writes
    READER = "reading teacher"  # `Engines.teachers` gives log-probabilities of given tokens
    WRITER = "writing teacher"  # `Engines.writers` writes tokens of the student's tokenizer
    TEXT_TEACHER = "text-only teacher"  # one that gives text and nothing else, with a tokenizer of its own
    GRADER = "grader"  # `Engines.graders` gives a finished completion its reward
    ENVIRONMENT = "environment"  # `Engines.environments` answers the student between its turns


@dataclass(frozen=True, slots=True)
class Need:
    """One engine that a part calls. `name` "" = whichever the prompts name (`Prompt.teacher`, `Prompt.task`).

    Example: `Need(Role.READER, "peak")`.
    """

    role: Role
    name: str = ""

    def __str__(self) -> str:
        return f"{self.role.value} {self.name!r}" if self.name else self.role.value


def needs_of(part: Any) -> frozenset[Need]:
    """What `part` declares as `needs_engines`; of a part that does not, what its older declarations say.

    Those are `needs_writer` of a rollout (a rollout without it is written by the student), and `requires` and
    `produces` of a scorer.
    """
    declared = getattr(part, "needs_engines", None)
    if declared is not None:
        return frozenset(declared)
    if hasattr(part, "records"):
        return frozenset({Need(Role.WRITER if getattr(part, "needs_writer", False) else Role.STUDENT)})
    found = {Need(Role.READER)} if getattr(part, "requires", None) else set[Need]()
    produces = getattr(part, "produces", None)
    graded = isinstance(produces, type) and issubclass(produces, AdvantageScores)
    return frozenset(found | {Need(Role.GRADER)} if graded else found)
