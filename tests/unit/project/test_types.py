"""Rows that are held elsewhere, and the verbs of testimony, behave like plain indexing."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.types import HiddenScores, RemoteRows, Scores, TopKScores

ARRAYS = {name: np.random.default_rng(i).random((6, 2), dtype=np.float32) for i, name in enumerate("abc")}
pieces = st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 5), max_size=4))


def remote(parts: list[tuple[str, list[int]]]) -> RemoteRows:
    return RemoteRows(pieces=tuple((name, np.array(rows, dtype=np.int64)) for name, rows in parts))


def plain(parts: list[tuple[str, list[int]]]) -> np.ndarray:
    return np.concatenate([ARRAYS[name][np.array(rows, dtype=np.int64)] for name, rows in parts])


@given(st.lists(pieces, min_size=1, max_size=5), st.lists(pieces, min_size=1, max_size=3), st.data())
def test_remote_rows_are_indexed_like_the_rows_themselves(first: list, second: list, data: st.DataObject) -> None:
    joined = RemoteRows.concat([remote(first), remote(second)])
    whole = plain(first + second)
    assert len(joined) == len(whole)
    np.testing.assert_array_equal(joined.fetch(ARRAYS.__getitem__), whole)
    size = len(whole)
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=8) if size else st.just([])), dtype=np.int64)
    taken = joined.take(index)
    assert len(taken) == len(index)
    if len(index):
        np.testing.assert_array_equal(taken.fetch(ARRAYS.__getitem__), whole[index])
        again = np.arange(len(index))[::-1].copy()
        np.testing.assert_array_equal(taken.take(again).fetch(ARRAYS.__getitem__), whole[index][again])


def test_each_array_is_fetched_once_and_neighboring_rows_stay_one_piece() -> None:
    asked: list[str] = []

    def get(handle: str) -> np.ndarray:
        asked.append(handle)
        return ARRAYS[handle]

    rows = remote([("a", [0, 1]), ("b", [2]), ("a", [3, 4, 5])])
    rows.fetch(get)
    assert sorted(asked) == ["a", "b"]
    assert [(handle, part.tolist()) for handle, part in rows.take(np.array([0, 1, 4, 5])).pieces] == [
        ("a", [0, 1]),
        ("a", [4, 5]),
    ]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_sixteen_bit_words_are_bfloat16_bit_for_bit(index: list[int]) -> None:
    states = torch.randn(4, 3).bfloat16()
    states[0, 0], states[1, 1] = float("inf"), -0.0
    words = states.view(torch.uint16).numpy()
    got = RemoteRows(pieces=(("w", np.array(index)),)).fetch(lambda handle: words)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.view(torch.int16), states[index].view(torch.int16))


def topk(n: int, first: int = 0) -> TopKScores:
    values = np.arange(first, first + n, dtype=np.float32)
    return TopKScores(
        logprobs=-values,
        topk_ids=np.stack([values, values + 1], axis=1).astype(np.int32),
        topk_logprobs=-np.stack([values, values + 1], axis=1),
    )


def same(a: Scores, b: Scores) -> bool:
    def arrays(scores: Any) -> list[np.ndarray]:
        return [np.asarray(getattr(scores, name)) for name in ("logprobs", "topk_ids", "topk_logprobs")]

    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def test_the_verbs_of_testimony_act_on_every_field() -> None:
    assert same(TopKScores.concat([topk(2), topk(3, first=2)]), topk(5))
    assert same(topk(5).rows(1, 3), topk(5).take(np.array([1, 2])))
    assert same(topk(5).take(np.array([4])), topk(1, first=4))
    moved = topk(3).to("cpu", ARRAYS.__getitem__)
    assert all(isinstance(x, torch.Tensor) for x in (moved.logprobs, moved.topk_ids, moved.topk_logprobs))
    assert same(moved, topk(3))
    assert Scores.concat([Scores(), Scores()]).take(np.array([0])) == Scores()


def test_hidden_states_become_tensors_where_they_are_needed() -> None:
    scores = HiddenScores(logprobs=np.zeros(2, dtype=np.float32), hidden=remote([("a", [3]), ("c", [1])]))
    moved = HiddenScores.concat([scores, scores]).take(np.array([1, 2])).to("cpu", ARRAYS.__getitem__)
    np.testing.assert_array_equal(moved.hidden, np.stack([ARRAYS["c"][1], ARRAYS["a"][3]]))
