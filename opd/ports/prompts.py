"""Protocols of prompt sources, and of what they can show before a run."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from opd.ports.engines import Tokenizer
from opd.types import Prompt
from opd.types.prompt_rows import Columns, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Inputs of prompt sources: the tokenizer, and files as rows. `place`: see `Columns`."""

    tokenizer: Tokenizer
    rows: Callable[[str, Columns], Sequence[Row]]
    place: str = "prompts"


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
