"""Files of a run that somebody else has written: one sentence each, soon, and nothing outside the run is read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from launch.artifacts.checkpoint_state import MANIFEST, STATE
from launch.artifacts.checkpoint_store import CheckpointStore, verified_state
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.run_lock import LOCK, check_not_running, is_over
from launch.artifacts.untrusted_files import read_json, read_yaml
from launch.cli.compare.shared_runs import finished_with
from learner.checkpoints import checkpoint
from opd.errors import DataError, OpdError
from tests.fuzz.run_files import BOMB, SETTINGS, STEP, fuzz, make_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("foreign"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_slice_of_the_fuzz() -> None:
    """`python -m tests.fuzz.run_files` is the whole."""
    tally = fuzz(40, 11)
    assert not tally.findings and tally.outcomes["refused"] > 10 and tally.outcomes["understood"] > 100


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the state of the checkpoint, its digest included."""
    place = run / "checkpoints" / f"step_{STEP}"
    state, manifest = (json.loads((place / name).read_text()) for name in (STATE, MANIFEST))
    change(state)
    (place / STATE).write_text(json.dumps(state))
    manifest["files"][STATE] = checkpoint.digest(place / STATE)
    (place / MANIFEST).write_text(json.dumps(manifest))
    return place


@pytest.mark.parametrize("file", ["../../../../secret", "/etc/passwd", "default", "learner/../../x", ""])
def test_a_follower_s_weights_are_a_file_of_the_checkpoint(run: Path, file: str) -> None:
    place = edit(run, lambda state: state["followers"].update(default=file))
    with pytest.raises(DataError, match="which is no file of the checkpoint"):
        verified_state(place)
    with pytest.raises(OpdError, match="no checkpoint to go on from"):
        CheckpointStore(place.parent).newest_whole()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "learner/../../x", ""])
def test_a_manifest_lists_files_below_it(run: Path, name: str) -> None:
    place = run / "checkpoints" / f"step_{STEP}"
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"][name] = "ab"
    (place / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=re.escape(f"lists {name!r}, which is no file of this checkpoint")):
        verified_state(place)


@pytest.mark.parametrize(
    ("field", "value"),
    [("totals", {"tokens": 10**400}), ("wall_s", 10**400), ("wall_s", -1), ("step", "2"), ("followers", [1]),
     ("teachers", {"default": 7}), ("ledger", "{}"), ("totals", None)],
)  # fmt: skip
def test_a_state_of_other_types_or_huge_numbers_is_skipped(run: Path, field: str, value: Any) -> None:
    place = edit(run, lambda state: state.update({field: value}))
    with pytest.raises(DataError, match="take another checkpoint"):
        verified_state(place)


def test_bombs_and_depth_take_no_time(run: Path) -> None:
    began = perf_counter()
    (run / "config.yaml").write_text(BOMB)
    with pytest.raises(DataError, match="aliases that stand for more than"):
        finished_with(run, SETTINGS)
    for text, words in (
        ("a: [" * 3000, "nested too deeply"),
        ("x" * (2 << 20), "more than any"),
        ("- 1", "no mapping"),
    ):
        (run / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=words):
            read_yaml(run / "config.yaml", "choose another")
    (run / "summary.json").write_text('{"a":' * 100_000)
    with pytest.raises(DataError, match="nested too deep"):
        RunData.read(RunDirectory(run))
    with pytest.raises(DataError, match="more than a run writes"):
        read_json(run / "summary.json", "remove it", most=1000)
    assert perf_counter() - began < 20


LINES = ['{"step": "1"}', '{"step": 1e400}', "[" * 5000, '{"loss": 1}', '{"step": 1, "a": "\\ud83d"}']


@pytest.mark.parametrize("line", LINES)
def test_a_foreign_line_is_named_with_its_file(run: Path, line: str) -> None:
    (run / "metrics.jsonl").write_text(f"{line}\n")
    for read in (lambda: RunData.read(RunDirectory(run)), lambda: RunDirectory(run).rewind(1, 4)):
        with pytest.raises(DataError, match=r"metrics\.jsonl"):
            read()


NOTES = ["", "[]", '{"pid": 1e999, "started": 0, "host": "x"}', "[" * 5000, "\x00", '{"host": 5}']


@pytest.mark.parametrize("note", NOTES)
def test_a_foreign_note_of_a_running_process_holds_nobody_up(run: Path, note: str) -> None:
    (run / LOCK).write_text(note)
    check_not_running(run)
    assert is_over(run) in (True, False)
