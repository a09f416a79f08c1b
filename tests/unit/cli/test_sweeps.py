"""`opd train -m`: the points of a sweep are Hydra's, all are planned first, and what is finished is not run again."""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launch.artifacts.run_directory import RunDirectory, append_json, check_name
from launch.artifacts.summary import Outcome
from launch.artifacts.sweep_record import SweepRecord
from launch.cli.compare import shared_runs
from launch.cli.sweep import command
from launch.cli.sweep.points import Point, points_of
from launch.cli.sweep.standing import Standing, standing
from launch.config.composition.compose import hydra_started
from launch.config.run_config import RunConfig, run_config
from launch.plan.plan import Plan
from launch.report import sweep_page
from launch.report.sweep_page import write_sweep
from launch.report.sweep_table import notes, read_sweep, tables
from opd.errors import ConfigurationError, OpdError
from tests.command import opd
from tests.unit.cli.test_tuning import sources
from tests.unit.monitors.test_comparison import point
from tests.unit.monitors.test_report import step_line, summary

# ---- points

WORDS = st.sampled_from(["LINEAR", "CONSTANT", "'a b'", "true", "a/b", "[1,2]"])
VALUES = st.one_of(st.integers(-9, 9).map(str), st.sampled_from(["1e-3", "0.25", "3E-4", "-0.5"]), WORDS)
SEVERAL = st.lists(VALUES, min_size=2, max_size=3, unique=True)
SWEPT = st.one_of(
    SEVERAL.map(",".join),
    SEVERAL.map(lambda values: f"choice({','.join(values)})"),
    st.lists(st.integers(-9, 9).map(str), min_size=2, max_size=3, unique=True).map(lambda v: f"sort({','.join(v)})"),
    st.tuples(st.integers(0, 3), st.integers(4, 6)).map(lambda ends: f"range({ends[0]},{ends[1]})"),
    st.tuples(st.integers(0, 3), st.sampled_from(["0.5", "0.25", "2"])).map(lambda r: f"range({r[0]},5,{r[1]})"),
)
KEYS = st.sampled_from(
    ["learner.lr", "+learner.beta", "++steps", "seed", "prompts@evaluation.prompts", "student.dtype"]
)
OVERRIDES = st.lists(
    st.one_of(
        st.tuples(KEYS, st.one_of(VALUES, SWEPT)).map("=".join),
        st.sampled_from(["method=glob(*)", "method=glob(gk*)", "method=glob([s*,t*],exclude=*d*)", "~tracker"]),
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def parser() -> OverridesParser:
    """Hydra's own, which knows the options of the groups."""
    with hydra_started(""):
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())


@cache
def written(override: str) -> str:
    """An override as Hydra writes it anew."""
    parsed = OverridesParser.create().parse_override(override)
    return f"{parsed.get_key_element()}={parsed.get_value_element_as_str()}"


@settings(max_examples=40)  # Hydra's grammar is slow
@given(OVERRIDES)
def test_points_are_those_of_hydra_s_own_sweeper(parser: OverridesParser, overrides: list[str]) -> None:
    parsed = parser.parse_overrides(overrides)
    theirs = BasicSweeper.split_arguments(parsed, None)[0]
    names = [one.key_or_group for one in {one.get_key_element(): one for one in parsed}.values()]
    assume(1 < len(theirs) <= 100 and len(set(names)) == len(names))
    ours = points_of(overrides)
    assert [[written(one) for one in found.overrides] for found in ours] == [list(map(written, one)) for one in theirs]
    assert len({found.name for found in ours}) == len(ours)


@given(st.lists(st.text(min_size=1, max_size=300), min_size=2, max_size=4, unique=True))
def test_names_are_names_of_runs_and_differ(values: list[str]) -> None:
    names = [Point(values={"student.path": value, "seed": "0"}, overrides=()).name for value in values]
    for name in names:
        check_name(name)
    assert len(set(names)) == len(names)


def test_names_say_what_varies() -> None:
    found = points_of(["experiment=shop", "learner.lr=1e-4,3e-4", "seed=range(0,2)", "steps=9"])
    assert [one.name for one in found] == [f"learner.lr={lr},seed={s}" for lr in ("0.0001", "0.0003") for s in (0, 1)]
    assert found[0].overrides == ("experiment=shop", "learner.lr=0.0001", "seed=0", "steps=9")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["steps=3"], "no override has several"),
        (["seed=0,0"], "two runs of this sweep would be the same, seed=0"),
        (["learner.lr=1e-4,0.0001"], "would be the same"),
        (["learner.lr=interval(0,1)"], "no values that can be counted"),
        (["seed=range(3,0)"], "has no value"),
        (["seed=range(0,3,0)"], "cannot be counted"),
        (["seed=range(0,1000000)"], "more than 1000 values"),
        (["seed=range(0,100)", "steps=range(1,100)"], "has 9900 runs"),
        (["method=glob(zzz*)"], "matches no option"),
        (["learner.lr=glob(*)"], "chooses among the options of a group"),
        (["run_name=a,b"], "run_name is the whole sweep's"),
        (["dry_run=true,false"], "dry_run is the whole sweep's"),
        (["seed=0,1", "hydra/launcher=joblib"], "starts its runs itself"),
        (["seed=0,1", "hydra.sweep.dir=x"], "starts its runs itself"),
        (["seed=0,1", "stages.a.steps=3"], "cannot be swept"),
        (["prompts=dataset", "prompts.path=a.jsonl", "prompts.system=Think first, then answer"], r"choice\(...\)"),
    ],
)
def test_what_is_no_sweep_is_refused_in_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        points_of(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["learner.lr=1e-4,3e-4", "seed=range(0,3)", "method=gkd,sft", "method=glob(g*)"])
def test_several_values_without_m_lead_to_it(override: str) -> None:
    with pytest.raises(ConfigurationError, match="opd train -m trains a run for each") as caught:
        run_config(["experiment=shop", override])
    assert "\n" not in str(caught.value)


