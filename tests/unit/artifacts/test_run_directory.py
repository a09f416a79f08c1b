"""The run directory: exclusive, whole lines only, nothing half-written, no secret in it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.redaction import HIDDEN, redacted
from launch.artifacts.run_directory import (
    RunDirectory,
    append_json,
    read_jsonl,
    run_of,
    write_bytes,
    write_json,
    write_text,
)
from launch.artifacts.summary import Outcome, RunSummary
from opd.errors import ConfigurationError, DataError, OpdError
from tests.fault_matrix import Witness


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "first")
    made.write_config("steps: 3\n")
    return made


class FullDisk:
    """`os.write` on a disk with room for `room` more bytes; each call writes at most `most`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, most: int = 1 << 20) -> None:
        self._room, self._most, self._write = room, most, os.write
        self.refused = 0
        monkeypatch.setattr(os, "write", self)

    def __call__(self, handle: int, data: memoryview) -> int:
        if self._room <= 0:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(handle, data[: min(self._room, self._most)])
        self._room -= written
        return written


def summary(**changes: object) -> RunSummary:
    point = EvaluationPoint(
        step=0, greedy=0.43, mean_at_k=0.3, pass_at_k=None, k=4, reverse_kl=None, length_mean=50.0,
        truncation_rate=0.0, seconds=2.0, tokens=0, flops=0.0, cpu_s=0.0,
    )  # fmt: skip
    values: dict = {
        "run_name": "first", "method": "opd", "outcome": Outcome.FINISHED, "steps": 3, "seed": 0,
        "wall_s": 9.0, "ready_s": 1.0, "first_step_s": 2.0, "cpu_s": 8.0, "tokens": 100, "flops": 1e9,
        "student_start": point, "student_end": point, "teacher": None, "facts": {"student": "tiny"},
        "ledger": {"issued": 3}, "versions": {"torch": "2"}, "notes": ("a note",),
        "alerts": ("step 4: look",),
    }  # fmt: skip
    return RunSummary(**{**values, **changes})


def test_a_new_run_has_its_places(directory: RunDirectory) -> None:
    assert directory.name == "first"
    assert directory.checkpoints.is_dir()
    assert directory.export.is_dir()
    assert not directory.summary.exists()
    assert RunDirectory.open(directory.path) == directory


def test_an_existing_run_is_never_overwritten(directory: RunDirectory) -> None:
    append_json(directory.metrics, {"step": 1})
    with pytest.raises(ConfigurationError, match=r"never overwritten; choose another run_name="):
        RunDirectory.create(directory.path.parent, "first")
    assert read_jsonl(directory.metrics) == [{"step": 1}]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/abs", ".hidden", "-x", "a b", "a\n"])
def test_a_name_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="run_name needs letters"):
        RunDirectory.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_what_is_no_run_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is no run directory \(it has no config.yaml\); .* e\.g\. runs/<run"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize("place", ["export", "checkpoints/step_2", "config.yaml"])
def test_what_lies_in_a_run_leads_to_it(tmp_path: Path, place: str) -> None:
    run = RunDirectory.create(tmp_path, "first")
    run.write_config("seed: 0\n")
    (run.checkpoints / "step_2").mkdir()
    with pytest.raises(ConfigurationError, match=rf"is no run directory .*; it is part of one: give {run.path}$"):
        RunDirectory.open(run.path / place)
    assert run_of(run.path / place) == run.path == run_of(run.path)


@pytest.mark.parametrize("place", ["", "nope"])
def test_a_folder_of_runs_or_a_name_in_it_leads_to_those_there_are(tmp_path: Path, place: str) -> None:
    for name in ("first", "second"):
        RunDirectory.create(tmp_path, name).write_config("seed: 0\n")
        os.utime(tmp_path / name / "config.yaml", (1, 1 + len(name)))
    with pytest.raises(ConfigurationError, match=rf"give the path of one \({tmp_path} has second, first\)"):
        RunDirectory.open(tmp_path / place)


def test_a_root_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OpdError, match=r"cannot be made \(Not a directory\); nothing was started"):
        RunDirectory.create(tmp_path / "file" / "runs", "first")


def test_secrets_are_not_stored(directory: RunDirectory) -> None:
    directory.write_config(
        "hf_token: abc\nteacher:\n  api_key: def\n  url: https://me:ghi@host/v1\n"
        "  headers:\n    - password: jkl\n"
        "max_tokens: 77\ntokens_per_microbatch: 4096\ntokenizer: words\nempty_token: ''\nnotes: [fine]\n"
        "learner: {tokens_per_microbatch: AUTO}\nhub_token: AUTO\n"
    )
    text = directory.config.read_text()
    assert not any(secret in text for secret in ("abc", "def", "ghi", "jkl"))
    kept = yaml.safe_load(text)
    assert (kept["max_tokens"], kept["tokens_per_microbatch"], kept["tokenizer"]) == (77, 4096, "words")
    assert (kept["notes"], kept["empty_token"]) == (["fine"], "")
    assert kept["learner"] == {"tokens_per_microbatch": "AUTO"} and kept["hub_token"] == HIDDEN


def test_redaction_reaches_every_shape() -> None:
    tree = {"client_secret": 5, "auth_tokens": ["a"], "token": {"value": "b"}, "x": [{"HF_TOKEN": "c"}]}
    assert redacted(tree) == {
        "client_secret": HIDDEN, "auth_tokens": HIDDEN, "token": HIDDEN, "x": [{"HF_TOKEN": HIDDEN}],
    }  # fmt: skip


