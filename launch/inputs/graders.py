"""Graders of finished completions: the embedded tasks' own, and mathematical answers in a child process."""

import asyncio
import multiprocessing
import resource
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from demos.tasks import peak, shop
from launch.inputs.answers import finding
from launch.inputs.answers.check import doubtful, trouble
from launch.inputs.answers.equality import same
from opd.errors import OpdError
from opd.ports import Grader

Found = TypeVar("Found")

START_S = 120.0  # importing sympy takes longer than a deadline
MEMORY_BYTES = 8 << 30  # of the child's addresses
MOST_FAULTS = 20  # sentences a grader keeps about what went wrong


class RunGrader(Grader, Protocol):
    """A grader while a run lasts. One that also has `unreadable` (`opd.ports.ReadsReferences`) is asked in the plan."""

    @property
    def faults(self) -> Sequence[str]:
        """What could not be graded and was given 0: a sentence each, for the run's summary."""
        ...

    def close(self) -> None:
        """Release what the grader holds."""
        ...


class TaskGrader:
    """A pure function of completion and answer, e.g. `TaskGrader(shop.grade)`."""

    faults: Sequence[str] = ()

    def __init__(self, one: Callable[[str, str], float]) -> None:
        self._one = one

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order."""
        return [self._one(c, a) for c, a in zip(completions, answers, strict=True)]

    def close(self) -> None:
        """Nothing to release."""


def verify_math(completion: str, answer: str) -> float:
    """1.0 if what `completion` answers equals the reference `answer`, else 0.0 (run in a child process)."""
    gold = finding.reference(answer)
    return float(same(gold, finding.given(completion, gold)))


def bounded() -> None:
    """Bound this process's memory: a tower of powers would take all there is."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))


class MathGrader:
    """Mathematical answers (docs/grading.md), compared in a child process with a deadline.

    A pathological completion costs its own reward only. A reference that cannot be read or evaluated in time is told
    from it: it is named once in `faults`, and its completions get 0 without waiting again. The first call starts the
    child.
    """

    def __init__(self, deadline_s: float = 5.0) -> None:
        self._deadline_s = deadline_s
        self._pool: ProcessPoolExecutor | None = None
        self._free = asyncio.Lock()
        self._broken: set[str] = set()
        self.faults: list[str] = []

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order; a completion that cannot be graded in time gets 0."""
        return [await self._one(c, a) for c, a in zip(completions, answers, strict=True)]

    async def _one(self, completion: str, answer: str) -> float:
        async with self._free:  # groups are graded at once: whose turn it is not does not spend its deadline waiting
            if answer in self._broken:
                return 0.0
            graded = await asyncio.to_thread(self._within, verify_math, completion, answer)
            if graded is not None:
                return graded
            why = await asyncio.to_thread(self._within, trouble, answer)
            shown = f"reference {answer[:80]!r}"
            if why == "":
                self._note(f"a completion that should equal {shown} was not graded: {self._late}; it gets 0")
            else:  # the reference's fault, and not what is compared with it
                self._broken.add(answer)
                self._note(f"{shown} cannot be graded: {why or self._late}; its completions get 0")
            return 0.0

    @property
    def _late(self) -> str:
        return f"its value is not found within {self._deadline_s:g} s"

    def _note(self, sentence: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(sentence)

    def unreadable(self, answer: str) -> str:
        """Why a reference cannot be read, "" if it can. Only notation that no rule knows is asked of the child."""
        why = doubtful(answer)
        if why is None:
            why = self._within(trouble, answer)
        return self._late if why is None else why

    def _within(self, work: Callable[..., Found], *arguments: str) -> Found | None:
        """What the child says within the deadline, else None; a child that fails or is late is replaced."""
        if self._pool is None:
            apart = multiprocessing.get_context("forkserver")  # which imports sympy once for all children
            apart.set_forkserver_preload(["launch.inputs.answers.preloaded"])
            self._pool = ProcessPoolExecutor(1, mp_context=apart, initializer=bounded)
            try:
                self._pool.submit(verify_math, r"\boxed{\sqrt{2}}", r"\sqrt{3}").result(START_S)
            except (TimeoutError, BrokenProcessPool) as error:
                self.close()
                raise OpdError(
                    f"the process that grades answers did not start in {START_S:g} s ({type(error).__name__}); check "
                    "the memory and the processes of this machine, and start Python from a file or a command"
                ) from error
        try:
            return self._pool.submit(work, *arguments).result(self._deadline_s)
        except (TimeoutError, BrokenProcessPool):
            self.close()
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            pass  # sympy's, of what it cannot evaluate; the caller finds out whose fault it is
        return None

    def close(self) -> None:
        """End the child process, whatever it is doing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list(pool._processes.values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)


GRADERS: Mapping[str, Callable[[], RunGrader]] = {
    "shop": lambda: TaskGrader(shop.grade),
    "peak": lambda: TaskGrader(peak.grade),
    "math": MathGrader,
}
"""The graders that `prompts.task` can name; another one is another line here."""
