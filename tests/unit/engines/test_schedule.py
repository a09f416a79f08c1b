"""Schedules are transformers' own, at every update; the curve of the plan is the one that is trained with."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from launch.artifacts.checkpoint_state import described, in_todays_names
from launch.checkpoint.changes import changes, check_changes
from launch.config.run_config import run_config
from launch.config.typed import construct
from launch.plan.checks.settings import schedule_notes
from launch.plan.lr_curve import BLOCKS, PLAIN, rate_curve, sparkline
from launch.plan.plan import Plan, make_plan
from learner.config import LearnerConfig, learning_rate
from learner.schedule import Schedule
from opd.errors import ConfigurationError

LR = 3e-4
EXPERIMENTS = Path(__file__).resolve().parents[3] / "conf" / "experiment"
SHOP = ["experiment=shop", "tracker=none"]
SCHEDULES = [schedule for schedule in Schedule if schedule is not Schedule.WARMUP_TIMES_LINEAR]
TOTALS, UPDATES, FLOORS = st.integers(1, 60), st.integers(0, 60), st.sampled_from([0.0, 0.1, 0.5, 0.99])


def ours(schedule: Schedule, total: int, warmup: int, decay: int, floor: float) -> list[float]:
    stable = schedule is Schedule.WARMUP_STABLE_DECAY
    config = LearnerConfig(
        lr=LR, schedule=schedule, warmup_steps=warmup, decay_steps=decay if stable else 0, final_lr_fraction=floor
    )
    return [learning_rate(config, update, total) for update in range(total)]


def theirs(schedule: Schedule, total: int, warmup: int, decay: int, floor: float) -> LRScheduler:
    """transformers' scheduler of that name, on an optimizer of its own; where it has no floor, the one that has."""
    name, more = schedule.value, dict[str, Any]()
    if schedule is Schedule.COSINE and floor:
        name, more = "cosine_with_min_lr", {"min_lr_rate": floor}
    if schedule is Schedule.LINEAR and floor:
        name, more = "polynomial", {"power": 1.0, "lr_end": floor * LR}
    if schedule is Schedule.WARMUP_STABLE_DECAY:
        more = {"num_decay_steps": decay, "min_lr_ratio": floor}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    return get_scheduler(name, optimizer, warmup, total, more)


def rates(scheduler: LRScheduler, updates: int) -> list[Any]:
    """What that many updates train with; the scheduler is left at the last of them."""
    found = [scheduler.get_last_lr()[0]]
    for _ in range(updates - 1):
        scheduler.optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=25)