# ---- runs; training is a stand-in that writes what a run leaves

GRID = ["learner.lr=1e-3,3e-3", "seed=0,1"]
NAMES = [f"learner.lr={lr},seed={seed}" for lr in ("0.001", "0.003") for seed in (0, 1)]


def quick(config: RunConfig) -> Plan:
    """A plan whose estimates are of no interest; a real one reads checkpoints for a second."""
    return Plan(
        config=config, sources=sources(config.student.path), student_params=1, teacher_params={"default": 1}, longest=9,
        vocabulary=9, exact_kl=True, answers={}, prompts={}, remarks=[],
    )  # fmt: skip


class Trainer:
    """Stand-in of training: what it was asked to train, and what happens to runs by their names."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.resumed: list[str] = []
        self.fate: dict[str, BaseException] = {}

    def __call__(self, plan: Plan, console: Any, *, whole: str = "") -> RunDirectory:
        config = plan.config
        name, path = config.run_name, Path(config.output_dir) / config.run_name
        directory = RunDirectory(path) if config.resume else RunDirectory.create(path.parent, name)
        directory.write_config(config.text)
        self.resumed += [name] if config.resume else []
        if (fate := self.fate.pop(name, None)) is not None:
            if isinstance(fate, OpdError):
                summary(name, Outcome.FAILED, error=str(fate)).write(directory)
            raise fate
        self.trained.append(name)
        append_json(directory.evaluations, point(0, 0.4).as_json())
        append_json(directory.evaluations, point(config.steps, 100 * config.learner.lr + 0.01 * config.seed).as_json())
        append_json(directory.metrics, step_line(config.steps))
        summary(name, notes=()).write(directory)
        return directory


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    one = Trainer()
    monkeypatch.setattr(command, "make_plan", quick)
    monkeypatch.setattr(command, "train_once", one)
    monkeypatch.setattr(sweep_page, "write_sweep", lambda root, console: None)  # which takes two seconds to draw
    return one


def sweep(root: Path, *more: str, grid: Sequence[str] = GRID) -> int:
    given_ = ["experiment=shop", "tracker=none", "steps=2", *grid, f"output_dir={root}", "run_name=lr", *more]
    return command.run_sweep(points_of(given_), given_)


def stamps(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_sweep_stopped_after_its_second_run_goes_on_and_repeats_nothing(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_page, "write_sweep", write_sweep)
    trainer.fate[NAMES[2]] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as stopped:
        sweep(tmp_path)
    assert "run_name=lr resume=latest goes on" in stopped.value.__notes__[0]
    assert trainer.trained == NAMES[:2] and not (tmp_path / "lr" / "sweep.md").exists()
    before = {path: at for name in NAMES[:2] for path, at in stamps(tmp_path / "lr" / name).items()}

    assert sweep(tmp_path, "resume=latest") == 0
    assert trainer.trained == NAMES, "each once"
    assert trainer.resumed == [NAMES[2]], "what had begun goes on"
    assert {path: at for name in NAMES[:2] for path, at in stamps(tmp_path / "lr" / name).items()} == before
    arms, runs = tables(read_sweep(tmp_path / "lr"))
    assert [list(row[:3]) for row in arms.rows] == [
        ["0.001", "2 of 2", "10.5 (10.0–11.0)"],
        ["0.003", "2 of 2", "30.5 (30.0–31.0)"],
    ]
    assert [row[:2] for row in runs.rows] == [["0.001", "0"], ["0.001", "1"], ["0.003", "0"], ["0.003", "1"]]
    for name in ("sweep.html", "sweep.png", "sweep.md", "sweep.json", "command.txt"):
        assert (tmp_path / "lr" / name).stat().st_size > 100, name
    written_ = json.loads((tmp_path / "lr" / "sweep.json").read_text())
    assert [run["state"] for run in written_["runs"]] == ["finished"] * 4

    for again in ("resume=latest", "resume=auto"):
        assert sweep(tmp_path, again) == 0 and trainer.trained == NAMES, "nothing is left to do"
    with pytest.raises(ConfigurationError, match=r"exists and is never overwritten.*resume=latest"):
        sweep(tmp_path)


def test_a_run_that_fails_costs_no_other_and_is_tried_again(tmp_path: Path, trainer: Trainer) -> None:
    trainer.fate[NAMES[1]] = OpdError("the loss is not finite; lower learner.lr")
    with pytest.raises(
        OpdError, match=r"1 of 4 runs of .*lr failed; learner\.lr=0\.001,seed=1: the loss is not finite"
    ):
        sweep(tmp_path)
    assert trainer.trained == [NAMES[0], *NAMES[2:]]
    found = read_sweep(tmp_path / "lr")
    assert any("Not finished: 1 of 4 runs, learner.lr=0.001,seed=1 (failed)" in note for note in notes(found))
    assert sweep(tmp_path, "resume=latest") == 0 and trainer.trained[3:] == [NAMES[1]]


def test_a_defect_ends_the_sweep(tmp_path: Path, trainer: Trainer) -> None:
    trainer.fate[NAMES[0]] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        sweep(tmp_path)
    assert trainer.trained == []


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (["learner.lr=1e-3,3e-3", "seed=0,x"], "run learner.lr=0.001,seed=x: seed needs a whole number"),
        (["learner.lr=1e-3,-1"], "run learner.lr=-1: learner.lr needs"),
        (["student.dtype=FLOAT32,FLOAT3"], r"run student.dtype=FLOAT3: student.dtype .*FLOAT32"),
    ],
)
def test_a_wrong_value_in_the_last_run_is_found_before_the_first(
    tmp_path: Path, trainer: Trainer, grid: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        sweep(tmp_path, grid=grid)
    assert trainer.trained == [] and list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_and_makes_nothing(tmp_path: Path) -> None:
    given_ = ["experiment=shop", "tracker=none", "steps=2", *GRID, f"output_dir={tmp_path}", "dry_run=true"]
    done = opd("train", "-m", *given_)
    assert done.returncode == 0, done.stderr
    assert all(f"{name}: new" in done.stdout for name in NAMES) and "to do: 4 runs, 8 steps; at most" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_values_may_be_added_and_one_table_has_all(tmp_path: Path, trainer: Trainer) -> None:
    sweep(tmp_path, grid=["learner.lr=1e-3,3e-3"])
    sweep(tmp_path, "resume=latest", grid=["learner.lr=1e-3,5e-3"])
    assert trainer.trained == ["learner.lr=0.001", "learner.lr=0.003", "learner.lr=0.005"]
    found = read_sweep(tmp_path / "lr")
    assert [row[0] for row in tables(found)[0].rows] == ["0.001", "0.003", "0.005"]
    assert "lr=0.005 ended best by accuracy at T=1 (50.0 %" in (said := notes(found)[0])
    assert "Its learner.lr is the largest that was tried" in said and "flatters it" in said


def test_runs_that_were_measured_otherwise_have_no_best(tmp_path: Path, trainer: Trainer) -> None:
    sweep(tmp_path, grid=["evaluation.max_tokens=9,12"])
    (said,) = notes(read_sweep(tmp_path / "lr"))
    assert said == "The runs were not measured alike (other evaluation.max_tokens), so none is called best."


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["evaluation.samples=3"], "has finished with evaluation.samples=4, but this command has evaluation.samples=3"),
        (
            ["max_tokens=70", "evaluation.max_tokens=77"],
            "has finished with .*max_tokens=77.* no checkpoint to go on from",
        ),
        (["steps=3"], "has finished with steps=2, this command has steps=3"),
    ],
)
def test_a_finished_run_is_not_taken_for_one_with_other_settings(
    tmp_path: Path, trainer: Trainer, more: list[str], sentence: str
) -> None:
    sweep(tmp_path)
    with pytest.raises(ConfigurationError, match=sentence):
        sweep(tmp_path, "resume=latest", *more)
    assert trainer.trained == NAMES


def test_what_trains_the_same_leaves_a_run_finished(tmp_path: Path, trainer: Trainer) -> None:
    sweep(tmp_path)
    sweep(
        tmp_path, "resume=latest", "cluster.cpus_per_actor=1", "student.replicas=2", "notes=[a]", "teacher.replicas=2"
    )
    assert trainer.trained == NAMES


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["resume=latest"], "there is no sweep .*lr to go on with"),
        (["resume=40"], "write resume=latest"),
        (["run_name=", "resume=latest"], "needs run_name="),
        (["experiment=compare"], "cannot be swept"),
    ],
)
def test_a_place_that_is_no_sweep_is_refused(tmp_path: Path, trainer: Trainer, more: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        sweep(tmp_path, *more)
    assert trainer.trained == []


def test_only_train_sweeps() -> None:
    refused = opd("eval", "-m", "seed=0,1")
    assert refused.returncode == 2 and "-m is for opd train" in refused.stderr


# ---- processes that share a sweep


def test_another_process_s_run_is_waited_for_and_its_failure_not_repeated(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another open file stands for another process: `flock` tells them apart by that."""
    claims = tmp_path / "lr" / ".claims"
    claims.mkdir(parents=True)
    SweepRecord(runs={name: {} for name in NAMES}).add_to(tmp_path / "lr")
    others = {name: os.open(claims / name, os.O_CREAT | os.O_RDWR) for name in NAMES[:2]}
    for handle in others.values():
        fcntl.flock(handle, fcntl.LOCK_EX)

    def sleep(seconds: float) -> None:
        assert trainer.trained == NAMES[2:], "what is free comes first"
        failed = RunDirectory.create(tmp_path / "lr", NAMES[0])
        failed.write_config("steps: 2\n")
        summary(NAMES[0], Outcome.FAILED, error="the teacher is gone").write(failed)
        for handle in others.values():  # as the system does for a process that ended, or was killed
            os.close(handle)

    monkeypatch.setattr(shared_runs, "sleep", sleep)
    with pytest.raises(OpdError, match=r"1 of 4 runs .* learner\.lr=0\.001,seed=0: the teacher is gone"):
        sweep(tmp_path, "resume=latest")
    assert trainer.trained == [*NAMES[2:], NAMES[1]], "the one that was killed is taken over"


