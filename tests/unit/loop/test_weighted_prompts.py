"""Mixtures by weight: every step is full, each source has its share from the first prompt on, in its own order."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demos.prompts.peak import PeakPrompts
from opd.errors import ConfigurationError
from opd.ports import Sources
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.mixed import MixedPrompts
from opd.prompts.shares import apportioned, window
from opd.types import Prompt
from opd.types.prompt_rows import Columns, Row
from tests.unit.loop.test_prompts import Letters

weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9).map(float), min_size=1, max_size=5)


@given(weights, st.integers(0, 400), st.integers(0, 60))
def test_parts_fill_the_whole_and_never_shrink(given_weights: list[float], total: int, more: int) -> None:
    before, after = apportioned(given_weights, total), apportioned(given_weights, total + more)
    assert sum(before) == total and sum(after) == total + more
    assert all(0 <= a <= b for a, b in zip(before, after, strict=True))
    assert apportioned([2 * w for w in given_weights], total) == before, "weights are relative"


@given(st.lists(st.integers(1, 99), min_size=1, max_size=3), st.integers(0, 500))
def test_each_source_is_within_one_prompt_of_its_share(given_weights: list[int], total: int) -> None:
    parts = apportioned(list(map(float, given_weights)), total)
    assert all(abs(p - total * w / sum(given_weights)) < 1 for p, w in zip(parts, given_weights, strict=True))


@given(weights, st.integers(1, 20), st.integers(1, 12))
def test_steps_are_stretches_of_one_order_whatever_their_size(
    given_weights: list[float], count: int, steps: int
) -> None:
    """So a resumed run needs nothing but its step."""
    found = [window(given_weights, step * count, count) for step in range(steps)]
    for i in range(len(given_weights)):
        ends = [0, *(start + n for start, n in (step[i] for step in found))]
        assert [step[i][0] for step in found] == ends[:-1]
    assert all(sum(n for _, n in step) == count for step in found)


def rows(path: str, columns: Columns) -> Sequence[Row]:
    assert columns.place in ("prompts.sources.a", "prompts.sources.b")
    return [Row(prompt=f"{path}{'long' * (i % 3 == 0)}{i}", answer=str(i)) for i in range(7)]


SOURCES = Sources(tokenizer=Letters(), rows=rows)


def source(path: str, **fields: Any) -> DatasetPrompts:
    return DatasetPrompts(path=path, prompts_per_step=1, seed=3, **fields)


def mixed(a: float = 3.0, b: float = 1.0, count: int = 8, **fields: Any) -> MixedPrompts:
    parts = {"a": source("A", **fields), "b": source("B", **fields)}
    return MixedPrompts(sources=parts, weights={"b": b, "a": a}, prompts_per_step=count)


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [Letters().decode(p.student_ids) for p in prompts]


@given(st.floats(0.1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3))
def test_a_source_gives_its_own_order_without_gaps(weight: float, count: int, steps: int, group_size: int) -> None:
    mixture = mixed(a=weight, count=count, group_size=group_size)
    taken = [mixture(step, SOURCES) for step in range(steps)]
    assert all(len(prompts) == count * group_size for prompts in taken)
    for path in "AB":
        mine = [p.id for prompts in taken for p in prompts if p.id.startswith(f"{path}/")]
        alone = source(path, group_size=group_size).between(
            0, len(mine) // group_size, Sources(tokenizer=Letters(), rows=rows, place=f"prompts.sources.{path.lower()}")
        )
        assert Counter(mine) == Counter(p.id for p in alone)
    for prompts in taken:
        assert len(list(groupby(p.id for p in prompts))) == len({p.id for p in prompts}), "groups are whole"
    assert texts(mixture(steps - 1, SOURCES)) == texts(taken[-1]), "a step is a function of its number"


def test_what_a_plan_lists_is_what_comes() -> None:
    mixture = mixed(max_tokens=4, skip_long=True)
    for step in range(4):
        listed = [p.id for _, p in mixture.every(SOURCES, step)]
        assert sorted(listed) == sorted({p.id for p in mixture(step, SOURCES)})
    assert {p.id for _, p in mixture.every(SOURCES, None)} >= set(listed)
    short = {p.id for _, p in mixture.every(SOURCES, None)}
    assert mixture.starved(short, 20, SOURCES) is None
    assert mixture.starved(set(), 20, SOURCES) == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weights": {"a": 1.0, "b": 1.0}}, "go together"),
        ({"prompts_per_step": 4}, "go together"),
        ({"weights": {"a": 1.0}, "prompts_per_step": 4}, "'b' is in one of them alone"),
        ({"weights": {"a": 1.0, "c": 1.0, "b": 1.0}, "prompts_per_step": 4}, "'c' is in one of them alone"),
        ({"weights": {"a": 0.0, "b": 1.0}, "prompts_per_step": 4}, "needs a number from"),
    ],
)
def test_weights_that_do_not_fit_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        MixedPrompts(sources={"a": source("A"), "b": PeakPrompts(prompts_per_step=2)}, **fields)


def test_embedded_problems_can_be_mixed_in() -> None:
    parts = {"a": source("A"), "peak": PeakPrompts(prompts_per_step=2)}
    mixture = MixedPrompts(sources=parts, weights={"a": 1.0, "peak": 1.0}, prompts_per_step=6)
    counts = Counter(p.task for p in mixture(0, SOURCES))
    assert counts == {"math": 3, "peak": 3}
