"""The best checkpoint by a named measure: chosen, kept and found again."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.artifacts.checkpoint_state import expired
from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_directory import RunDirectory, append_json
from launch.checkpoint.best import BestSoFar, best_step
from launch.checkpoint.step_end import Boundary
from launch.config.best_by import BestBy
from launch.config.run_config import run_config
from opd.errors import ConfigurationError, DataError
from opd.evaluation.estimates import Estimate

SHOP = ["experiment=shop", "evaluation_sets=[shop_cool,shop_votes]"]


def point(step: int, value: float | None, name: str = "votes") -> EvaluationPoint:
    """An evaluation whose maj@4 is `value`."""
    known = {} if value is None else {"maj_at_4": Estimate(value=value, low=0.0, high=1.0)}
    return EvaluationPoint(
        step=step, greedy=None, mean_at_k=value, pass_at_k=None, k=4, reverse_kl=value, length_mean=1.0,
        truncation_rate=0.0, seconds=1.0, tokens=1, flops=1.0, cpu_s=1.0, set=name, estimates=known,
    )  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["votes", ""]), st.none() | st.floats(0, 1)), max_size=12))
def test_the_first_of_the_best_is_kept(given_points: list[tuple[str, float | None]]) -> None:
    points = [point(step, value, name) for step, (name, value) in enumerate(given_points)]
    mine = [(p.mean_at_k, -p.step) for p in points if p.set == "votes" and p.mean_at_k is not None]
    assert BestSoFar(BestBy.of("votes/maj_at_4"), points).step == (-max(mine)[1] if mine else None)
    least = [(p.reverse_kl, p.step) for p in points if not p.set and p.reverse_kl is not None]
    assert BestSoFar(BestBy.of("reverse_kl"), points).step == (min(least)[1] if least else None)
    assert BestSoFar(None, points).step is None and not BestSoFar(None, points).kept


@given(st.sets(st.integers(0, 30)), st.integers(1, 5), st.integers(0, 4), st.integers(0, 30))
def test_the_best_checkpoint_does_not_expire(steps: set[int], keep: int, every: int, best: int) -> None:
    assert set(expired(steps, keep, every, [best])) == set(expired(steps, keep, every)) - {best}


def test_a_run_finds_its_best_checkpoint_again(tmp_path: Path) -> None:
    """Among those that are there: what was measured without a checkpoint cannot be exported."""
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("checkpoint_best: votes/maj_at_4\n")
    for one in (point(0, 0.9), point(5, 0.2), point(10, 0.5), point(15, 0.8), replace(point(10, 0.1), set="other")):
        append_json(directory.evaluations, one.as_json())
    with pytest.raises(DataError, match="no checkpoint whose votes/maj_at_4 was measured; name a step=N"):
        best_step(directory)
    for step in (5, 10, 20):
        (directory.checkpoints / f"step_{step}").mkdir()
    assert best_step(directory) == 10
    directory.write_config("checkpoint_best: ''\n")
    with pytest.raises(DataError, match="has no checkpoint_best"):
        best_step(directory)


def test_a_checkpoint_is_due_at_the_best_step_where_the_pipeline_allows_it() -> None:
    def due(*more: str) -> list[int]:
        config = run_config(["experiment=shop", "checkpoint_minutes=0", "checkpoint_every=5", *more])
        nothing: Any = SimpleNamespace(asked=False)
        boundary = Boundary(config, nothing, nothing, nothing, nothing, best=lambda step: step in (3, 10))
        return [step for step in range(1, 13) if boundary._due(step)]

    assert due() == [3, 5, 10]
    assert due("max_staleness=1", "deterministic=true") == [5, 10], "a run could not resume exactly from step 3"


@pytest.mark.parametrize(
    "text",
    ["", "greedy", "reverse_kl", "mean_at_k", "shop_cool/maj_at_4", "shop_votes/maj_at_2", "shop_cool/mean_at_4"],
)
def test_measures_that_every_evaluation_has_are_taken(text: str) -> None:
    assert run_config([*SHOP, f"checkpoint_best={text}"]).checkpoint_best == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "math500/maj_at_4",
            r"an evaluation set that the run has not; write SET/MEASURE, here maj_at_4, shop_cool/maj_at_4, shop_v",
        ),
        ("shop_votes/maj_at_8", r"no measure that every evaluation on the set shop_votes has; these have mean_at_k, "),
        ("shop_cool/greedy", r"the set shop_cool has; these have mean_at_k, mean_at_4, pass_at_1, pass_at_4, maj_at_4"),
        ("pass_at_k", r"every evaluation on evaluation\.prompts has; these have greedy, mean_at_k, reverse_kl"),
        ("accuracy", r"no measure that every evaluation on evaluation\.prompts has"),
    ],
)
def test_other_measures_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        run_config([*SHOP, f"checkpoint_best={text}"])