# ---- where a run of a sweep stands


def test_standing_of_a_run(tmp_path: Path, trainer: Trainer) -> None:
    sweep(tmp_path)
    path = tmp_path / "lr" / NAMES[0]
    config = run_config(["experiment=shop", "tracker=none", "steps=2", "learner.lr=1e-3", "seed=0"])
    assert standing(path, config).standing is Standing.FINISHED
    assert (
        standing(path, replace(config, text=config.text.replace("steps: 2", "steps: 4"))).standing is Standing.STOPPED
    )
    assert standing(tmp_path / "none", config).standing is Standing.NEW
    (path / "summary.json").unlink()
    assert str(standing(path, config)) == "goes on"


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_run_has_a_row_and_belongs_to_one_arm(
    tmp_path_factory: pytest.TempPathFactory, rates: int, seeds: int, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("sweep")
    runs = {
        f"lr={lr},seed={seed}": {"learner.lr": str(lr), "seed": str(seed)}
        for lr, seed in itertools.product(range(rates), range(seeds))
    }
    SweepRecord(runs=runs).add_to(root)
    for name in runs:
        if data.draw(st.booleans()):
            directory = RunDirectory.create(root, name)
            directory.write_config("steps: 2\n")
            if data.draw(st.booleans()):
                append_json(directory.evaluations, point(2, data.draw(st.sampled_from([None, 0.0, 0.5]))).as_json())
            if data.draw(st.booleans()):
                summary(name).write(directory)
    found = read_sweep(root)
    assert len(tables(found)[-1].rows) == len(runs)
    assert sorted(run.name for arm in found.arms for run in arm.runs) == sorted(runs)
    assert len(found.arms) == (rates if rates > 1 or seeds == 1 else 1)
    assert all(
        len(set(map(len, cells.rows))) == 1 and len(cells.rows[0]) == len(cells.columns) for cells in tables(found)
    )
    notes(found)
    shutil.rmtree(root)