@given(total=TOTALS, warmup=UPDATES, decay=st.integers(1, 60), floor=FLOORS, at=UPDATES)
@example(total=1, warmup=0, decay=1, floor=0.0, at=0)
@example(total=1, warmup=1, decay=1, floor=0.1, at=1)
@example(total=20, warmup=20, decay=1, floor=0.1, at=20)
@example(total=5, warmup=10, decay=3, floor=0.0, at=2)
@example(total=20, warmup=5, decay=15, floor=0.1, at=7)
def test_every_update_has_the_rate_that_transformers_gives_it_also_after_a_resume(
    schedule: Schedule, total: int, warmup: int, decay: int, floor: float, at: int
) -> None:
    shape = (schedule, total, warmup, decay, floor)
    first, again, at = theirs(*shape), theirs(*shape), min(at, total - 1)
    before = rates(first, at + 1)
    again.load_state_dict(first.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    assert ours(*shape) == pytest.approx(before[:at] + rates(again, total - at), rel=1e-12, abs=1e-18)


@settings(max_examples=25)
@given(total=TOTALS, floor=FLOORS)
def test_a_floor_lifts_the_shape_and_does_not_cut_it_off(total: int, floor: float) -> None:
    for schedule in (Schedule.LINEAR, Schedule.COSINE, Schedule.WARMUP_STABLE_DECAY):
        plain, lifted = ours(schedule, total, 0, total, 0.0), ours(schedule, total, 0, total, floor)
        assert lifted == pytest.approx([LR * floor + (1 - floor) * rate for rate in plain], rel=1e-12)
        assert all(one >= two > 0 for one, two in pairwise(lifted))


def test_the_shape_of_older_tables_is_what_it_was() -> None:
    config = LearnerConfig(lr=0.2, warmup_steps=4, schedule=Schedule.WARMUP_TIMES_LINEAR, final_lr_fraction=0.1)
    found = [learning_rate(config, update, 101) for update in range(101)]
    assert found[:2] == [0.2 * 0.25 * (0.1 + 0.9 * 1.0), 0.2 * 0.5 * (0.1 + 0.9 * (1.0 - 1 / 100))]
    assert found[50] == pytest.approx(0.2 * 0.55) and found[100] == learning_rate(config, 500, 101) == 0.2 * 0.1
    flat = replace(config, final_lr_fraction=1.0)
    assert {learning_rate(flat, update, 101) for update in range(3, 101)} == {0.2}
    assert learning_rate(replace(flat, warmup_steps=0), 0, 1) == 0.2


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(s.value, s) for s in Schedule] + [("cosine_with_min_lr", Schedule.COSINE), ("wsd", Schedule.WARMUP_STABLE_DECAY)],
)
def test_transformers_names_are_understood(name: str, schedule: Schedule) -> None:
    values = {"schedule": name, "decay_steps": 5 if schedule is Schedule.WARMUP_STABLE_DECAY else 0}
    assert construct(LearnerConfig, values, "learner").schedule is schedule


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cosine_warmup_with_min_lr", "COSINE"),
        ("cosine_with_restarts", "COSINE"),
        ("constant_warmup", "CONSTANT_WITH_WARMUP"),
        ("linear_with_warmup", "LINEAR"),
        ("wsd_decay", "CONSTANT_WITH_WARMUP"),
    ],
)
def test_another_name_is_refused_with_the_one_that_is_near(name: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"one of CONSTANT, .*got '{name}'; set learner\.schedule={meant}$"):
        construct(LearnerConfig, {"schedule": name}, "learner")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learner.min_lr_rate=0.1", "it is learner.final_lr_fraction here; write learner.final_lr_fraction=0.1"),
        ("learner.lr_scheduler_type=cosine", "write learner.schedule=cosine"),
        ("learner.num_decay_steps=9", "write learner.decay_steps=9"),
        ("learner.schedule=WARMUP_STABLE_DECAY", "set learner.decay_steps, e.g."),
        ("learner.decay_steps=9", "set learner.schedule=WARMUP_STABLE_DECAY or learner.decay_steps=0"),
        ("learner.schedule=wsd learner.decay_steps=95", "set learner.decay_steps=90 or steps=105"),
        ("learner.schedule=wsd learner.decay_steps=9 steps=10", "; set steps=19"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_write(line: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        make_plan(run_config([*SHOP, *line.split()]))
    assert said in str(refused.value)


@pytest.mark.parametrize("old", ["LINEAR", "CONSTANT", "COSINE"])
def test_a_checkpoint_from_before_goes_on_under_the_name_that_its_shape_has_now(old: str) -> None:
    floor = 1.0 if old == "CONSTANT" else 0.1
    same = LearnerConfig(schedule=Schedule.WARMUP_TIMES_LINEAR, final_lr_fraction=floor)
    saved = {**described(same, "learner"), "learner.schedule": old, "learner.final_lr_fraction": 0.1}
    del saved["learner.decay_steps"]
    found = changes(in_todays_names(saved), described(same, "learner"))
    assert [change.before for change in found] == (["an older COSINE"] if old == "COSINE" else [])
    now = described(replace(same, schedule=Schedule[old]), "learner")
    with pytest.raises(ConfigurationError, match=rf"made with learner\.schedule=.*has learner\.schedule={old}"):
        check_changes("step_4", changes(in_todays_names(saved), now))
    assert in_todays_names(now) == now, "what is named so now is left alone"


def test_recipes_of_published_tables_state_the_schedule_of_their_figures_for_baselines_too() -> None:
    """And of GRPO that its rate stays where the warm-up has brought it."""
    found = {file.stem: yaml.safe_load(file.read_text()).get("comparison") for file in EXPERIMENTS.glob("*.yaml")}
    comparisons = {name: comparison for name, comparison in found.items() if comparison and name != "compare_locks"}
    assert {"compare", "methods", "compare_staleness"} <= comparisons.keys()
    for name, comparison in comparisons.items():
        assert {"learner.schedule=WARMUP_TIMES_LINEAR", "learner.final_lr_fraction=0.1"} <= set(comparison["base"]), (
            name
        )
    for arm, own in comparisons["compare"]["arms"].items():
        learner = run_config([*comparisons["compare"]["base"], *own]).learner
        assert learner.schedule is Schedule.WARMUP_TIMES_LINEAR
        assert learning_rate(learner, 99, 100) == pytest.approx(learner.lr * (1.0 if arm == "grpo" else 0.1)), arm


# --- the plan ------------------------------------------------------------------------------------------------------


def plan(*more: str) -> Plan:
    return make_plan(run_config([*SHOP, *more]))


@pytest.mark.parametrize("width", [8, 40, 200])
def test_the_plan_draws_the_rates_that_will_be_trained_with(width: int) -> None:
    config = LearnerConfig(lr=1e-3, warmup_steps=10, schedule=Schedule.LINEAR, final_lr_fraction=0.1)
    said, curve = rate_curve(config, 100, width)
    assert said == "learning rate: LINEAR, first 0, greatest 0.001 at update 11, last 0.00011"
    assert len(curve) == min(width, 72) and curve[0] == BLOCKS[0] and set(curve) <= set(BLOCKS)
    assert all(one >= two for one, two in pairwise(curve[width // 4 :])), "it falls after the warm-up"
    assert rate_curve(config, 10**9, width, PLAIN)[1][-1] in PLAIN, "however many updates"


def test_a_curve_ends_where_the_run_ends() -> None:
    assert sparkline([0, 1, 2]) == "▁▅█" and sparkline([0.0]) == "▁" and sparkline([]) == ""
    assert rate_curve(LearnerConfig(warmup_steps=0), 1, 80) == (
        "learning rate: CONSTANT_WITH_WARMUP, first 5e-06, greatest 5e-06 at update 1, last 5e-06",
        "█",
    )


def test_dry_run_shows_it_at_any_width() -> None:
    made = plan()
    for width in (20, 30, 120):
        console = Console(width=width)
        with console.capture() as captured:
            made.show_rate(console)
        lines = captured.get().splitlines()
        assert max(map(len, lines)) <= width and "learning rate" in lines[0] and set(lines[-1]) <= set(BLOCKS + PLAIN)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["learner.schedule=CONSTANT"], "learner.warmup_steps=10 does nothing"),
        (["steps=1"], "whose rate is 0, so that nothing is trained"),
        (["learner.schedule=CONSTANT_WITH_WARMUP"], ""),
        (
            ["learner.schedule=CONSTANT_WITH_WARMUP", "learner.final_lr_fraction=0.3"],
            "final_lr_fraction=0.3 does nothing",
        ),
        (["steps=1", "learner.warmup_steps=0"], ""),
    ],
)
def test_the_plan_says_where_a_schedule_makes_another_setting_idle(lines: list[str], said: str) -> None:
    notes = schedule_notes(run_config([*SHOP, *lines]))
    assert (said in notes[0]) if said else not notes


def test_what_a_schedule_makes_idle_is_among_the_remarks_of_the_plan() -> None:
    assert any("learner.warmup_steps=10 does nothing" in remark for remark in plan("learner.schedule=CONSTANT").remarks)
