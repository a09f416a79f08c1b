"""`opd runs`, `opd show` and `opd report`: runs that were made, looked at, compared and deleted."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.run_lock import check_not_running
from launch.report.comparison import Arm, Goal
from launch.report.run_list import COLUMNS, RunLine, StepView, differing, run_lines, step_view
from opd.errors import ConfigurationError

FOLDER = "runs"
_SHOWN = 12  # differing settings that are named
_VERBS = "opd runs lists, opd runs compare A B ... compares, opd runs delete A ... deletes"


def manage_runs(arguments: Sequence[str], own: Mapping[str, str], console: Console) -> int:
    """`opd runs [compare|delete RUN ...]`: returns the exit code."""
    root = Path(own.get("output_dir", FOLDER))
    verb, names = (arguments[0], arguments[1:]) if arguments else ("", [])
    if wrong := next((name for name in arguments if "=" in name), None):
        raise ConfigurationError(f"opd runs takes output_dir=DIR, output=DIR and yes=true, got {wrong}; leave it out")
    match verb:
        case "":
            _list(root, console)
        case "compare":
            _compare([_place(name, root) for name in names], Path(own.get("output", root / "comparison")), console)
        case "delete":
            _delete([_place(name, root) for name in names], own.get("yes", "") == "true", console)
        case _:
            raise ConfigurationError(f"opd runs has no {verb!r}: {_VERBS}")
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
    """`opd report RUN`: the page of a run, also of one that goes on."""
    from launch.report.report import write_report  # matplotlib takes a second

    directory = RunDirectory.open(_place(run, Path(root or FOLDER)))
    write_report(directory)
    console.print(f"report: {directory.report}", soft_wrap=True)
    return 0


def _place(name: str, root: Path) -> Path:
    """Directory of a run by its path, or by its name in `root`."""
    found = next((path for path in (root / name, Path(name)) if (path / "config.yaml").is_file()), None)
    if found is None:
        have = [line.path.name for line in run_lines(root)][:8]
        raise ConfigurationError(f"there is no run {name!r} in {root} (newest: {', '.join(have) or 'none'})")
    return found


def _list(root: Path, console: Console) -> None:
    lines = run_lines(root)
    if not lines:
        console.print(f"no runs in {root}", soft_wrap=True)
        return
    console.print(_table(lines))


def _table(lines: Sequence[RunLine]) -> Table:
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
    if len(set(labels)) < len(labels):
        raise ConfigurationError(f"two of the runs have the same name ({', '.join(labels)}); rename one")
    output.mkdir(parents=True, exist_ok=True)
    arms = [Arm(label=path.name, seed=0, directory=path) for path in paths]
    apart = differing(paths)
    notes = [f"Made one by one, not as a comparison. They differ in: {', '.join(apart[:_SHOWN]) or 'nothing'}."]
    notes += [f"... and in {len(apart) - _SHOWN} more settings."] if len(apart) > _SHOWN else []
    write_comparison(output, arms, Goal(reference=labels[-1]), console, notes)


def _delete(paths: Sequence[Path], sure: bool, console: Console) -> None:
    if not paths:
        raise ConfigurationError(f"nothing was named to delete; {_VERBS}")
    for path in paths:
        check_not_running(path)
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
