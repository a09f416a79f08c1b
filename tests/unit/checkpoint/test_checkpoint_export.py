"""What `opd export` and `opd eval` make of a run and of its checkpoints: names, refusals, and where to look."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from launch.artifacts.checkpoint_state import DriverState, described
from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.run_directory import RunDirectory
from launch.config.run_config import run_config
from launch.plan.checks.devices import resolved
from launch.run import export
from launch.run.export import as_model, export_run, origin_of
from learner.checkpoints import checkpoint
from opd.errors import ConfigurationError, DataError
from opd.loop.ledger import Ledger
from opd.settings.devices import Dtype

STUDENT = "assets/shop/student"


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    adapted = ["experiment=shop", "learner.lora.r=4", "learner.lora.target_modules=[q_proj,v_proj]"]
    return described(resolved(run_config(adapted)))


@pytest.fixture
def run(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run with checkpoints of steps 2 and 4; what is exported is noted, and not built."""
    directory = RunDirectory.create(tmp_path / "runs", "a")
    directory.write_config("seed: 0")
    store = CheckpointStore(directory.checkpoints)
    for step in (2, 4):
        (store.begin(step) / "learner").mkdir()
        state = DriverState(
            run_name="a", step=step, ledger=Ledger().to_json(), totals={}, wall_s=1.0, teachers={}, config=settings
        )
        store.commit(state, {})

    def noted(shards: Path, origin: Any, target: Path) -> None:
        assert not logging.is_progress_bar_enabled(), "bars of a library on the screen"
        assert os.environ["DS_ACCELERATOR"] == "cpu", "DeepSpeed will warn that it has found no GPU"
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"from": shards.parent.name, "student": origin.student}))

    monkeypatch.setattr("learner.checkpoints.merge.export_checkpoint", noted)
    monkeypatch.setenv("DS_ACCELERATOR", "")  # and back to what it was
    monkeypatch.delenv("DS_ACCELERATOR")
    logging.enable_progress_bar()
    monkeypatch.setattr(export, "check_checkpoint", lambda path, role: None)
    monkeypatch.chdir(tmp_path)
    return directory


def made_from(folder: str | Path) -> str:
    return json.loads((Path(folder) / "config.json").read_text())["from"]


@pytest.mark.parametrize(
    ("named", "step", "expected"),
    [
        ("a", "", "step_4"),
        ("a", "2", "step_2"),
        ("runs/a", "4", "step_4"),
        ("runs/a/checkpoints/step_2", "", "step_2"),
    ],
)
def test_a_run_is_named_by_its_name_or_place(run: RunDirectory, named: str, step: str, expected: str) -> None:
    assert export_run(named, "out", step) == "out" and made_from("out") == expected
    assert "run" in Path("out/README.md").read_text()
    with pytest.raises(ConfigurationError, match="exists and is never overwritten"):
        export_run(named, "out", step)


def test_the_newest_whole_checkpoint_stands_for_a_run_without_an_export(run: RunDirectory) -> None:
    (run.checkpoints / "step_4" / "state.json").write_text("{}")
    export_run("a", "out")
    assert made_from("out") == "step_2"
    with pytest.raises(DataError, match="is damaged"):
        export_run("a", "other", "4")
    (run.export / "config.json").write_text('{"from": "the end"}')
    export_run("a", "finished")
    assert made_from("finished") == "the end"


def test_what_is_evaluated_is_put_together_for_as_long_as_it_takes(run: RunDirectory) -> None:
    with as_model("runs/a/checkpoints/step_2") as folder:
        assert made_from(folder) == "step_2"
    assert not Path(folder).exists()
    with as_model("runs/a") as folder:
        assert made_from(folder) == "step_4"
    (run.export / "config.json").write_text("{}")
    for given, used in (("runs/a", "runs/a/export"), ("somewhere", "somewhere")):
        with as_model(given) as folder:
            assert folder == used


@pytest.mark.parametrize("step", ["3", "x", "-1", "latest", "99999999999999999999"])
def test_a_step_that_is_not_there_is_one_sentence(run: RunDirectory, step: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no checkpoint of step .* \(have: 4, 2\)"):
        export_run("a", "out", step)


def test_a_run_that_is_not_there_is_one_sentence(run: RunDirectory) -> None:
    with pytest.raises(ConfigurationError, match="is no run directory"):
        export_run("b", "out")


def test_where_a_checkpoint_comes_from_is_in_it(settings: dict[str, Any]) -> None:
    origin = origin_of(settings)
    assert (origin.lora.r, tuple(origin.lora.target_modules)) == (4, ("q_proj", "v_proj"))
    assert origin.student.endswith(STUDENT) and origin.dtype is Dtype.FLOAT32
    assert origin_of(settings, "elsewhere").student == "elsewhere"
    for name in ("student.path", "learner.dtype", "learner.lora.r", "seed"):
        with pytest.raises(DataError, match="does not say what it was trained from"):
            origin_of({k: v for k, v in settings.items() if k != name})
    with pytest.raises(DataError, match="does not say"):
        origin_of(settings | {"learner.dtype": "FLOAT8"})


def test_a_checkpoint_is_started_whole(tmp_path: Path) -> None:
    """The helper that the export shares with checkpoints leaves nothing half done behind."""
    checkpoint.start(tmp_path / "x")
    assert not (tmp_path / "x").exists()
