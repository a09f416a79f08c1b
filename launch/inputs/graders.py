"""Graders of a run: the embedded tasks' own, mathematical answers in a child process, and a user's rewards."""

import asyncio
import resource
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from demos.tasks import locks, long, peak, shop
from launch.inputs.answers import finding, instructions
from launch.inputs.answers.check import doubtful, trouble
from launch.inputs.answers.equality import same
from launch.inputs.answers.kinds import Unreadable
from launch.inputs.grading_process import GradingProcess
from launch.inputs.own_grader import own_grader
from opd.ports import Grader
from opd.settings.ranges import Deadline
from opd.settings.validation import settings

Found = TypeVar("Found")

MEMORY_BYTES = 8 << 30  # of the child's addresses
MOST_FAULTS = 20  # sentences a grader keeps about what went wrong


class RunGrader(Grader, Protocol):
    """A grader while a run lasts; one with `unreadable` (`opd.ports.ReadsReferences`) checks references in the plan."""

    @property
    def faults(self) -> Sequence[str]:
        """Completions that could not be graded and got 0: a sentence each, for the run's summary."""
        ...

    def close(self) -> None:
        """Release what the grader holds."""
        ...


class TaskGrader:
    """A pure function of completion and answer that takes no time, called here."""

    one: ClassVar[Callable[[str, str], float]]

    @property
    def faults(self) -> Sequence[str]:
        """It has none."""
        return ()

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order."""
        return [type(self).one(c, a) for c, a in zip(completions, answers, strict=True)]

    def close(self) -> None:
        """Nothing to release."""


class NamingGrader(TaskGrader):
    """A task grader of completions that end with their answer (see `opd.ports.NamesAnswers`)."""

    answer_of: ClassVar[Callable[[str], str]]

    async def named(self, completions: Sequence[str], answer: str) -> list[str]:
        """Answers in order; "" where a completion gives none."""
        return [type(self).answer_of(completion) for completion in completions]


@dataclass(kw_only=True)
class ShopGrader(NamingGrader):
    """The embedded shop task's."""

    one: ClassVar = staticmethod(shop.grade)
    answer_of: ClassVar = staticmethod(shop.answer_of)


@dataclass(kw_only=True)
class PeakGrader(NamingGrader):
    """The embedded peak task's."""

    one: ClassVar = staticmethod(peak.grade)
    answer_of: ClassVar = staticmethod(peak.answer_of)


@dataclass(kw_only=True)
class LocksGrader(TaskGrader):
    """The embedded locks task's."""

    one: ClassVar = staticmethod(locks.grade)


@dataclass(kw_only=True)
class LongGrader(TaskGrader):
    """The grader of the embedded task of long completions."""

    one: ClassVar = staticmethod(long.grade)


@dataclass(kw_only=True)
class InstructionGrader(TaskGrader):
    """The grader of instructions that a program can check: 1 if a completion follows all of its prompt's, else 0."""

    one: ClassVar = staticmethod(instructions.follows)

    def unreadable(self, answer: str) -> str:
        """Reason why a reference names no instructions that are checked here; "" if it does."""
        return instructions.trouble(answer)


def verify_math(completion: str, answer: str) -> float:
    """1.0 if what `completion` answers equals the reference `answer`, else 0.0 (run in a child process)."""
    gold = finding.reference(answer)
    return float(same(gold, finding.given(completion, gold)))


def found_math(completion: str, answer: str) -> str:
    """Answer that `completion` gives, in one spelling for the same reading; "" if none can be read (in a child)."""
    found = finding.given(completion, finding.reference(answer))
    return "" if isinstance(found, Unreadable) else repr(found)


def equal_math(first: str, second: str, answer: str) -> bool:
    """Whether two completions give equal answers (in a child process)."""
    gold = finding.reference(answer)
    return same(finding.given(first, gold), finding.given(second, gold))


def bounded() -> None:
    """Bound this process's memory: a tower of powers would take all there is."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))


@dataclass(kw_only=True)
@settings
class MathGrader:
    """Mathematical answers (docs/grading.md), compared in a child process with a deadline.

    A pathological completion costs its own reward only. A reference that cannot be read or evaluated in time is told
    from it: it is named once in `faults`, and its completions get 0 without waiting again. The first call starts the
    child.
    """

    # seconds that an answer may take
    deadline_s: Deadline = 5.0

    def __post_init__(self) -> None:
        self._process = GradingProcess(
            verify_math,
            r"\boxed{\sqrt{2}}",
            r"\sqrt{3}",
            preload=["launch.inputs.answers.preloaded"],  # which imports sympy once for all children
            initializer=bounded,
        )
        self.faults: list[str] = []
        self._free = asyncio.Lock()
        self._broken: set[str] = set()

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

    async def named(self, completions: Sequence[str], answer: str) -> list[str]:
        """Answers in order, equal ones by the name of the first; "" where none can be read within the deadline."""
        async with self._free:
            return await asyncio.to_thread(self._named, completions, answer)

    def _named(self, completions: Sequence[str], answer: str) -> list[str]:
        names = [self._within(found_math, completion, answer) or "" for completion in completions]
        firsts: dict[str, str] = {}  # a completion of every different answer
        called: dict[str, str] = {"": ""}
        for completion, name in zip(completions, names, strict=True):
            if name in called:
                continue
            equal = (n for n, first in firsts.items() if self._within(equal_math, first, completion, answer))
            called[name] = next(equal, name)
            if called[name] == name:
                firsts[name] = completion
        return [called[name] for name in names]

    @property
    def _late(self) -> str:
        return f"its value is not found within {self.deadline_s:g} s"

    def _note(self, sentence: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(sentence)

    def unreadable(self, answer: str) -> str:
        """Reason why a reference is unreadable, or ""; the child process gets only notation that no rule knows."""
        why = doubtful(answer)
        if why is None:
            why = self._within(trouble, answer)
        return self._late if why is None else why

    def _within(self, work: Callable[..., Found], *arguments: str) -> Found | None:
        """Answer of the child process within the deadline, else None; one that fails or is late is replaced."""
        try:
            return self._process.call(work, *arguments, deadline_s=self.deadline_s)
        except (TimeoutError, BrokenProcessPool):
            return None
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            return None  # sympy's, of what it cannot evaluate; the caller finds out whose fault it is

    def close(self) -> None:
        """End the child process, whatever it is doing."""
        self._process.close()


def make_grader(name: str, part: Any) -> RunGrader:
    """The grader of a run that the part `name` of its configuration describes; nothing is started yet."""
    return (
        replace(part)
        if isinstance(part, MathGrader | ShopGrader | PeakGrader | LocksGrader | LongGrader | InstructionGrader)
        else own_grader(name, part)
    )
