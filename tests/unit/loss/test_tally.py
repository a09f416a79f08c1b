"""Means of metrics do not depend on how tokens were split, and leave out what is not defined."""

from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import DataError
from opd.loss.metric_sums import Tally

NAN = float("nan")
values = st.sampled_from([NAN, NAN, -2.0, 0.0, 0.25, 3.0, 1e6])


@st.composite
def splits(draw: st.DrawFn) -> tuple[dict[str, list[float]], list[bool], list[int]]:
    """Metrics of some tokens, which of them count, and the cuts between chunks (empty chunks included)."""
    n = draw(st.integers(1, 9))
    column = st.lists(values, min_size=n, max_size=n)
    metrics = {"entropy": draw(column), "probs_diff": draw(column)}
    active = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return metrics, active, [0, *sorted(draw(st.lists(st.integers(0, n), max_size=4))), n]


@given(splits())
def test_any_split_has_the_means_of_the_defined_tokens(case: tuple) -> None:
    columns, flags, cuts = case
    metrics = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
    active = torch.tensor(flags)
    parts = [Tally.of({name: column[a:b] for name, column in metrics.items()}, active[a:b]) for a, b in pairwise(cuts)]
    for order in (parts, parts[::-1]):
        means = reduce(Tally.plus, order).means()
        for name, column in metrics.items():
            counted = column[active & ~column.isnan()].double()
            assert (name in means) == bool(len(counted)), "a metric that is defined nowhere is absent, not 0"
            if len(counted):
                assert means[name] == pytest.approx(float(counted.mean()), abs=1e-9)
        counted = metrics["probs_diff"][active & ~metrics["probs_diff"].isnan()]
        assert means.get("probs_diff_max") == (float(counted.max()) if len(counted) else None)
        assert "entropy_max" not in means


def test_a_mean_of_means_would_be_seen() -> None:
    """The defect this type exists against: chunks with different numbers of defined tokens."""
    first = Tally.of({"x": torch.tensor([1.0, NAN, NAN])}, torch.ones(3).bool())
    second = Tally.of({"x": torch.tensor([4.0, 7.0])}, torch.ones(2).bool())
    assert first.plus(second).means() == {"x": 4.0}
    assert (first.means()["x"] + second.means()["x"]) / 2 != 4.0


def test_micro_batches_of_different_metrics_are_refused() -> None:
    active = torch.ones(1).bool()
    with pytest.raises(DataError, match="same names"):
        Tally.of({"x": torch.ones(1)}, active).plus(Tally.of({"y": torch.ones(1)}, active))


def test_no_metrics_and_no_tokens_are_fine() -> None:
    assert Tally.of({}, torch.ones(3).bool()).means() == {}
    assert Tally.of({"x": torch.ones(0)}, torch.ones(0).bool()).means() == {}
