"""Prompts are a pure function of the step: every item once an epoch, groups together, bad rows named."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demos.prompts.peak import PeakPrompts
from demos.prompts.shop import ShopPrompts
from hf.tokenizer import HuggingFaceTokenizer
from launch.inputs.prompt_files import read_rows
from opd.errors import ConfigurationError, DataError
from opd.ports import Sources
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.mixed import MixedPrompts
from opd.prompts.order import draw
from opd.types import Prompt
from opd.types.prompt_rows import Columns, PromptText, Row

sizes, counts, seeds = st.integers(1, 9), st.integers(1, 12), st.integers(0, 3)


@given(seeds, sizes, counts, st.booleans())
def test_every_item_comes_once_an_epoch(seed: int, size: int, count: int, shuffle: bool) -> None:
    """`size` steps of `count` items are exactly `count` epochs."""
    drawn = [draw(seed, size, step * count, count, shuffle) for step in range(size)]
    assert all(len(items) == count for items in drawn)
    assert Counter(i for items in drawn for i in items) == dict.fromkeys(range(size), count)
    for epoch in range(count):
        assert sorted(draw(seed, size, epoch * size, size, shuffle)) == list(range(size))


@given(seeds, sizes, counts, st.integers(0, 40), st.booleans())
def test_a_step_is_a_window_on_the_order_whatever_came_before(
    seed: int, size: int, count: int, start: int, shuffle: bool
) -> None:
    window = draw(seed, size, start, count, shuffle)
    one_by_one = [draw(seed, size, place, 1, shuffle)[0] for place in range(start, start + count)]
    assert Counter(window) == Counter(one_by_one)
    assert list(dict.fromkeys(window)) == list(dict.fromkeys(one_by_one))
    assert len(list(groupby(window))) == len(set(window)), "equal items stand next to each other"
    if not shuffle:
        assert one_by_one == [place % size for place in range(start, start + count)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(draw(seed, 8, 8 * epoch, 8, True)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)


class Letters:
    """A token per letter; a conversation begins with 1 and ends with 2."""

    eos_id = 0

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) for c in text], dtype=np.int32)

    def encode_all(self, prompts: Sequence[PromptText]) -> list[np.ndarray]:
        return [self.encode(p.text) if isinstance(p.text, str) else self._chat(p.text) for p in prompts]

    def _chat(self, messages: Sequence[Any]) -> np.ndarray:
        return np.concatenate([[1], *(self.encode(m["content"]) for m in messages), [2]]).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(map(chr, ids))


def sources(*prompts: Any) -> Sources:
    def rows(path: str, columns: Columns) -> list[Row]:
        assert (path, columns) == ("data.jsonl", Columns(prompt="prompt", answer="solution"))
        return [Row(prompt=prompt, answer=f"answer {i}") for i, prompt in enumerate(prompts)]

    return Sources(tokenizer=Letters(), rows=rows)


def dataset(**fields: Any) -> DatasetPrompts:
    given = {"path": "data.jsonl", "prompts_per_step": 2, "answer_column": "solution", "shuffle": False} | fields
    return DatasetPrompts(**given)


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [Letters().decode(p.student_ids) for p in prompts]


def test_rows_become_prompts_with_their_answers() -> None:
    chat = ({"role": "user", "content": "b"},)
    first, second = dataset(suffix="!", task="sum", teacher="t")(0, sources("a", chat))
    assert (first.id, first.answer, first.task, first.teacher) == ("data.jsonl/0", "answer 0", "sum", "t")
    assert texts([first]) == ["a!"] and second.student_ids.tolist() == [1, ord("b"), 2]
    assert first.teacher_ids.tolist() == first.student_ids.tolist()


def test_steps_walk_through_the_rows_and_a_limit_cuts_them() -> None:
    rows = sources("a", "b", "c", "d")
    assert [texts(dataset()(step, rows)) for step in range(3)] == [["a", "b"], ["c", "d"], ["a", "b"]]
    assert [texts(dataset(limit=3)(step, rows)) for step in range(2)] == [["a", "b"], ["c", "a"]]
    assert texts(dataset(limit=99)(1, rows)) == ["c", "d"]
    shuffled = dataset(shuffle=True, prompts_per_step=4)
    assert sorted(texts(shuffled(5, rows))) == ["a", "b", "c", "d"]
    assert texts(shuffled(5, rows)) == texts(shuffled(5, rows))
    assert len({tuple(texts(shuffled(step, rows))) for step in range(8)}) > 1


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_a_group_is_never_torn_apart(size: int, wanted: int, group_size: int, step: int, shuffle: bool) -> None:
    """Also where an epoch ends inside a step: two groups of one prompt would be written with the same seeds."""
    chosen = dataset(prompts_per_step=wanted, group_size=group_size, shuffle=shuffle)
    prompts = chosen(step, sources(*"abcd"[:size]))
    assert len(prompts) == wanted * group_size
    groups = [(key, len(list(group))) for key, group in groupby(prompts, key=lambda p: p.id)]
    assert len({key for key, _ in groups}) == len(groups)
    assert all(n >= group_size and n % group_size == 0 for _, n in groups)


def test_a_long_prompt_is_named_or_left_out() -> None:
    rows = sources("a", "bbbb", "cc", "dddd")
    with pytest.raises(
        DataError, match=r"data\.jsonl: row 2 has 4 tokens, but prompts.max_tokens is 3; raise it or set"
    ):
        dataset(max_tokens=3)(0, rows)
    kept = dataset(max_tokens=3, skip_long=True, group_size=2)
    assert texts(kept(0, rows)) == ["a", "a"] and texts(kept(1, rows)) == ["cc", "cc"]
    assert texts(dataset(max_tokens=4)(0, rows)) == ["a", "bbbb"]
    with pytest.raises(DataError, match=r"every prompt of step 0 is longer than prompts\.max_tokens=3; raise it"):
        dataset(max_tokens=3, skip_long=True)(0, sources("bbbb", "dddd"))


def test_an_empty_prompt_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: row 2 has an empty prompt; remove the row"):
        dataset()(0, sources("a", ""))


WRONG = ({"prompts_per_step": 0}, {"group_size": 0}, {"limit": -1}, {"max_tokens": 0})


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_fields_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=r"DatasetPrompts\.\w+ needs a whole number"):
        dataset(**wrong)


@pytest.mark.parametrize("wrong", [{"prompts_per_step": 0}, {"group_size": 0}, {"problems": -1}], ids=str)
def test_shop_fields_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=r"ShopPrompts\.\w+ needs a whole number"):
        ShopPrompts(**({"prompts_per_step": 1} | wrong))


def test_shop_prompts_are_fresh_forever_or_a_fixed_set() -> None:
    fresh = ShopPrompts(prompts_per_step=3, group_size=2)
    seen = [p for step in range(4) for p in fresh(step, sources())]
    assert Counter(p.id for p in seen) == dict.fromkeys({p.id for p in seen}, 2) and len(seen) == 24
    assert len(set(texts(seen))) == 12
    assert texts(fresh(2, sources())) == texts(fresh(2, sources()))
    other = ShopPrompts(prompts_per_step=3, seed=1)
    assert not set(texts(other(0, sources()))) & set(texts(seen))
    fixed = ShopPrompts(prompts_per_step=3, problems=4)
    assert {text for step in range(8) for text in texts(fixed(step, sources()))} == set(texts(fresh_set(4)))
    groups = [key for key, _ in groupby(ShopPrompts(prompts_per_step=7, problems=2)(1, sources()), key=lambda p: p.id)]
    assert len(groups) == 2


@dataclass(frozen=True)
class Hinted:
    """A problem of a number, of which the teacher reads twice as much."""

    prompt: str
    answer: str = "a"

    @property
    def teacher_prompt(self) -> str:
        return 2 * self.prompt


class HintedPrompts(ShopPrompts):
    task = "hinted"

    @staticmethod
    def make(rng: random.Random) -> Hinted:
        return Hinted(str(rng.randrange(100, 999)))


def test_a_generated_problem_may_say_more_to_its_teacher() -> None:
    for prompt in HintedPrompts(prompts_per_step=5)(3, sources()):
        mine, its = Letters().decode(prompt.student_ids), Letters().decode(prompt.teacher_ids)
        assert its == 2 * mine and len(mine) == 3
    for prompt in ShopPrompts(prompts_per_step=2)(0, sources()):
        assert prompt.teacher_ids.tolist() == prompt.student_ids.tolist()


def fresh_set(problems: int) -> Sequence[Prompt]:
    return ShopPrompts(prompts_per_step=problems)(0, sources())


def written(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_column_routes_each_row_to_its_teacher_and_says_what_it_weighs(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a", "who": "b", "w": 2}, {"prompt": "c", "who": "default", "w": 0.5})
    source = dataset(path=path, answer_column="", teacher_column="who", weight_column="w", teacher="never")
    real = Sources(tokenizer=Letters(), rows=read_rows)
    assert [(p.teacher, p.weight) for p in source(0, real)] == [("b", 2.0), ("default", 0.5)]
    assert source.routes(real) == {"b", "default"}
    assert dataset(path=path, answer_column="", teacher="t").routes(real) == {"t"}


def test_a_privileged_teacher_is_shown_another_column(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hint"}]
    path = written(tmp_path, {"prompt": "a", "hint": "a hint"}, {"prompt": "c", "hint": chat})
    source = dataset(path=path, answer_column="", teacher_prompt_column="hint", suffix="!")
    first, second = source(0, Sources(tokenizer=Letters(), rows=read_rows))
    assert texts([first, second]) == ["a!", "c!"]
    assert Letters().decode(first.teacher_ids) == "a hint!"
    assert second.teacher_ids.tolist() == [1, *map(ord, "hint"), 2]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"teacher_column": "who"}, r"line 1 names no teacher in 'who'"),
        ({"teacher_column": "nowhere"}, r"line 1 has no column 'nowhere'.*set prompts.teacher_column"),
        ({"teacher_prompt_column": "who"}, r"line 1 has an empty who"),
        ({"weight_column": "w"}, r"'w' must be a finite number >= 0, got -1"),
    ],
)
def test_a_bad_route_hint_or_weight_is_named_by_its_line(columns: dict, says: str, tmp_path: Path) -> None:
    source = dataset(path=written(tmp_path, {"prompt": "a", "who": "", "w": -1}), answer_column="", **columns)
    with pytest.raises(DataError, match=says):
        source(0, Sources(tokenizer=Letters(), rows=read_rows))


def test_a_mixture_has_the_prompts_of_every_source_and_routes_by_task() -> None:
    words = HuggingFaceTokenizer("assets/shop/student")
    parts = {
        "shop": ShopPrompts(prompts_per_step=2, group_size=3),
        "peak": PeakPrompts(prompts_per_step=3, group_size=2),
    }
    mixed = MixedPrompts(sources=parts, teachers={"peak": "comparer"})
    sources_ = Sources(tokenizer=words, rows=read_rows)
    prompts = mixed(4, sources_)
    assert [p.id for p in prompts] == [p.id for part in parts.values() for p in part(4, sources_)]
    assert {(p.task, p.teacher) for p in prompts} == {("shop", "default"), ("peak", "comparer")}
    assert mixed.group_size == 2
    twice = MixedPrompts(sources={"a": parts["shop"], "b": parts["shop"]})
    with pytest.raises(ConfigurationError, match=r"'a' and 'b' both have prompt 'shop/0/0'"):
        twice(0, sources_)
    with pytest.raises(ConfigurationError, match=r"MixedPrompts\.sources needs .*at least 1"):
        MixedPrompts(sources={})
