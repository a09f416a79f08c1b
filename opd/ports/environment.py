"""Environments: what answers the student between its turns, and rewards what it did."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an action led to.

    `reward` is that of this action; a trajectory's is the sum. `text` is what the student reads before its next turn,
    exactly as it stands there (with the marks of a chat template, if the student expects them); it is left out where
    `done`. Example: `Outcome(reward=0.0, done=False, text=" higher ")`.
    """

    reward: float
    done: bool
    text: str = ""


@runtime_checkable
class Environment(Protocol):
    """One episode: the world of one trajectory. Every trajectory has an instance of its own."""

    async def reset(self, prompt: Prompt) -> str:
        """Begin. What the student reads behind its prompt, before the first turn; "" if the prompt says all."""
        ...

    async def step(self, action: str) -> Outcome:
        """What comes of the student's turn, given as text without special tokens."""
        ...


MakeEnvironment = Callable[[], Environment]
"""A new environment, for one trajectory."""
