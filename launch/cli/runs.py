"""`opd runs`, `opd show` and `opd report`: runs that were made, looked at, compared and deleted."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.artifacts.run_directory import RunDirectory, run_of
from launch.artifacts.run_lock import check_not_running
from launch.artifacts.sweep_record import is_sweep
from launch.report.comparison import Arm, Goal
from launch.report.run_list import (
    COLUMNS,
    FolderLine,
    RunLine,
    StepView,
    differing,
    folder_line,
    listing,
    run_lines,
    step_view,
)
from opd.errors import ConfigurationError

FOLDER = "runs"
_SHOWN = 12  # differing settings that are named
_VERBS = (
    "opd runs lists, opd runs SWEEP those of a sweep, opd runs compare A B ... compares, opd runs delete A ... deletes"
)


def manage_runs(arguments: Sequence[str], own: Mapping[str, str], console: Console) -> int:
    """`opd runs [SWEEP | compare|delete RUN ...]`: returns the exit code."""
    root = Path(own.get("output_dir", FOLDER))
    verb, names = (arguments[0], arguments[1:]) if arguments else ("", [])
    if wrong := next((name for name in arguments if "=" in name and not is_there(name, root)), None):
        raise ConfigurationError(f"opd runs takes output_dir=DIR, output=DIR and yes=true, got {wrong}; leave it out")
    match verb:
        case "":
            _list(root, console)
        case "compare":
            _compare(
                [path for name in names for path in _places(name, root)],
                Path(own.get("output", root / "comparison")),
                console,
            )
        case "delete":
            _delete(
                [_folder(name, root) or _place(name, root) for name in names], own.get("yes", "") == "true", console
            )
        case _:
            several = None if names else _folder(verb, root)
            if several is None:
                raise ConfigurationError(f"opd runs has no {verb!r}; write one of these: {_VERBS}")
            _list(several, console)
    return 0


def show_step(run: str, step: str, root: str, console: Console) -> int:
    """`opd show RUN [step=N]`: the numbers and completions of a step, the last one by default."""
    if step and not step.isdecimal():
        raise ConfigurationError(f"step={step} is no step; give its number, e.g. step=40")
    path = _place(run, Path(root or FOLDER))
    view = step_view(path, int(step) if step else None)
    console.print(_metrics(path.name, view))
    for sample in view.samples:
        for name, text in (("prompt", sample.prompt), ("completion", sample.text), ("answer", sample.answer)):
            console.print(f"{name:10} {text}", soft_wrap=True)
        reward = "not graded" if sample.reward is None else f"{sample.reward:g}"
        console.print(f"{'reward':10} {reward}; {sample.length} tokens, ended by {sample.stop}\n", soft_wrap=True)
    return 0


def write_again(run: str, root: str, console: Console) -> int:
    """`opd report RUN`: the page of a run or a sweep, also of one that goes on."""
    from launch.report.report import write_report  # matplotlib takes a second
    from launch.report.sweep_page import write_sweep

    several = _folder(run, Path(root or FOLDER))
    if several is not None and is_sweep(several):
        write_sweep(several, console)
        return 0
    directory = RunDirectory.open(_place(run, Path(root or FOLDER)))
    write_report(directory)
    console.print(f"report: {directory.report}", soft_wrap=True)
    return 0


def _place(name: str, root: Path) -> Path:
    """Directory of a run by its path, or by its name in `root` (`SWEEP/RUN` for one of a sweep)."""
    found = next((path for path in (root / name, Path(name)) if (path / "config.yaml").is_file()), None)
    if found is not None:
        return found
    if (several := _folder(name, root)) is not None:
        one = next((f"{name}/{line.path.name}" for line in run_lines(several)), "")
        raise ConfigurationError(
            f"{several} holds several runs; name one{f', e.g. {one}' if one else ''} (opd runs {name} lists them)"
        )
    if Path(name).exists() and (run := run_of(Path(name))) is not None:
        raise ConfigurationError(f"{name} is part of a run, and none; give {run}")
    have = [line.path.name for line in listing(root)][:8]
    raise ConfigurationError(
        f"there is no run {name!r} in {root} (newest: {', '.join(have) or 'none'}); "
        "name one, or the folder of runs by output_dir=DIR"
    )


def is_there(name: str, root: Path) -> bool:
    """Whether a word is a directory or the name of one, although it may have a `=`, as runs of sweeps do."""
    return (root / name).is_dir() or Path(name).is_dir()


def _folder(name: str, root: Path) -> Path | None:
    """Directory of a sweep, a comparison or a run with stages, by its path or its name; None if it is none."""
    return next((path for path in (root / name, Path(name)) if path.is_dir() and folder_line(path)), None)


def _places(name: str, root: Path) -> list[Path]:
    """A run, or all runs of a sweep, a comparison or a run with stages."""
    several = _folder(name, root)
    line = folder_line(several) if several is not None else None
    return [_place(name, root)] if line is None else sorted(run.path for run in line.runs)


def _list(root: Path, console: Console) -> None:
    lines = listing(root)
    if not lines:
        console.print(f"no runs in {root}", soft_wrap=True)
        return
    console.print(_table(lines))


def _table(lines: Sequence[RunLine | FolderLine]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        table.add_column(column, no_wrap=column == "run", overflow="fold")
    for line in lines:
        table.add_row(*line.cells)
    return table


def _compare(paths: Sequence[Path], output: Path, console: Console) -> None:
    if len(paths) < 2:
        raise ConfigurationError(f"a comparison needs two runs at least, got {len(paths)}; {_VERBS}")
    from launch.report.comparison_page import write_comparison  # matplotlib takes a second

    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):  # as of two sweeps over the same values
        labels = [f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(f"two of the runs have the same name ({', '.join(labels)}); rename one")
    output.mkdir(parents=True, exist_ok=True)
    arms = [Arm(label=label, seed=0, directory=path) for label, path in zip(labels, paths, strict=True)]
    apart = differing(paths)
    notes = [f"Made one by one, not as a comparison. They differ in: {', '.join(apart[:_SHOWN]) or 'nothing'}."]
    notes += [f"... and in {len(apart) - _SHOWN} more settings."] if len(apart) > _SHOWN else []
    write_comparison(output, arms, Goal(reference=labels[-1]), console, notes)


def _delete(paths: Sequence[Path], sure: bool, console: Console) -> None:
    if not paths:
        raise ConfigurationError(f"nothing was named to delete; {_VERBS}")
    for path in paths:
        for run in (path, *(line.path for line in run_lines(path))):
            check_not_running(run)
    if not sure:
        raise ConfigurationError(
            f"this would delete {', '.join(map(str, paths))} with checkpoints and students, for good; add yes=true"
        )
    for path in paths:
        shutil.rmtree(path)
        console.print(f"deleted {path}", soft_wrap=True)


def _metrics(name: str, view: StepView) -> Table:
    table = Table(title=f"{name}, step {view.step}", box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    shown = {f"eval/{key}": value for point in view.evaluations for key, value in point.tracked().items()}
    for key, value in {**view.metrics, **shown}.items():
        table.add_row(key, "–" if value is None else f"{value:.6g}")
    return table
