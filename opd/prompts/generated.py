"""Prompts of an embedded task, generated on demand: common code of the tasks' sources."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from opd.ports import Sources
from opd.prompts.order import draw
from opd.settings.ranges import GroupSize, In, Names, PromptsPerStep, Seed
from opd.settings.validation import settings
from opd.types import Prompt
from opd.types.prompt_rows import PromptText, Row

SAMPLE = 1024  # problems that show what all are like


class Problem(Protocol):
    """A drawn problem: its prompt and its answer."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


@runtime_checkable
class Privileged(Protocol):
    """A problem with a prompt of its own for the teacher, which may say more than the student's."""

    @property
    def teacher_prompt(self) -> str:
        """The teacher's prompt, instead of `prompt`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class GeneratedPrompts:
    """`prompts_per_step` problems a step, each `group_size` times.

    `problems` = 0 makes fresh problems forever; otherwise a fixed set of that many is gone through in epochs.
    Sets with different seeds are different problems. A task's source names the task and the maker of its problems, or
    overrides `problem`. A problem that is `Privileged` has a prompt of its own for the teacher.
    """

    task: ClassVar[str]
    make: ClassVar[Callable[[random.Random], Problem]]

    # problems of a step, each group_size times
    prompts_per_step: PromptsPerStep
    # of the problems
    seed: Seed = 0
    # completions of each problem in a step
    group_size: GroupSize = 1
    # size of a fixed set; 0 makes fresh problems forever
    problems: Annotated[int, In(0, 10_000_000, because="0: fresh ones forever")] = 0
    # teacher of these problems
    teacher: Names = "default"

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        return self.between(step * self.prompts_per_step, self.prompts_per_step, sources)

    def between(self, start: int, count: int, sources: Sources) -> Sequence[Prompt]:
        """See `opd.ports.Windowed`."""
        return [p for n in self._numbers(start, count) for p in [self._prompt(n, sources)] * self.group_size]

    def _numbers(self, start: int, count: int) -> Sequence[int]:
        if not self.problems:
            return range(start, start + count)
        return draw(self.seed, self.problems, start, count, shuffle=True) if count else []

    def rows(self, sources: Sources) -> int:
        """See `opd.ports.Listed`."""
        return self.problems

    def every(self, sources: Sources, step: int | None) -> Iterator[tuple[Row, Prompt]]:
        """The first problems, which represent all: they are generated alike (see `opd.ports.Listed`)."""
        if step is not None:
            yield from self.every_between(step * self.prompts_per_step, self.prompts_per_step, sources)
        else:
            yield from self._listed(range(min(self.problems or SAMPLE, SAMPLE)), sources)

    def every_between(self, start: int, count: int, sources: Sources) -> Iterator[tuple[Row, Prompt]]:
        """See `opd.ports.Windowed`."""
        yield from self._listed(dict.fromkeys(self._numbers(start, count)), sources)

    def ids_between(self, start: int, count: int, sources: Sources) -> Collection[str]:
        """See `opd.ports.Windowed`."""
        return [self._name(number) for number in self._numbers(start, count)]

    def _listed(self, numbers: Iterable[int], sources: Sources) -> Iterator[tuple[Row, Prompt]]:
        for number in numbers:
            prompt = self._prompt(number, sources)
            yield (
                Row(
                    prompt=sources.tokenizer.decode(prompt.student_ids),
                    answer=prompt.answer,
                    where=f"prompt {prompt.id!r}",
                ),
                prompt,
            )

    def starved(self, kept: Collection[str], steps: int, sources: Sources) -> int | None:
        """See `opd.ports.Listed`."""
        return None

    def files(self, place: str) -> Mapping[str, str]:
        """See `opd.ports.Listed`."""
        return {}

    def problem(self, number: int) -> Problem:
        """The problem of that number: a pure function of it and the seed."""
        return type(self).make(random.Random(self._name(number)))

    def _name(self, number: int) -> str:
        return f"{self.task}/{self.seed}/{number}"

    def _prompt(self, number: int, sources: Sources) -> Prompt:
        problem = self.problem(number)
        ids = sources.tokenizer.encode(problem.prompt)
        return Prompt(
            id=self._name(number),
            student_ids=ids,
            teacher_ids=sources.tokenizer.encode(problem.teacher_prompt) if isinstance(problem, Privileged) else ids,
            teacher=self.teacher,
            task=self.task,
            answer=problem.answer,
            source=PromptText(text=problem.prompt),
        )
