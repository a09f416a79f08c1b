"""Mixture of several prompt sources: one student, several tasks, each with its teacher."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from opd.errors import ConfigurationError, DataError
from opd.ports import Answered, Elsewhere, Listed, PromptSource, References, Routed, Sources, Windowed
from opd.prompts.shares import window
from opd.settings.ranges import In, Length, Names, Relative
from opd.settings.validation import settings
from opd.types import Prompt
from opd.types.prompt_rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class MixedPrompts:
    """Mixture of all `sources` in every step, by their own `prompts_per_step`.

    `teachers` routes by task: `{"peak": "comparer"}` sends every prompt of task `peak` to the teacher `comparer`,
    whatever its source says; tasks it does not name keep the source's choice. With `weights` a step's
    `prompts_per_step` are shared out by these instead, and after any number of prompts each source has had its share.
    The sources stand side by side, not shuffled, because packing sorts by length anyway. Example:
    `MixedPrompts(sources={"a": ShopPrompts(...), "b": PeakPrompts(...)}, teachers={"peak": "comparer"})`.
    """

    # sources of prompts by name
    sources: Annotated[Mapping[str, PromptSource], Length(1)]
    # teacher of each task, whatever its source says
    teachers: Mapping[str, Names] = field(default_factory=dict)
    # share of each source in every step, relative to the others; none: each has its own prompts_per_step
    weights: Mapping[str, Relative] = field(default_factory=dict)
    # prompts of a step, with weights; 0: the sources say
    prompts_per_step: Annotated[int, In(0, 20_000, because="0: the sources say")] = 0
    group_size: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        smallest = min(source.group_size for source in self.sources.values())  # what a scorer can rely on
        object.__setattr__(self, "group_size", smallest)
        if bool(self.weights) != bool(self.prompts_per_step):
            raise ConfigurationError(
                f"prompts.weights and prompts.prompts_per_step go together, but they are {dict(self.weights)} and "
                f"{self.prompts_per_step}; set both, or neither for the sources' own prompts_per_step"
            )
        if self.weights and (wrong := sorted(self.weights.keys() ^ self.sources.keys())):
            raise ConfigurationError(
                f"prompts.weights needs a number for each of {sorted(self.sources)}, but {wrong[0]!r} is in one of "
                "them alone; correct the name"
            )
        for name, source in self.sources.items() if self.weights else ():
            if not isinstance(source, Windowed):
                raise ConfigurationError(
                    f"prompts.weights shares out sources that can be taken in any amount, but {name!r} "
                    f"({type(source).__name__}) gives whole steps; leave prompts.weights out"
                )

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        prompts: list[Prompt] = []
        owner: dict[str, str] = {}
        for name, part in self._parts(step, sources):
            for prompt in part:
                if owner.setdefault(prompt.id, name) != name:
                    raise ConfigurationError(
                        f"prompts.sources {owner[prompt.id]!r} and {name!r} both have prompt {prompt.id!r}, which "
                        "would be sampled with the same seeds; give one another seed or file"
                    )
                prompts.append(self._routed(prompt))
        if not prompts:
            raise DataError(f"every prompt of step {step} is longer than its source's max_tokens; raise it")
        return prompts

    def _parts(self, step: int, sources: Sources) -> Iterator[tuple[str, Sequence[Prompt]]]:
        """Prompts of each source in a step."""
        for name, source, start, count in self._windows(step):
            yield name, source.between(start, count, self._below(sources, name))
        for name, source in self.sources.items() if not self.weights else ():
            yield name, source(step, self._below(sources, name))

    def _windows(self, step: int) -> Iterator[tuple[str, Windowed, int, int]]:
        """With weights: each source with the stretch of its order that stands in a step."""
        if self.weights:
            n, weights = self.prompts_per_step, [self.weights[name] for name in self.sources]
            for (name, source), (start, count) in zip(self.sources.items(), window(weights, step * n, n), strict=True):
                assert isinstance(source, Windowed)  # the others have been refused
                yield name, source, start, count

    def routes(self, sources: Sources) -> frozenset[str]:
        """All teachers that a prompt may name (see `opd.ports.Routed`)."""
        named = [s.routes(self._below(sources, name)) for name, s in self.sources.items() if isinstance(s, Routed)]
        return frozenset().union(*named) if not self.teachers else frozenset(self.teachers.values())

    def references(self, sources: Sources) -> Sequence[References]:
        """The answers of all sources that can show them (see `opd.ports.Answered`)."""
        return [
            references
            for name, source in self.sources.items()
            if isinstance(source, Answered)
            for references in source.references(self._below(sources, name))
        ]

    def rows(self, sources: Sources) -> int:
        """See `opd.ports.Listed`."""
        counts = [source.rows(self._below(sources, name)) for name, source in self._listed()]
        return sum(counts) if all(counts) else 0

    def every(self, sources: Sources, step: int | None) -> Iterator[tuple[Row, Prompt]]:
        """Rows of every source that can list them (see `opd.ports.Listed`)."""
        if step is not None and self.weights:
            for name, source, start, count in self._windows(step):
                for row, prompt in source.every_between(start, count, self._below(sources, name)):
                    yield row, self._routed(prompt)
            return
        for name, source in self._listed():
            for row, prompt in source.every(self._below(sources, name), step):
                yield row, self._routed(prompt)

    def starved(self, kept: Collection[str], steps: int, sources: Sources) -> int | None:
        """First step without prompts: of a source that has to give its own part, or of all with weights."""
        if not self.weights:
            found = [s.starved(kept, steps, self._below(sources, name)) for name, s in self._listed()]
            return min((step for step in found if step is not None), default=None)
        for step in range(steps):
            ids = [s.ids_between(at, n, self._below(sources, name)) for name, s, at, n in self._windows(step)]
            if not any(one in kept for some in ids for one in some):
                return step
        return None

    def files(self, place: str) -> Mapping[str, str]:
        """See `opd.ports.Listed`."""
        return {k: v for name, source in self._listed() for k, v in source.files(f"{place}.sources.{name}").items()}

    def found_at(self, place: str, folders: Mapping[str, tuple[str, str]]) -> "MixedPrompts":
        """See `opd.ports.Elsewhere`."""
        moved = {
            name: source.found_at(f"{place}.sources.{name}", folders) if isinstance(source, Elsewhere) else source
            for name, source in self.sources.items()
        }
        return replace(self, sources=moved)

    def _listed(self) -> list[tuple[str, Listed]]:
        return [(name, source) for name, source in self.sources.items() if isinstance(source, Listed)]

    def _routed(self, prompt: Prompt) -> Prompt:
        return replace(prompt, teacher=self.teachers.get(prompt.task, prompt.teacher))

    def _below(self, sources: Sources, name: str) -> Sources:
        return replace(sources, place=f"{sources.place}.sources.{name}", teacher_of_task=self.teachers)
