"""Means of metrics do not depend on how tokens were split, and leave out what is not defined."""

from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import DataError
from opd.loss.metric_sums import MetricSums, MetricTable

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
    parts = [
        MetricSums.of({name: column[a:b] for name, column in metrics.items()}, active[a:b]) for a, b in pairwise(cuts)
    ]
    for order in (parts, parts[::-1]):
        means = reduce(MetricSums.plus, order).means()
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
    first = MetricSums.of({"x": torch.tensor([1.0, NAN, NAN])}, torch.ones(3).bool())
    second = MetricSums.of({"x": torch.tensor([4.0, 7.0])}, torch.ones(2).bool())
    assert first.plus(second).means() == {"x": 4.0}
    assert (first.means()["x"] + second.means()["x"]) / 2 != 4.0


def test_micro_batches_of_different_metrics_are_refused() -> None:
    active = torch.ones(1).bool()
    with pytest.raises(DataError, match="same names"):
        MetricSums.of({"x": torch.ones(1)}, active).plus(MetricSums.of({"y": torch.ones(1)}, active))


def test_blocks_of_different_metrics_are_refused_and_say_what_to_do() -> None:
    table = MetricTable(rows=2, device=torch.device("cpu"))
    table.write(0, {"x": torch.ones(1)})
    for other in ({"x": torch.ones(1), "y": torch.ones(1)}, {}, {"y": torch.ones(1)}):
        with pytest.raises(DataError, match=r"same names .*\('x',\) and .* reports NaN where a metric is not defined"):
            table.write(1, other)
    table.write(1, {"x": torch.tensor([5.0])})
    assert table.sums(torch.ones(2).bool()).means() == {"x": 3.0}


def test_the_greatest_is_that_of_tokens_that_count_and_never_grows_by_others() -> None:
    def maxima(values: list[float], active: list[bool]) -> dict[str, float]:
        metrics = {name: torch.tensor(values) for name in ("logprob_gap", "probs_diff", "ratio")}
        return {n: v for n, v in MetricSums.of(metrics, torch.tensor(active)).means().items() if n.endswith("_max")}

    assert maxima([-3.0, -2.0, 9.0, NAN], [True, True, False, True]) == {"logprob_gap_max": -2, "probs_diff_max": -2}
    assert maxima([1.0, NAN], [False, True]) == {}


def test_no_metrics_and_no_tokens_are_fine() -> None:
    assert MetricSums.of({}, torch.ones(3).bool()).means() == {}
    assert MetricSums.of({"x": torch.ones(0)}, torch.ones(0).bool()).means() == {}
    nothing = MetricTable(rows=3, device=torch.device("cpu")).sums(torch.ones(3).bool())
    assert (nothing.names, nothing.means(), nothing.plus(nothing).means()) == ((), {}, {})
    assert [len(part) for part in (nothing.totals, nothing.counts, nothing.maxima)] == [0, 0, 0]


def test_the_order_in_which_metrics_are_named_does_not_matter() -> None:
    table = MetricTable(rows=2, device=torch.device("cpu"))
    table.write(0, {"x": torch.tensor([1.0]), "a": torch.tensor([10.0])})
    table.write(1, {"a": torch.tensor([30.0]), "x": torch.tensor([2.0])})
    other = MetricSums.of({"a": torch.tensor([50.0]), "x": torch.tensor([9.0])}, torch.ones(1).bool())
    assert table.sums(torch.ones(2).bool()).plus(other).means() == {"x": 4.0, "a": 30.0}
