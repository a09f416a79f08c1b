"""Protocol of environments, which answer the student between its turns and reward its actions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of an action: its reward, and the observation that follows it.

    `reward` is that of this action; a trajectory's is the sum. `text` is the observation before the next turn,
    exactly as the student sees it (with the marks of a chat template, if the student expects them); it is left out
    where `done`. Example: `Outcome(reward=0.0, done=False, text=" higher ")`.
    """

    reward: float
    done: bool
    text: str = ""


@runtime_checkable
class Environment(Protocol):
    """State of one episode. Every trajectory has an instance of its own."""

    async def reset(self, prompt: Prompt) -> str:
        """Begin, and give the first observation, which follows the prompt; "" if there is none."""
        ...

    async def step(self, action: str) -> Outcome:
        """Outcome of the student's turn, which is given as text without special tokens."""
        ...


MakeEnvironment = Callable[[], Environment]
"""A new environment, for one trajectory."""
