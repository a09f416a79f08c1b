"""`opd compare`: what a command asks for, how its budget becomes steps, and how processes share its runs."""

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.artifacts.spending import Unit
from launch.cli.compare import shared_runs
from launch.cli.compare.budget_plan import ROOM, Budget, at_most_per_step, cost_per_step, planned_steps
from launch.cli.compare.command import compare_methods, run_comparison
from launch.cli.compare.comparison import Request, from_arguments
from launch.cli.compare.shared_runs import CLAIMS, run_all, run_once
from launch.cli.flags import without_methods
from launch.config.run_config import run_config
from launch.plan.plan import Plan, make_plan
from launch.report.comparison import Arm
from opd.errors import ConfigurationError, DataError
from tests.command import opd
from tests.unit.cli.test_tuning import ended, quick_plan

PAIR = "methods=[full_reverse_kl,sft]"


def asked(*arguments: str) -> Request:
    return from_arguments(["experiment=shop", *arguments])


# ---- the command


def test_methods_are_arms_on_one_grid_with_problems_of_their_own_to_choose_on() -> None:
    found = asked(PAIR, "seeds=2", "sft.prompts.prompts_per_step=8", "learner.warmup_steps=5", "run_name=x").comparison
    assert found.arms == {
        "full_reverse_kl": ["method=full_reverse_kl"],
        "sft": ["method=sft", "prompts.prompts_per_step=8"],
    }
    assert (found.name, list(found.seeds), found.reference) == ("x", [0, 1], "sft")
    assert (found.budget, found.amount) == (Unit.STEPS, 100), "the steps of the experiment"
    assert {"experiment=shop", "learner.warmup_steps=5", "evaluation.parts=10"} <= set(found.base)
    assert not any(override.startswith("run_name=") for override in found.base)
    assert found.tuning is not None and found.tuning.seed not in found.seeds
    grid = ["0.0005", "0.001", "0.002"]
    assert found.tuning.values == {"full_reverse_kl": grid, "sft": grid}
    assert "evaluation.prompts.seed=2000000" in found.tuning.overrides


def test_a_method_s_own_rate_is_the_middle_of_its_grid_and_the_grids_are_alike() -> None:
    tuning = asked(PAIR, "sft.learner.lr=3e-4", "rates=[2,0.5]").comparison.tuning
    assert tuning is not None
    assert tuning.values == {"full_reverse_kl": ["0.0005", "0.002"], "sft": ["0.00015", "0.0006"]}


def test_one_rate_is_no_sweep() -> None:
    found = asked(PAIR, "rates=[2]").comparison
    assert found.tuning is None and found.arms["sft"] == ["method=sft", "learner.lr=0.002"]


def test_what_a_command_says_wins_over_what_is_quiet_by_itself() -> None:
    base = asked(PAIR, "tracker=wandb", "evaluation.teacher=true", "evaluations=4").comparison.base
    assert "tracker=none" not in base and "evaluation.teacher=false" not in base
    assert {"tracker=wandb", "evaluation.teacher=true", "evaluation.parts=4", "doctor=false"} <= set(base)


def test_budget_seeds_and_target_are_of_their_types() -> None:
    found = asked(PAIR, "budget=flops", "amount=1e12", "seeds=[3,7]", "target=0.9", "resume=true", "run_name=x")
    assert (found.comparison.budget, found.comparison.amount) == (Unit.FLOPS, 1e12)
    assert (list(found.comparison.seeds), found.comparison.target, found.comparison.resume) == ([3, 7], 0.9, True)
    assert asked(PAIR, "budget=tokens").comparison.amount == 0, "as the first method's pilot will measure"


def test_trials_have_the_overrides_that_are_theirs() -> None:
    tuning = asked(PAIR, "validation.evaluation.prompts.seed=5").comparison.tuning
    assert tuning is not None and "evaluation.prompts.seed=5" in tuning.overrides
    assert not any("2000000" in override for override in tuning.overrides)


