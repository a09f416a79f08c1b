"""Several prompt sources at once: one student, several tasks, each with its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from opd.errors import ConfigurationError
from opd.ports import Answered, PromptSource, References, Routed, Sources
from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrompts:
    """Every step has the prompts of all `sources`, by their own `prompts_per_step`.

    `teachers` routes by task: `{"peak": "comparer"}` sends every prompt of task `peak` to the teacher `comparer`,
    whatever its source says; tasks it does not name keep the source's choice. The sources stand side by side, not
    shuffled, because packing sorts by length anyway. Example: `MixedPrompts(sources={"a": ShopPrompts(...), "b":
    PeakPrompts(...)}, teachers={"peak": "comparer"})`.
    """

    sources: Mapping[str, PromptSource]
    teachers: Mapping[str, str] = field(default_factory=dict)
    group_size: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigurationError("prompts MixedPrompts needs at least one source; set prompts.sources.NAME")
        smallest = min(source.group_size for source in self.sources.values())  # what a scorer can rely on
        object.__setattr__(self, "group_size", smallest)

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        prompts: list[Prompt] = []
        owner: dict[str, str] = {}
        for name, source in self.sources.items():
            for prompt in source(step, sources):
                if owner.setdefault(prompt.id, name) != name:
                    raise ConfigurationError(
                        f"prompts.sources {owner[prompt.id]!r} and {name!r} both have prompt {prompt.id!r}, which "
                        "would be sampled with the same seeds; give one another seed or file"
                    )
                prompts.append(replace(prompt, teacher=self.teachers.get(prompt.task, prompt.teacher)))
        return prompts

    def routes(self, sources: Sources) -> frozenset[str]:
        """All teachers that a prompt may ask (see `opd.ports.Routed`)."""
        named = [s.routes(sources) for s in self.sources.values() if isinstance(s, Routed)]
        return frozenset().union(*named) if not self.teachers else frozenset(self.teachers.values())

    def references(self, sources: Sources) -> Sequence[References]:
        """The answers of all sources that can show them (see `opd.ports.Answered`)."""
        return [r for s in self.sources.values() if isinstance(s, Answered) for r in s.references(sources)]
