"""Protocols of prompt sources, and of what they can show before a run."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from opd.errors import ConfigurationError
from opd.ports.engines import Tokenizer
from opd.types import Prompt
from opd.types.prompt_rows import Columns, Messages, Row


def no_examples(path: str, columns: Columns, suffix: str) -> Messages:  # noqa: ARG001
    """A reader of few-shot files for sources that are given none."""
    raise ConfigurationError(f"{columns.place}.few_shot={path} cannot be read outside a planned run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Inputs of prompt sources: the student's tokenizer, and files as rows. `place`: see `Columns`.

    `teachers` has the tokenizers of teachers whose own chat templates may be asked for, by name, and `teacher_of_task`
    the teacher that a mixture sends a task to, whatever the source says. `examples` reads a few-shot file as turns,
    with a suffix behind each of its plain prompts.
    """

    tokenizer: Tokenizer
    rows: Callable[[str, Columns], Sequence[Row]]
    place: str = "prompts"
    teachers: Mapping[str, Tokenizer] = field(default_factory=dict, hash=False)
    teacher_of_task: Mapping[str, str] = field(default_factory=dict, hash=False)
    examples: Callable[[str, Columns, str], Messages] = no_examples


@runtime_checkable
class PromptSource(Protocol):
    """The prompts of a run as a pure function of the step, so that resuming needs the step number and nothing else."""

    @property
    def group_size(self) -> int:
        """Samples of a prompt; their trajectories form a group."""
        ...

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        """The step's prompts; those with the same `id` stand next to each other and form a group."""
        ...


@runtime_checkable
class Routed(Protocol):
    """A prompt source that knows its prompts' teachers beforehand, so that a wrong name is found at the start."""

    def routes(self, sources: Sources) -> frozenset[str]:
        """Names of the teachers of all prompts."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A prompt source that can show its prompts beforehand, so that none ends a run later."""

    def rows(self, sources: Sources) -> int:
        """Number of different prompts; 0 = without end."""
        ...

    def every(self, sources: Sources, step: int | None) -> Iterator[tuple[Row, Prompt]]:
        """All prompts, once each, or those of one step; of endless ones a sample. What is left out does not come.

        Raises `DataError` for one that no run can use.
        """
        ...

    def starved(self, kept: Collection[str], steps: int, sources: Sources) -> int | None:
        """The first of `steps` steps that would have no prompt, if only those with the ids `kept` are used."""
        ...

    def files(self, place: str) -> Mapping[str, str]:
        """Paths of the files it reads, by the setting that names each."""
        ...


@runtime_checkable
class Windowed(Protocol):
    """A prompt source with an order of its own, of which any stretch can be taken: it can be mixed by weight."""

    def between(self, start: int, count: int, sources: Sources) -> Sequence[Prompt]:
        """The prompts at the positions `start .. start + count` of its order, groups included."""
        ...

    def every_between(self, start: int, count: int, sources: Sources) -> Iterator[tuple[Row, Prompt]]:
        """The different ones among them with their rows."""
        ...

    def ids_between(self, start: int, count: int, sources: Sources) -> Collection[str]:
        """The ids of all that stand there, of those that are left out for their length, too."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """A prompt source whose settings may name files that are not here: a data set on a hub, which was fetched."""

    def found_at(self, place: str, folders: Mapping[str, tuple[str, str]]) -> PromptSource:
        """The same source with its exact name and the folder of each setting (as in `Listed.files`) that is given."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """All reference answers of one file, for the grader of `task`, each with its file and line.

    `allowed` is the share that may be unreadable, which the settings under `place` name.
    """

    place: str
    task: str
    answers: Sequence[tuple[str, str]]
    allowed: float


@runtime_checkable
class Answered(Protocol):
    """A prompt source that can show its reference answers before a run."""

    def references(self, sources: Sources) -> Sequence[References]:
        """One item per file; none where there are no answers."""
        ...