def test_lines_come_back_and_what_is_no_number_is_null(directory: RunDirectory) -> None:
    append_json(directory.metrics, {"step": 1, "loss": 0.5, "text": "a\u2028b\n"})
    append_json(directory.metrics, {"step": 2, "loss": float("nan"), "more": [float("inf"), 1.0]})
    assert read_jsonl(directory.metrics) == [
        {"step": 1, "loss": 0.5, "text": "a\u2028b\n"},
        {"step": 2, "loss": None, "more": [None, 1.0]},
    ]
    assert read_jsonl(directory.evaluations) == []


def test_a_line_cut_off_by_a_crash_does_not_count_and_is_written_over(directory: RunDirectory) -> None:
    append_json(directory.metrics, {"step": 1})
    with directory.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_jsonl(directory.metrics) == [{"step": 1}]
    append_json(directory.metrics, {"step": 2})
    assert directory.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_line_is_named(directory: RunDirectory) -> None:
    directory.metrics.write_text('{"step": 1}\n{"st\n')
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl"):
        read_jsonl(directory.metrics)


def test_a_long_line_cut_off_is_found_from_the_end(directory: RunDirectory) -> None:
    append_json(directory.metrics, {"step": 1})
    with directory.metrics.open("a") as file:
        file.write("x" * 200_000)  # more than the block in which the last line's end is looked for
    append_json(directory.metrics, {"step": 2})
    assert [line["step"] for line in read_jsonl(directory.metrics)] == [1, 2]


def test_rewinding_forgets_what_will_be_written_again(directory: RunDirectory) -> None:
    for step in range(1, 6):
        append_json(directory.metrics, {"step": step})
        append_json(directory.samples, {"step": step})
    summary().write(directory)
    directory.rewind(3, 10)
    assert [line["step"] for line in read_jsonl(directory.metrics)] == [1, 2, 3]
    assert [line["step"] for line in read_jsonl(directory.samples)] == [1, 2, 3]
    assert not directory.summary.exists()


def test_a_summary_comes_back(directory: RunDirectory) -> None:
    written = summary(flops=float("nan"))
    written.write(directory)
    assert json.loads(directory.summary.read_text())["flops"] is None
    again = RunSummary.read(directory.summary)
    assert again.student_start == written.student_start
    assert (again.teacher, again.outcome, again.notes) == (None, Outcome.FINISHED, ("a note",))
    assert again.alerts == ("step 4: look",)


def test_a_foreign_summary_is_refused(directory: RunDirectory) -> None:
    directory.summary.write_text('{"outcome": "finished"}')
    with pytest.raises(DataError, match="is no run summary"):
        RunSummary.read(directory.summary)


@pytest.mark.faults("disk full elsewhere")
@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_full_disk_takes_back_the_line(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, room: int, witness: Witness
) -> None:
    append_json(directory.metrics, {"step": 1})
    disk = FullDisk(monkeypatch, room)
    with pytest.raises(OpdError, match="No space left on device") as caught:
        append_json(directory.metrics, {"step": 2})
    witness("disk full elsewhere", disk.refused)
    assert str(caught.value).count("\n") == 0
    assert directory.metrics.read_text() == '{"step": 1}\n'


@pytest.mark.faults("disk full elsewhere")
@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_leaves_the_old_file(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, room: int, witness: Witness
) -> None:
    summary().write(directory)
    before = directory.summary.read_bytes()
    disk = FullDisk(monkeypatch, room)
    with pytest.raises(OpdError, match=r"cannot write .*summary\.json: No space left"):
        summary(steps=4).write(directory)
    witness("disk full elsewhere", disk.refused)
    assert directory.summary.read_bytes() == before
    assert not list(directory.path.glob(".*.part"))


def test_a_full_disk_leaves_no_first_summary(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)  # some filesystems notice only now
    with pytest.raises(OpdError, match="No space left"):
        summary().write(directory)
    assert not directory.summary.exists()
    assert not list(directory.path.glob(".*.part"))


def test_a_disk_that_takes_a_byte_at_a_time_gets_everything(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, room=10_000, most=1)
    append_json(directory.metrics, {"step": 1})
    write_text(directory.report, "page")
    write_bytes(directory.curves, b"\x89PNG")
    assert read_jsonl(directory.metrics) == [{"step": 1}]
    assert (directory.report.read_text(), directory.curves.read_bytes()) == ("page", b"\x89PNG")


@pytest.mark.faults("disk full elsewhere")
def test_a_real_limit_of_the_system_is_one_sentence(directory: RunDirectory, witness: Witness) -> None:
    """The kernel itself refuses to let a file grow: nothing is simulated."""
    write_json(directory.summary, {"old": True})
    program = f"""
import resource
from pathlib import Path
from launch.artifacts.run_directory import append_json, write_json
from opd.errors import OpdError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path({str(directory.path)!r})
for write in (lambda: write_json(folder / "summary.json", {{"new": "x" * 3000}}),
              lambda: [append_json(folder / "metrics.jsonl", {{"step": i, "x": "y" * 90}})
                       for i in range(50)]):
    try:
        write()
    except OpdError as error:
        print(error)
"""
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert [("summary" in line, "File too large" in line) for line in result.stdout.splitlines()] == [
        (True, True), (False, True),
    ]  # fmt: skip
    witness("disk full elsewhere", 2)
    assert json.loads(directory.summary.read_text()) == {"old": True}
    assert directory.metrics.read_bytes().endswith(b"\n")
    kept = [line["step"] for line in read_jsonl(directory.metrics)]
    assert 0 < len(kept) < 50
    assert kept == list(range(len(kept)))
