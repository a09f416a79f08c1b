"""Mixture of several prompt sources: one student, several tasks, each with its teacher."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from opd.errors import ConfigurationError
from opd.ports import Answered, Elsewhere, Listed, PromptSource, References, Routed, Sources
from opd.settings.ranges import Length, Names
from opd.settings.validation import settings
from opd.types import Prompt
from opd.types.prompt_rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class MixedPrompts:
    """Mixture of all `sources` in every step, by their own `prompts_per_step`.

    `teachers` routes by task: `{"peak": "comparer"}` sends every prompt of task `peak` to the teacher `comparer`,
    whatever its source says; tasks it does not name keep the source's choice. The sources stand side by side, not
    shuffled, because packing sorts by length anyway. Example: `MixedPrompts(sources={"a": ShopPrompts(...), "b":
    PeakPrompts(...)}, teachers={"peak": "comparer"})`.
    """

    # sources of prompts by name
    sources: Annotated[Mapping[str, PromptSource], Length(1)]
    # teacher of each task, whatever its source says
    teachers: Mapping[str, Names] = field(default_factory=dict)
    group_size: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        smallest = min(source.group_size for source in self.sources.values())  # what a scorer can rely on
        object.__setattr__(self, "group_size", smallest)

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        prompts: list[Prompt] = []
        owner: dict[str, str] = {}
        for name, source in self.sources.items():
            for prompt in source(step, _below(sources, name)):
                if owner.setdefault(prompt.id, name) != name:
                    raise ConfigurationError(
                        f"prompts.sources {owner[prompt.id]!r} and {name!r} both have prompt {prompt.id!r}, which "
                        "would be sampled with the same seeds; give one another seed or file"
                    )
                prompts.append(self._routed(prompt))
        return prompts

    def routes(self, sources: Sources) -> frozenset[str]:
        """All teachers that a prompt may name (see `opd.ports.Routed`)."""
        named = [s.routes(_below(sources, name)) for name, s in self.sources.items() if isinstance(s, Routed)]
        return frozenset().union(*named) if not self.teachers else frozenset(self.teachers.values())

    def references(self, sources: Sources) -> Sequence[References]:
        """The answers of all sources that can show them (see `opd.ports.Answered`)."""
        return [
            references
            for name, source in self.sources.items()
            if isinstance(source, Answered)
            for references in source.references(_below(sources, name))
        ]

    def rows(self, sources: Sources) -> int:
        """See `opd.ports.Listed`."""
        counts = [source.rows(_below(sources, name)) for name, source in self._listed()]
        return sum(counts) if all(counts) else 0

    def every(self, sources: Sources, step: int | None) -> Iterator[tuple[Row, Prompt]]:
        """Rows of every source that can list them (see `opd.ports.Listed`)."""
        for name, source in self._listed():
            for row, prompt in source.every(_below(sources, name), step):
                yield row, self._routed(prompt)

    def starved(self, kept: Collection[str], steps: int, sources: Sources) -> int | None:
        """First step for which any source has no prompts, whatever the others have (see `opd.ports.Listed`)."""
        found = [source.starved(kept, steps, _below(sources, name)) for name, source in self._listed()]
        return min((step for step in found if step is not None), default=None)

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


def _below(sources: Sources, name: str) -> Sources:
    return replace(sources, place=f"{sources.place}.sources.{name}")
