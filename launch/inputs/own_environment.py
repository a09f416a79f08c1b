"""A user's environment while a run lasts: plain or awaited, one copy per trajectory, every call with a deadline."""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any

from launch.inputs.grading_failures import Faults
from opd.errors import ConfigurationError
from opd.ports import Outcome
from opd.types import Prompt

DEADLINE_S = 30.0  # of one call, where the part says nothing


@dataclass(slots=True, kw_only=True)
class OwnEnvironment:
    """Maker of episodes of a part with `reset(prompt)` and `step(action)`; `faults` has what failed in any of them."""

    name: str
    part: Any
    _faults: Faults = field(init=False)

    def __post_init__(self) -> None:
        self._faults = Faults(part=f"environments.{self.name}")

    @property
    def faults(self) -> Sequence[str]:
        """A sentence for each call that failed or was late."""
        return self._faults.sentences

    def __call__(self) -> "Episode":
        """A new one: what an episode keeps in the part is its own."""
        deadline_s = float(getattr(self.part, "deadline_s", DEADLINE_S))
        return Episode(part=replace(self.part), deadline_s=deadline_s, faults=self._faults)

    def probe(self, prompt: Prompt) -> None:
        """One reset and one step outside a run. Raises `ConfigurationError` about the first thing wrong."""
        episode = self()

        async def play() -> None:
            await episode.call("reset", prompt)
            await episode.call("step", "")

        try:
            asyncio.run(play())
        except Exception as error:  # a user's part may raise anything
            raise ConfigurationError(
                f"environments.{self.name} cannot be played with prompt {prompt.id!r}: {_why(error)}; correct it"
            ) from error


@dataclass(slots=True, kw_only=True)
class Episode:
    """One trajectory's environment. One whose call fails is over: that action earns 0."""

    part: Any
    deadline_s: float
    faults: Faults
    _broken: bool = False

    async def reset(self, prompt: Prompt) -> str:
        """See `opd.ports.Environment`."""
        try:
            return await self.call("reset", prompt)
        except Exception as error:  # noqa: BLE001 (a user's part may raise anything; it is told)
            self._broken = True
            self.faults.note(f"reset failed for prompt {prompt.id!r}: {_why(error)}")
            return ""

    async def step(self, action: str) -> Outcome:
        """See `opd.ports.Environment`."""
        if self._broken:
            return Outcome(reward=0.0, done=True)
        try:
            outcome = await self.call("step", action)
        except Exception as error:  # noqa: BLE001 (as above)
            self.faults.note(f"step failed: {_why(error)}")
            return Outcome(reward=0.0, done=True)
        self.faults.worked()
        return outcome

    async def call(self, name: str, argument: Any) -> Any:
        """The checked result of `reset` or `step`; raises what they raise, `TimeoutError`, or `TypeError`."""
        method = getattr(self.part, name)
        work = method(argument) if inspect.iscoroutinefunction(method) else _in_thread(method, argument)
        said = await asyncio.wait_for(work, self.deadline_s)
        wanted = str if name == "reset" else Outcome
        if not isinstance(said, wanted):
            raise TypeError(f"{name} gave {type(said).__name__} and not {wanted.__name__}")
        if isinstance(said, Outcome) and not (isinstance(said.reward, int | float) and math.isfinite(said.reward)):
            raise TypeError(f"step gave reward {said.reward!r}, which is no finite number")
        return said


async def _in_thread(method: Callable[[Any], Any], argument: Any) -> Any:
    """A plain call beside the loop. The thread ends with the process, so one that hangs keeps nothing alive."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(error: BaseException | None, value: Any) -> None:
        if result.done():  # too late
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def work() -> None:
        try:
            said, error = method(argument), None
        except Exception as raised:  # noqa: BLE001 (handed on)
            said, error = None, raised
        with suppress(RuntimeError):  # the loop is closed: the run has ended, and no caller waits
            loop.call_soon_threadsafe(settle, error, said)

    Thread(target=work, name="environment", daemon=True).start()
    return await result


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer within its deadline (deadline_s)"
    return f"{type(error).__name__} ({' '.join(str(error).split())})"
