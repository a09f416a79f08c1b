"""The order of a run's last phases, on a session that only notes what it is asked."""

import asyncio
import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.summary import Outcome
from launch.checkpoint.resume import way_on
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from launch.run.run import Run
from launch.services.signals import StopRequest
from learner.checkpoints import checkpoint
from opd.errors import DataError

PLAN = make_plan(run_config(["experiment=shop", "steps=6", "tracker=none", "doctor=false", "run_name=a"]))


class Learner:
    """Writes small files."""

    def __init__(self, told: list[str]) -> None:
        self.told, self._folder = told, Path()

    async def save(self, directory: Path, step: int) -> None:
        self.told.append(f"save {step}")
        self._folder = directory

    async def written(self) -> dict[str, str]:
        (self._folder / "rank_0.safetensors").write_bytes(b"weights")
        return {"rank_0.safetensors": checkpoint.digest(self._folder / "rank_0.safetensors")}

    async def kept(self, directory: Path) -> None: ...

    async def settle(self) -> None: ...

    async def export(self, directory: Path) -> None:
        self.told.append("export")
        (directory / "config.json").write_text("{}")


class Broken:
    """Measures the student before the first step, and fails after the last."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.teachers = told, ("default",)

    async def student(self, step: int, spent: Any, **_: Any) -> Any:
        self.told.append(f"student {step}")
        if step:
            raise DataError("the grader is gone")
        yield SimpleNamespace(as_json=lambda: {"step": 0}, step=0, set="", truncation_rate=0.0)

    async def teacher(self, writers: Any) -> Any:
        raise AssertionError("no engine could be made, so nobody asks")


def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_after: int = 0
) -> tuple[Run, list[str], RunDirectory]:
    told = list[str]()
    learner = Learner(told)

    async def no_room(name: str) -> Any:
        told.append(f"writer of {name}")
        raise OSError("no GPU is left")

    session = SimpleNamespace(
        learner=learner, followers={}, engines=SimpleNamespace(student=None), faults=[], close=lambda: None,
        teacher_writer=no_room,
    )  # fmt: skip

    async def opened(*_: Any) -> Any:
        return session

    async def train(*arguments: Any, **_: Any) -> None:
        for step in range(1, 7):
            for observer in (arguments[5][0], arguments[5][-1]):
                await observer(SimpleNamespace(step=step, live=True, ledger={}))
            if step == failing_after:
                raise DataError("row 33 is too long")

    monkeypatch.setattr("launch.run.run.open_session", opened)
    monkeypatch.setattr("launch.run.run.train", train)
    monkeypatch.setattr("launch.run.run.make_evaluator", lambda *_: Broken(told))
    monkeypatch.setattr(Run, "_trackers", lambda *_: [])
    monkeypatch.setattr("launch.run.run.fingerprints", lambda _: {})
    directory = RunDirectory.create(tmp_path, "a")
    directory.write_config("seed: 0")
    run = Run(PLAN, directory, Console(file=StringIO(), width=300), StopRequest(1.0), None)
    return run, told, directory


def test_the_export_comes_before_what_may_fail_and_that_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told, directory = play(tmp_path, monkeypatch)
    asyncio.run(run.everything())
    assert told == ["student 0", "save 6", "export", "student 6", "writer of default"]
    assert CheckpointStore(directory.checkpoints).steps() == [6] and run.exported
    alerts = run.summary(Outcome.FINISHED, "").alerts
    assert "last evaluation failed: the grader is gone" in alerts[0] and "no GPU is left" in alerts[1]
    assert all("trained and exported all the same" in alert for alert in alerts)


def test_an_error_after_step_five_leaves_its_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told, directory = play(tmp_path, monkeypatch, failing_after=5)
    with pytest.raises(DataError, match="row 33"):
        asyncio.run(run.everything())
    assert told == ["student 0", "save 5"] and not run.exported
    state = json.loads((directory.checkpoints / "step_5" / "state.json").read_text())
    assert state["step"] == 5 and "step 5 is kept in" in way_on(directory)
