"""A report ends with commands that can be copied, whatever became of the run."""

import json
import shlex
from pathlib import Path

import pytest

from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.summary import Outcome
from launch.artifacts.tracker_runs import remember_run
from launch.report.next_steps import next_steps, next_steps_text
from launch.report.report import write_report
from tests.unit.monitors.test_report import Page, summary

GIVEN = ["experiment=shop", "learner.lr=1e-3", "notes=['a b']", "run_name=first", "seed=3", "teacher.api_key=geheim"]


def run(root: Path, *left: str) -> RunDirectory:
    """A run that left an `export`, a `checkpoint` of step 7, offline `wandb` files."""
    directory = RunDirectory.create(root, "first")
    directory.write_config("steps: 20\n")
    directory.write_command([*GIVEN, "resume=latest", f"output_dir={root}"])
    if "export" in left:
        (directory.export / "config.json").write_text("{}")
    if "checkpoint" in left:
        store = CheckpointStore(directory.checkpoints)
        store.path(7).mkdir()
        (store.path(7) / "MANIFEST.json").write_text(json.dumps({}))
    if "wandb" in left:
        (directory.path / "wandb" / "offline-run-1-a").mkdir(parents=True)
    return directory


def commands(directory: RunDirectory, outcome: Outcome | None) -> list[list[str]]:
    """What the report tells, as a shell would read it."""
    if outcome is not None:
        summary("first", outcome, seed=3).write(directory)
    write_report(directory)
    text = Page(directory.report).text
    steps = next_steps(directory, summary("first", outcome, seed=3) if outcome else None)
    assert all(step.what in text and step.command in text for step in steps)
    assert ("What to do next" in text) == bool(steps)
    return [shlex.split(step.command) for step in steps]


def test_a_finished_run_is_measured_copied_repeated_compared_and_sent(tmp_path: Path) -> None:
    directory = run(tmp_path, "export", "checkpoint", "wandb")
    measure, copy, again, compare, look, send = commands(directory, Outcome.FINISHED)
    hidden = "teacher.api_key=<redacted>"
    shared = ["experiment=shop", "learner.lr=1e-3", "notes=['a b']", hidden]
    assert measure == ["opd", "eval", f"checkpoint={directory.export}", *shared]
    assert copy == ["opd", "export", f"run={directory.path}", "output=FOLDER"]
    assert again == ["opd", "train", *shared, "seed=4"]
    assert compare == ["opd", "compare", "methods=[full_reverse_kl,sft]", *shared, "dry_run=true"]
    offline = str(directory.path / "wandb" / "offline-run-1-a")
    assert (look, send) == (["wandb", "leet", offline], ["wandb", "sync", offline])
    assert f"send it to wandb: wandb sync {offline}" in next_steps_text(directory)


def test_trackers_of_the_run_are_looked_at(tmp_path: Path) -> None:
    directory = run(tmp_path)
    remember_run(directory, "tensorboard", {"folder": "tensorboard"})
    remember_run(directory, "mlflow", {"uri": "sqlite:////tmp/a b/mlflow.db", "run_id": "0"})
    *_, board, flow = commands(directory, Outcome.FINISHED)
    assert board == ["tensorboard", "--logdir", str(tmp_path)]
    assert flow == ["mlflow", "ui", "--backend-store-uri", "sqlite:////tmp/a b/mlflow.db"]
    for login in ("", "user:***@"):
        remember_run(directory, "mlflow", {"uri": f"https://{login}tracking/ml", "experiment_id": "1", "run_id": "0"})
        assert commands(directory, Outcome.FINISHED)[-1] == ["https://tracking/ml/#/experiments/1/runs/0"]


@pytest.mark.parametrize("outcome", [Outcome.STOPPED, Outcome.FAILED, None])
def test_a_run_that_did_not_finish_goes_on_under_its_name(tmp_path: Path, outcome: Outcome | None) -> None:
    directory = run(tmp_path, "checkpoint")
    on, made = commands(directory, outcome)
    shared = ["experiment=shop", "learner.lr=1e-3", "notes=['a b']", "seed=3", "teacher.api_key=<redacted>"]
    assert on == ["opd", "train", *shared, f"output_dir={tmp_path}", "run_name=first", "resume=latest"]
    assert made == ["opd", "export", f"run={directory.path}", "step=7", "output=FOLDER"]


def test_where_nothing_is_left_nothing_is_proposed(tmp_path: Path) -> None:
    assert commands(run(tmp_path), Outcome.FAILED) == []


def test_a_run_of_an_older_version_has_commands_without_its_overrides(tmp_path: Path) -> None:
    directory = run(tmp_path, "export")
    directory.command.unlink()
    assert commands(directory, Outcome.FINISHED)[0] == ["opd", "eval", f"checkpoint={directory.export}"]


def test_no_secret_is_written_down(tmp_path: Path) -> None:
    directory = run(tmp_path, "export")
    commands(directory, Outcome.FINISHED)
    assert "geheim" not in directory.command.read_text() + directory.report.read_text()
