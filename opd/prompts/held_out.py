"""Held-out prompts of an evaluation: every row of a source once, or a part of them."""

import random
from collections.abc import Sequence

from opd.ports import Listed, PromptSource, Sources
from opd.prompts.generated import GeneratedPrompts
from opd.types import Prompt
from opd.types.prompt_rows import Row

Found = list[tuple[Row, Prompt]]


def held_out(source: PromptSource, sources: Sources, count: int, seed: int | None) -> Found:
    """`count` prompts of a source with their rows, 0 for all: the first ones, or drawn with a `seed`.

    All rows of a source that ends, in their order; of one without an end (or whose rows stay in their files) what its
    first step has. What is drawn keeps that order, too.
    """
    found = every_row(source, sources)
    if not count or count >= len(found):
        return found
    if seed is None:
        return found[:count]
    return [found[i] for i in sorted(random.Random(f"held out/{seed}").sample(range(len(found)), count))]


def first_step(source: PromptSource, sources: Sources) -> Found:
    """Prompts of step 0 with their rows, once each."""
    return _listed(source, sources, 0)


def every_row(source: PromptSource, sources: Sources) -> Found:
    """All prompts of a source that ends, once each; else those of its first step."""
    if isinstance(source, GeneratedPrompts):  # which shows a plan a sample
        return list(source.every_between(0, source.problems or source.prompts_per_step, sources))
    ends = isinstance(source, Listed) and source.rows(sources) > 0
    return _listed(source, sources, None if ends else 0)


def _listed(source: PromptSource, sources: Sources, step: int | None) -> Found:
    if isinstance(source, Listed):
        return list(source.every(sources, step))
    prompts: Sequence[Prompt] = source(0, sources)
    return [(Row(prompt="", answer=p.answer, where=f"prompt {p.id!r}"), p) for p in {p.id: p for p in prompts}.values()]