def test_every_source_of_a_mixture_gets_other_problems() -> None:
    tuning = from_arguments(["methods=[full_reverse_kl,sft]", "experiment=two_teachers"]).comparison.tuning
    assert tuning is not None
    changed = [o for o in tuning.overrides if o.endswith("=2000000")]
    assert changed == [f"evaluation.prompts.sources.{task}.seed=2000000" for task in ("shop", "peak")]


FILE = ("prompts=dataset", "prompts.path=a.jsonl", "evaluation=dataset", "evaluation.prompts.path=b.jsonl")


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["methods=[sft]"], "one method alone is no comparison"),
        (["methods=[sft,stf]"], r"there is no method 'stf'; did you mean 'sft'\?"),
        (["methods=[sft,sft]"], "names a method twice"),
        ([PAIR, "budget=tokns"], "budget needs one of STEPS, TOKENS, FLOPS, CPU_S, got 'tokns'"),
        ([PAIR, "amount=1.5"], "no number of steps"),
        ([PAIR, "amount=-3"], "amount needs"),
        ([PAIR, "seeds=0"], "seeds needs"),
        ([PAIR, "seeds=[0,x]"], r"seeds.* needs"),
        ([PAIR, "seeds=[0,100]"], "seed 100 is that of the trials"),
        ([PAIR, "seed=1"], r"write seeds=3 or seeds=\[0,1,2\]"),
        ([PAIR, "method=gkd"], r"methods=\[A,B,\.\.\.\]"),
        ([PAIR, "target=90"], "target needs"),
        ([PAIR, "rates=[1,1]"], "same learning rate twice"),
        ([PAIR, "rates=[0,1]"], "rates"),
        ([PAIR, "sft.steps=9"], "a budget of its own"),
        ([PAIR, "stop_after.flops=9"], "a budget of its own"),
        ([PAIR, "evaluation.every=9"], "write evaluations=10"),
        ([PAIR, "reference=gkd"], "reference is 'gkd', but the arms are full_reverse_kl, sft"),
        ([PAIR, "sft.lerner.lr=1"], r"it is learner\.lr here"),
        ([PAIR, "resume=true"], "say which with run_name="),
        ([PAIR, *FILE], r"name another one with validation\.evaluation\.prompts\.path=FILE"),
        (["experiment=compare", PAIR], "leave one of the two out"),
        (["experiment=compare", "rates=[1]"], "its own arms"),
        (["gkd", "sft"], r"write methods=\[gkd,sft\]"),
        ([PAIR, "learner.lr=1e-4,1e-3"], r"rates=\[0\.5,1,2\], which multiply learner\.lr"),
        ([PAIR, "rates=1e-4,1e-3"], r"factors of learner\.lr, and every one is below 0\.05, as learning rates"),
        ([], r"opd compare needs methods=\[A,B,\.\.\.\]"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(arguments: list[str], refusal: str) -> None:
    with pytest.raises(ConfigurationError, match=refusal) as caught:
        from_arguments(arguments)
    assert "\n" not in str(caught.value)


def test_the_long_form_takes_the_same_words() -> None:
    short = from_arguments(["experiment=compare", "seeds=2", "budget=tokens", "amount=5e6", "target=0.5"]).comparison
    assert (list(short.seeds), short.budget, short.amount, short.target) == ([0, 1], Unit.TOKENS, 5e6, 0.5)
    assert list(short.arms) == ["opd", "sft", "grpo"] and short.tuning is not None


def test_a_method_whose_name_has_a_token_in_it_is_no_secret() -> None:
    given_ = ["compare", "grpo_token_mean.steps=9", "teacher.api_key=x", "my_token.value=x"]
    assert without_methods(given_) == ["compare", "steps=9", "teacher.api_key=x", "my_token.value=x"]
    refused = opd("compare", PAIR, "grpo_token_mean.teacher.api_key=geheim")
    assert refused.returncode == 2 and "has a secret in it" in refused.stderr and "geheim" not in refused.stderr


def test_help_names_the_budgets_and_every_word_of_the_command() -> None:
    said = opd("compare", "--help").stdout
    words = "methods= seeds= budget=steps|tokens|flops|cpu_s amount= rates= reference= target= evaluations= resume=true"
    for word in [*words.split(), "dry_run=true", "METHOD.KEY=VALUE", "validation.KEY=VALUE"]:
        assert word in said, word


def test_the_plan_counts_runs_and_steps(tmp_path: Path) -> None:
    done = opd("compare", "experiment=shop", PAIR, "steps=20", "dry_run=true", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "in all: 12 runs, 240 steps" in done.stdout and "estimate: at most" in done.stdout
    assert "trials of sft: learner.lr 0.0005, 0.001, 0.002, with seed 100" in done.stdout
    assert list(tmp_path.iterdir()) == []


# ---- the budget


@given(st.floats(1e-3, 1e12), st.floats(1e-3, 1e12))
def test_planned_steps_leave_room_and_no_more(amount: float, cost: float) -> None:
    steps, enough = planned_steps(amount, cost), max(1.0, amount / cost)
    assert (1 + ROOM) * enough * (1 - 1e-5) <= steps <= (1 + ROOM) * (enough + 1) + 1


def test_a_budget_of_steps_is_steps_and_of_anything_else_an_end() -> None:
    assert Budget(unit=Unit.STEPS, amount=40).overrides(1.0) == ["steps=40"]
    assert Budget(unit=Unit.STEPS, amount=0).overrides(1.0) == [], "every arm has its own"
    of_flops = run_config(["experiment=shop", *Budget(unit=Unit.FLOPS, amount=1e12).overrides(2e10)])
    assert of_flops.steps == 55 and of_flops.stop_after.amounts == {Unit.FLOPS: 1e12}


def test_the_first_step_does_not_count_where_there_are_more(tmp_path: Path) -> None:
    """It compiles and fills caches; `ended` makes it ten times as expensive."""
    runs = ended(tmp_path, {"five": 0.5}, steps=5) | ended(tmp_path, {"one": 0.5}, steps=1)
    assert cost_per_step(runs["five"], Unit.FLOPS) == 1e9
    assert cost_per_step(runs["one"], Unit.FLOPS) == 1e10


def test_steps_that_cost_nothing_are_no_budget(tmp_path: Path) -> None:
    runs = ended(tmp_path, {"free": 0.5}, flops=0.0)
    with pytest.raises(ConfigurationError, match="cost no flops; choose another budget"):
        cost_per_step(runs["free"], Unit.FLOPS)
    runs["free"].joinpath("metrics.jsonl").unlink()
    with pytest.raises(DataError, match="no step has a cost"):
        cost_per_step(runs["free"], Unit.FLOPS)


def test_an_estimate_is_an_upper_bound_by_the_same_accounting() -> None:
    """64 prompts of at most 24 tokens, 77 tokens of completion; 310 k and 600 k parameters."""
    plan = make_plan(run_config(["experiment=shop", "method=sft"]))
    most = at_most_per_step(plan)
    prompts = sum(len(p.student_ids) for p in plan.config.prompts(0, plan.sources))
    both = prompts + 64 * 77
    assert most[Unit.TOKENS] == 64 * 77 + both
    assert most[Unit.FLOPS] == both * (6 * plan.student_params + 2 * plan.teacher_params["default"])


def test_pilots_plan_trials_and_trials_plan_what_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are stand-ins: a step of sft costs half of one of full_reverse_kl, and in trials a tenth less than in
    pilots.
    """
    configs: dict[str, Any] = {}
    drawn: dict[str, Any] = {}

    def once(root: Path, plan: Any, _: Any) -> Path:
        name, config = plan.config.run_name, plan.config
        if name not in configs:
            configs[name] = config
            cost = (1e9 if name.startswith("sft") else 2e9) * (1.0 if "pilot" in name else 0.9)
            ended(root, {name: config.learner.lr * 100}, flops=cost)
        return root / name

    def draw(root: Path, runs: Any, goal: Any, console: Any, notes: Any) -> None:
        drawn.update(runs=runs, goal=goal, notes=notes)

    monkeypatch.setattr("launch.cli.compare.command.make_plan", quick_plan)
    monkeypatch.setattr("launch.cli.compare.shared_runs.run_once", once)
    monkeypatch.setattr("launch.cli.compare.command.write_comparison", draw)
    command = [
        "experiment=shop",
        PAIR,
        "seeds=2",
        "budget=flops",
        "amount=9e10",
        f"output_dir={tmp_path}",
        "run_name=x",
    ]
    assert compare_methods(command) == 0
    names = list(configs)
    assert names[:2] == ["full_reverse_kl_pilot-seed100", "sft_pilot-seed100"]
    assert configs["sft_pilot-seed100"].steps == 5 and not configs["sft_pilot-seed100"].stop_after.amounts
    trials, runs = names[2:8], names[8:]
    assert {configs[name].steps for name in trials} == {50, 99}
    assert runs == ["full_reverse_kl-seed0", "sft-seed0", "full_reverse_kl-seed1", "sft-seed1"]
    assert [configs[name].steps for name in runs[:2]] == [55, 110]
    assert all(configs[name].stop_after.amounts == {Unit.FLOPS: 9e10} for name in trials + runs)
    assert {configs[name].evaluation.parts for name in runs} == {10}
    assert {configs[name].evaluation.parts for name in trials} == {0}
    assert drawn["goal"].amount == 9e10 and len(drawn["runs"]) == 4
    assert any("planned with 110 steps" in note for note in drawn["notes"])
    assert sum("sweep is censored" in note for note in drawn["notes"]) == 2, "the largest rate was the best"

    drawn.clear()  # without an amount it is what the first method spends in its steps, by its pilot
    same = [o for o in command if not o.startswith(("amount", "run_name"))]
    configs.clear()
    assert compare_methods([*same, "steps=10", "run_name=y"]) == 0
    assert drawn["goal"].amount == 2e9 * 10


# ---- processes that share a comparison


def plan_of(root: Path, name: str, *more: str) -> Any:
    return quick_plan(run_config(["experiment=shop", f"run_name={name}", f"output_dir={root}", *more]))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of runs that were trained, by a stand-in that leaves what a finished run leaves."""
    names = list[str]()

    class Directory:
        def __init__(self, path: Path) -> None:
            self.path = path

    def train(plan: Any, _: Any) -> Directory:
        path = Path(plan.config.output_dir) / plan.config.run_name
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(plan.config.text)
        (path / "summary.json").write_text('{"outcome": "finished"}')
        names.append(path.name)
        return Directory(path)

    monkeypatch.setattr(shared_runs, "train_once", train)
    monkeypatch.setattr(shared_runs, "PAUSE_S", 0.01)
    return names


def test_a_finished_run_is_kept_and_one_with_other_settings_refused(tmp_path: Path, trained: list[str]) -> None:
    plan = plan_of(tmp_path, "a-seed0")
    assert run_once(tmp_path, plan, Console()) == run_once(tmp_path, plan, Console()) == tmp_path / "a-seed0"
    assert trained == ["a-seed0"]
    with pytest.raises(ConfigurationError, match="was finished with other settings"):
        run_once(tmp_path, plan_of(tmp_path, "a-seed0", "steps=7"), Console())
    unmeasured = plan_of(tmp_path, "a-seed0", "evaluation.on_start=false")
    assert run_once(tmp_path, unmeasured, Console()) == tmp_path / "a-seed0", "its end is the same"
    assert trained == ["a-seed0"]


@pytest.mark.parametrize("left", [None, '{"outcome": "failed"}'])
def test_what_a_killed_or_failed_run_left_is_moved_aside_and_run_again(
    tmp_path: Path, trained: list[str], left: str | None
) -> None:
    (tmp_path / "a-seed0").mkdir()
    if left:
        (tmp_path / "a-seed0" / "summary.json").write_text(left)
    assert run_once(tmp_path, plan_of(tmp_path, "a-seed0"), Console()) == tmp_path / "a-seed0"
    assert trained == ["a-seed0"] and len(list(tmp_path.glob("a-seed0.ended-*"))) == 1


def test_what_another_process_is_at_is_left_to_it(tmp_path: Path, trained: list[str]) -> None:
    """Another open file stands for another process: `flock` tells them apart by that."""
    (tmp_path / CLAIMS).mkdir()
    other = os.open(tmp_path / CLAIMS / "a-seed0", os.O_CREAT | os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert run_once(tmp_path, plan_of(tmp_path, "a-seed0"), Console()) is None
    os.close(other)  # as the system does for a process that was killed
    assert run_once(tmp_path, plan_of(tmp_path, "a-seed0"), Console()) is not None
    assert trained == ["a-seed0"]


def test_a_process_takes_what_is_free_and_waits_for_the_rest(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CLAIMS).mkdir()
    other = os.open(tmp_path / CLAIMS / "a-seed0", os.O_CREAT | os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    waited = list[float]()

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        assert trained == ["b-seed0"], "what is free comes first"
        os.close(other)

    monkeypatch.setattr(shared_runs, "sleep", sleep)
    plans = {name: [plan_of(tmp_path, f"{name}-seed0")] for name in ("a", "b")}
    assert [run.label for run in run_all(tmp_path, plans, Console())] == ["a", "b"]
    assert trained == ["b-seed0", "a-seed0"] and len(waited) == 1


def test_going_on_with_a_comparison_says_with_which(tmp_path: Path) -> None:
    (tmp_path / "comparison-20260101-000000").mkdir()
    command = ["experiment=compare_fixed_prompts", "comparison.resume=true", f"output_dir={tmp_path}"]
    with pytest.raises(ConfigurationError, match=r"say which with run_name=.*: comparison-20260101-000000\)"):
        run_comparison(command)
    assert run_comparison([*command, "run_name=again", "dry_run=true"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["comparison-20260101-000000"]


def test_a_comparison_that_was_begun_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cli.compare.command.make_plan", quick_plan)
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigurationError, match=r"exists and is never overwritten.*resume=true"):
        compare_methods(["experiment=shop", PAIR, "run_name=x", f"output_dir={tmp_path}"])


def test_of_two_processes_that_share_a_comparison_the_last_one_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that another process was at when its turn came, and that is finished when the others are, counts."""
    done, drawn = set[str](), list[Arm]()

    def once(root: Path, plan: Plan, _: Console) -> Path | None:
        if plan.config.run_name == "lock_step-seed0" and not done:
            return None
        done.add(plan.config.run_name)
        return root / plan.config.run_name

    monkeypatch.setattr("launch.cli.compare.command.make_plan", quick_plan)
    monkeypatch.setattr(shared_runs, "run_once", once)
    monkeypatch.setattr(shared_runs, "PAUSE_S", 0.01)
    monkeypatch.setattr("launch.cli.compare.command.write_comparison", lambda root, runs, *_: drawn.extend(runs))
    own = [f"output_dir={tmp_path}", "run_name=shared", "comparison.resume=true", "comparison.seeds=[0]"]
    assert run_comparison(["experiment=compare_staleness", *own]) == 0
    labels = ["lock_step", "staleness_1", "staleness_2", "staleness_1_deterministic"]
    assert [arm.label for arm in drawn] == labels and len(done) == len(labels)
