"""Rewards that are functions of the running Python program, such as a notebook's, and of no module."""

import asyncio
import hashlib
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.config.reward_function import RewardFunction
from opd.errors import ConfigurationError
from opd.settings.ranges import Deadline, Names
from opd.settings.validation import settings

_held: dict[str, Callable[..., Any]] = {}


def hold(function: Callable[..., Any]) -> str:
    """Keep a function for the runs of this program; returns the digest of its code, by which settings name it."""
    digest = hashlib.sha256(_code(function)).hexdigest()[:12]
    _held[digest] = function
    return digest


def _code(function: Callable[..., Any]) -> bytes:
    """The source of a function where there is one, else its byte code."""
    try:
        return inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return code.co_code if isinstance(code, types.CodeType) else repr(type(function)).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class HeldReward:
    """A reward that the program holds (`hold`), called in a thread of the driver, since no other process has it.

    Raises `ConfigurationError` in a program that does not hold it: a command line cannot repeat such a run.
    """

    # what the function is called there
    name: Names
    # digest of its source
    code: Names
    # seconds that one call may take
    deadline_s: Deadline = 5.0

    def __post_init__(self) -> None:
        if self.code not in _held:
            raise ConfigurationError(
                f"the reward {self.name} was a function of the Python program that began this run, and is none of this "
                "one; call opd.train with the same function, or put it into a file of its own (docs/grading.md)"
            )
        _ = self._function

    @property
    def _function(self) -> RewardFunction:
        return RewardFunction(name=self.name, function=_held[self.code])

    @property
    def needs_answer(self) -> bool:
        """Whether it cannot be called without a reference answer."""
        return self._function.needs_answer

    @property
    def one_by_one(self) -> bool:
        """Whether it is called for each completion."""
        return self._function.one_by_one

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order."""
        return await asyncio.to_thread(self._function.grade, completions, answers)
