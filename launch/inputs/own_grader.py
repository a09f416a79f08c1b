"""A user's reward while a run lasts: called in a child process, or awaited, always with a deadline."""

import asyncio
import inspect
import math
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from launch.inputs.grading_failures import Faults
from launch.inputs.grading_process import GradingProcess
from opd.errors import ConfigurationError, OpdError

DEADLINE_S = 5.0  # of one call, where the part says nothing
SHOWN = 60  # characters of a completion in a sentence


class OwnGrader:
    """Runs a part with `grade(completions, answers)`; see docs/grading.md for what such a part may say of itself.

    A `grade` that is awaited runs in this process, any other in a child, which holds a copy of the part. What raises,
    is late or gives no finite number costs the reward of the completions that it happens with: after a failure each
    of a group is tried alone. They get 0, which `faults` tells.
    """

    judges_cut = True

    def __init__(self, name: str, part: Any) -> None:
        self._name, self._part = f"graders.{name}", part
        self._deadline_s = float(getattr(part, "deadline_s", DEADLINE_S))
        self._alone = bool(getattr(part, "one_by_one", False))
        self.needs_answer = bool(getattr(part, "needs_answer", True))
        self._awaited = inspect.iscoroutinefunction(part.grade)
        self._process = GradingProcess(_hold, part)
        self._faults = Faults(part=self._name)
        self._free = asyncio.Lock()

    @property
    def faults(self) -> Sequence[str]:
        """See `RunGrader`."""
        return self._faults.sentences

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order."""
        pairs = list(zip(completions, answers, strict=True))
        if not self._alone and len(pairs) > 1:
            try:
                rewards = await self._called(completions, answers)
            except Exception:  # noqa: BLE001 (whatever it is: each is asked alone, and then it is told)
                return [await self._one(c, a) for c, a in pairs]
            self._faults.worked()
            return rewards
        return [await self._one(c, a) for c, a in pairs]

    async def _one(self, completion: str, answer: str) -> float:
        try:
            (reward,) = await self._called([completion], [answer])
        except OpdError:  # no child can be started: not the reward's fault
            raise
        except Exception as error:  # noqa: BLE001 (a user's reward may raise anything; it is told)
            self._faults.note(f"{self._why(error)} for completion {completion[:SHOWN]!r}")
            return 0.0
        self._faults.worked()
        return reward

    async def _called(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        if self._awaited:
            said = await asyncio.wait_for(self._part.grade(completions, answers), self._deadline_s)
        else:
            async with self._free:  # whose turn it is not does not spend its deadline waiting
                said = await asyncio.to_thread(self._in_child, completions, answers)
        return rewards_of(said, len(completions))

    def _in_child(self, completions: Sequence[str], answers: Sequence[str]) -> Any:
        return self._process.call(_grade, list(completions), list(answers), deadline_s=self._deadline_s)

    def _why(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no reward within {self._deadline_s:g} s ({self._name}.deadline_s)"
        if isinstance(error, BrokenProcessPool):
            return "its process died"
        if isinstance(error, _NoReward):
            return str(error)
        return f"{type(error).__name__} ({error})"

    def probe(self, completion: str, answer: str) -> float:
        """The reward of one completion, outside a run. Raises `ConfigurationError` where there is none."""
        try:
            (reward,) = asyncio.run(self._called([completion], [answer]))
        except OpdError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"{self._name} cannot grade completion {completion[:SHOWN]!r} with answer {answer[:SHOWN]!r}: "
                f"{' '.join(self._why(error).split())}; correct it"
            ) from error
        return reward

    def close(self) -> None:
        """End the child process."""
        self._process.close()


class NamingOwnGrader(OwnGrader):
    """A user's reward whose part also names answers (`opd.ports.NamesAnswers`); what it cannot name has none."""

    async def named(self, completions: Sequence[str], answer: str) -> list[str]:
        """Names in order."""
        try:
            if inspect.iscoroutinefunction(self._part.named):
                said = await asyncio.wait_for(self._part.named(completions, answer), self._deadline_s)
            else:
                async with self._free:
                    said = await asyncio.to_thread(self._named_in_child, completions, answer)
            names = names_of(said, len(completions))
        except OpdError:  # no child can be started: not the part's fault
            raise
        except Exception as error:  # noqa: BLE001 (a user's part may raise anything; it is told)
            self._faults.note(f"no answers were named: {self._why(error)} for completion {completions[0][:SHOWN]!r}")
            return [""] * len(completions)
        self._faults.worked()
        return names

    def _named_in_child(self, completions: Sequence[str], answer: str) -> Any:
        return self._process.call(_name, list(completions), answer, deadline_s=self._deadline_s)


def names_of(said: Any, count: int) -> list[str]:
    """Names as `count` texts; raises a sentence about anything else."""
    if not isinstance(said, list | tuple) or len(said) != count or not all(isinstance(one, str) for one in said):
        raise _NoReward(f"it gave {_shown(said)} in place of a list of {count} names")
    return list(said)


def own_grader(name: str, part: Any) -> OwnGrader:
    """Grader of a user's part, which names answers if the part does."""
    return (NamingOwnGrader if callable(getattr(part, "named", None)) else OwnGrader)(name, part)


class _NoReward(Exception):
    """Value that is no reward; the message names it."""


def rewards_of(said: Any, count: int) -> list[float]:
    """Rewards as `count` finite numbers; raises a sentence about anything else."""
    try:
        found = [said] if isinstance(said, str | bytes) else list(said)
    except TypeError:
        raise _NoReward(f"it gave {_shown(said)} in place of a list of {count} numbers") from None
    if len(found) != count:
        raise _NoReward(f"it gave {len(found)} rewards for {count} completions")
    rewards = []
    for value in found:
        try:
            reward = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            reward = math.nan
        if not math.isfinite(reward):
            raise _NoReward(f"it gave {_shown(value)}, which is no finite number")
        rewards.append(reward)
    return rewards


def _shown(value: object) -> str:
    return repr(value)[:SHOWN]


_held: Any = None  # in a child: the grader that it is there for


def _hold(part: Any) -> None:
    global _held
    _held = part


def _grade(completions: list[str], answers: list[str]) -> Any:
    said = _held.grade(completions, answers)
    return [float(value) if hasattr(value, "__float__") else value for value in said] if _is_many(said) else said


def _name(completions: list[str], answer: str) -> Any:
    return _held.named(completions, answer)


def _is_many(said: Any) -> bool:
    """Arrays and tensors travel as numbers."""
    return hasattr(said, "__iter__") and not isinstance(said, str | bytes)
