"""`opd runs`, `opd show`, `opd report`: what directories say is shown, and only what was named is deleted."""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from rich.console import Console

from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.run_lock import running
from launch.artifacts.sweep_record import SweepRecord
from launch.cli.main import main
from launch.cli.runs import manage_runs, show_step, write_again
from launch.report.run_list import run_lines
from opd.errors import ConfigurationError, OpdError
from tests.unit.monitors.test_report import EVIL, finished


def said(root: Path, *arguments: str, **own: str) -> str:
    """Output of `opd runs` on a wide terminal."""
    out = io.StringIO()
    manage_runs(list(arguments), {"output_dir": str(root), **own}, Console(file=out, width=200, markup=False))
    return out.getvalue()


def make(root: Path, *names: str) -> list[RunDirectory]:
    """Directories of finished runs that differ in their learning rates."""
    made = [finished(root, name) for name in names]
    for rate, directory in enumerate(made, 1):
        text = f"run_name: {directory.name}\nsteps: 20\nmethod:\n  name: gkd\nlearner:\n  lr: {rate}.0e-3\n"
        directory.write_config(text)
    return made


def held_by_another(run: RunDirectory) -> AbstractContextManager[None]:
    """Hold a run's directory as another process would: locks of files tell open files apart, and not processes."""
    return running(run.path)


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    _, killed, damaged = make(tmp_path, "whole", "killed", "damaged")
    killed.summary.unlink()
    damaged.metrics.write_text("{\n{}\n")
    (tmp_path / "no_run").mkdir()
    states = {line.path.name: line.state for line in run_lines(tmp_path)}
    assert (
        states["whole"] == "finished" and states["killed"] == "killed" and set(states) == {"whole", "killed", "damaged"}
    )
    assert "damaged" in states["damaged"] or "metrics" in states["damaged"]
    with held_by_another(killed):
        assert {line.path.name: line.state for line in run_lines(tmp_path)}["killed"] == "running"
    text = said(tmp_path)
    assert re.search(r"whole +finished +gkd +20 ", text) and "no_run" not in text
    assert "no runs in" in said(tmp_path / "no_run")


def test_runs_are_compared_and_say_in_what_they_differ(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    text = said(tmp_path, "compare", "a", str(tmp_path / "b"), output=str(tmp_path / "page"))
    assert "They differ in: learner.lr." in text and (tmp_path / "page" / "comparison.html").is_file()
    with pytest.raises(ConfigurationError, match="two runs at least, got 1"):
        said(tmp_path, "compare", "a")


def make_sweep(root: Path) -> list[RunDirectory]:
    """A sweep of four runs, of which two have begun, beside a run."""
    (root / "lr").mkdir()
    names = [f"learner.lr={rate},seed={seed}" for rate in ("1", "2") for seed in (0, 1)]
    SweepRecord(runs={name: {"learner.lr": name[11], "seed": name[-1]} for name in names}).add_to(root / "lr")
    one, other = make(root / "lr", *names[:2])
    other.summary.unlink()
    return [*make(root, "alone"), one, other]


def test_a_sweep_is_a_line_and_its_runs_are_found(tmp_path: Path) -> None:
    _, one, other = make_sweep(tmp_path)
    text = said(tmp_path)
    assert re.search(r"lr/ +sweep, 1 of 4 finished, 1 killed +gkd", text) and "seed=0" not in text and "alone" in text
    inside = said(tmp_path, "lr")
    assert one.name in inside and other.name in inside and "alone" not in inside
    assert one.name in said(tmp_path, str(tmp_path / "lr")), "by its path as well"
    with pytest.raises(ConfigurationError, match=r"lr holds several runs; name one, e\.g\. lr/learner\.lr="):
        show_step("lr", "", str(tmp_path), Console(file=io.StringIO()))
    out = io.StringIO()
    show_step(f"lr/{one.name}", "10", str(tmp_path), Console(file=out, width=200, markup=False))
    assert "step 10" in out.getvalue()


def test_a_sweep_is_compared_reported_and_deleted_as_a_whole(tmp_path: Path) -> None:
    alone, one, other = make_sweep(tmp_path)
    assert "They differ in: learner.lr." in said(tmp_path, "compare", "lr", output=str(tmp_path / "page"))
    write_again("lr", str(tmp_path), Console(file=io.StringIO()))
    assert "Not finished: 3 of 4 runs" in (tmp_path / "lr" / "sweep.md").read_text()
    with held_by_another(other), pytest.raises(ConfigurationError, match="is still running"):
        said(tmp_path, "delete", "lr", yes="true")
    said(tmp_path, "delete", f"lr/{one.name}", yes="true")
    assert not one.path.exists() and other.path.exists()
    said(tmp_path, "delete", "lr", yes="true")
    assert not (tmp_path / "lr").exists() and alone.path.exists()


def test_only_what_was_named_is_deleted_and_only_when_sure(tmp_path: Path) -> None:
    a, b, c = make(tmp_path, "a", "b", "c")
    with pytest.raises(ConfigurationError, match=r"would delete .*a, .*b with checkpoints.*yes=true"):
        said(tmp_path, "delete", "a", "b")
    with held_by_another(b), pytest.raises(ConfigurationError, match="is still running"):
        said(tmp_path, "delete", "a", "b", yes="true")
    assert a.path.exists() and b.path.exists()
    said(tmp_path, "delete", "a", "b", yes="true")
    assert not a.path.exists() and not b.path.exists() and c.path.exists()
    (tmp_path / "mine").mkdir()  # no run: nothing of it may go
    with pytest.raises(ConfigurationError, match="there is no run 'mine'"):
        said(tmp_path, "delete", "mine", yes="true")
    assert (tmp_path / "mine").exists()


def test_a_step_is_shown_with_what_was_kept_of_it(tmp_path: Path) -> None:
    make(tmp_path, "a")
    out = io.StringIO()
    console = Console(file=out, width=200, markup=False)
    show_step("a", "10", str(tmp_path), console)
    assert (
        "a, step 10" in out.getvalue() and EVIL in out.getvalue() and re.search(r"actor/loss +0\.04\b", out.getvalue())
    )
    with pytest.raises(OpdError, match="has no step 21; it has 1 to 20"):
        show_step("a", "21", str(tmp_path), console)
    with pytest.raises(ConfigurationError, match="step=last is no step"):
        show_step("a", "last", str(tmp_path), console)


def test_a_report_is_written_again(tmp_path: Path) -> None:
    (run,) = make(tmp_path, "a")
    write_again(str(run.path), "", Console(file=io.StringIO()))
    assert run.report.read_text().startswith("<!")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["runs", "lsit"], "opd runs has no 'lsit'"),
        (["runs", "steps=3"], "got steps=3"),
        (["show"], "opd show needs one run"),
        (["report", "a", "b"], "opd report needs one run"),
        (["show", "nothing"], "there is no run 'nothing' in runs"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    arguments: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err.replace("\n", " ")
