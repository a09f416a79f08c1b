"""Runs of a folder, a line each, and one for each sweep; and one step of a run: its numbers and kept completions."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from time import localtime, strftime
from typing import Any

import yaml

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.run_lock import is_over
from launch.artifacts.samples import Sample
from launch.artifacts.summary import Outcome
from launch.artifacts.sweep_record import SweepRecord, is_sweep
from launch.artifacts.user_yaml import dotted
from launch.report.figures import short_number
from opd.errors import DataError

NOTHING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """A run in a list. `state` is its outcome, "running", "killed" (no summary and no process), or what cannot be read.

    `accuracy` is the sampled one before training and of the newest evaluation, None where there is none.
    """

    path: Path
    state: str
    method: str
    steps: int
    accuracy: tuple[float | None, float | None]
    reverse_kl: float | None
    changed: float
    readable: bool = True

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        first, last = (NOTHING if value is None else f"{100 * value:.1f}" for value in self.accuracy)
        return (
            self.path.name,
            self.state,
            self.method or NOTHING,
            str(self.steps),
            NOTHING if self.accuracy[1] is None else f"{first} → {last} %",
            NOTHING if self.reverse_kl is None else short_number(self.reverse_kl),
            strftime("%Y-%m-%d %H:%M", localtime(self.changed)),
        )


COLUMNS = ("run", "state", "method", "steps", "accuracy at T=1", "reverse KL", "last written")


class Kind(Enum):
    """Kind of several runs in one folder."""

    SWEEP = "sweep"
    COMPARISON = "comparison"
    STAGES = "stages"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLine:
    """Several runs of one command in a list; `planned` is the number of runs that there will be, as far as is known."""

    path: Path
    kind: Kind
    runs: Sequence[RunLine]
    planned: int

    @property
    def changed(self) -> float:
        """Time of the newest line or file of its runs."""
        return max((run.changed for run in self.runs), default=self.path.stat().st_mtime)

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text: how many runs are finished, and the best figures among their ends."""
        states = Counter(run.state for run in self.runs if run.readable)
        done = states.pop(Outcome.FINISHED.value, 0)
        others = "".join(f", {count} {state}" for state, count in states.items())
        methods = list(dict.fromkeys(run.method for run in self.runs if run.method))
        accuracies = [run.accuracy[1] for run in self.runs if run.accuracy[1] is not None]
        divergences = [run.reverse_kl for run in self.runs if run.reverse_kl is not None]
        return (
            f"{self.path.name}/",
            f"{self.kind.value}, {done} of {self.planned} finished{others}",
            methods[0] if len(methods) == 1 else f"{len(methods)} methods" if methods else NOTHING,
            NOTHING,
            f"best {100 * max(accuracies):.1f} %" if accuracies else NOTHING,
            f"least {short_number(min(divergences))}" if divergences else NOTHING,
            strftime("%Y-%m-%d %H:%M", localtime(self.changed)),
        )


def run_lines(folder: Path) -> list[RunLine]:
    """The runs in a folder, those last written to first."""
    places = [path.parent for path in folder.glob("*/config.yaml")]
    return sorted((run_line(path) for path in places), key=lambda line: (-line.changed, line.path.name))


def folder_line(path: Path) -> FolderLine | None:
    """The sweep, the comparison or the run with stages in a folder; None if it is none."""
    if (path / "config.yaml").exists():
        return None
    runs = [line for line in run_lines(path) if not _ASIDE.search(line.path.name)]
    if is_sweep(path):
        planned = len(SweepRecord.read(path).runs)
    elif any((path / name).exists() for name in ("comparison.json", ".claims", "stages.json")):
        planned = len(runs)
    else:
        return None
    kind = Kind.SWEEP if is_sweep(path) else Kind.STAGES if (path / "stages.json").exists() else Kind.COMPARISON
    return FolderLine(path=path, kind=kind, runs=runs, planned=planned)


_ASIDE = re.compile(r"\.(ended|begun)-\d{8}-\d{6}$")  # what a run left that was run again


def listing(folder: Path) -> list[RunLine | FolderLine]:
    """The runs in a folder, and a line for each sweep, comparison and run with stages; those last written to first."""
    several = [line for path in folder.glob("*/") if (line := folder_line(path)) is not None]
    return sorted([*run_lines(folder), *several], key=lambda line: (-line.changed, line.path.name))


def run_line(path: Path) -> RunLine:
    """A run as far as its files can be read."""
    directory = RunDirectory(path)
    changed = max(f.stat().st_mtime for f in (directory.config, directory.metrics, directory.summary) if f.exists())
    try:
        data = RunData.read(directory)
    except DataError as error:
        damaged = f"cannot be read: {error}"
        return RunLine(
            path=path,
            state=damaged,
            method="",
            steps=0,
            accuracy=(None, None),
            reverse_kl=None,
            changed=changed,
            readable=False,
        )
    measured = [point for point in data.student if point.mean_at_k is not None]
    start = data.before_training
    ends = (start.mean_at_k if start else None, measured[-1].mean_at_k if measured else None)
    return RunLine(
        path=path,
        state=_state(data, path),
        method=str((settings_of(data.config).get("method.name")) or ""),
        steps=int(data.metrics[-1]["step"] or 0) if data.metrics else 0,
        accuracy=ends,
        reverse_kl=data.student[-1].reverse_kl if data.student else None,
        changed=changed,
    )


def settings_of(text: str) -> Mapping[str, Any]:
    """Settings of a resolved configuration (YAML) by their dotted names."""
    return dict(dotted(yaml.safe_load(text) or {}))


def differing(paths: Sequence[Path]) -> list[str]:
    """Names of the settings in which runs differ, their own names and places apart."""
    found = [settings_of(RunData.read(RunDirectory.open(path)).config) for path in paths]
    names = dict.fromkeys(name for one in found for name in one)
    return [n for n in names if n not in _OWN and any(one.get(n) != found[0].get(n) for one in found)]


_OWN = ("run_name", "output_dir", "resume", "dry_run")


def _state(data: RunData, path: Path) -> str:
    if data.summary is not None:
        return data.summary.outcome.value
    return "killed" if is_over(path) else "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """A step of a run: its metrics, the evaluations after it if there were any, and the completions that were kept."""

    step: int
    metrics: Mapping[str, float | None]
    evaluations: Sequence[EvaluationPoint]
    samples: Sequence[Sample]


def step_view(path: Path, step: int | None) -> StepView:
    """A step of the run in `path`; None is the last one.

    Raises:
        DataError: the run has no such step.
    """
    data = RunData.read(RunDirectory.open(path))
    steps = [int(line["step"] or 0) for line in data.metrics]
    if not steps:
        raise DataError(f"{path} has no finished step; look again when it has")
    at = steps[-1] if step is None else step
    if at not in steps:
        raise DataError(f"{path} has no step {at}; it has {steps[0]} to {steps[-1]}")
    newest = {name: [point for point in of if point.step == at][-1:] for name, of in data.by_set.items()}
    return StepView(
        step=at,
        metrics={name: value for name, value in data.metrics[steps.index(at)].items() if name != "step"},
        evaluations=[point for points in newest.values() for point in points],
        samples=[sample for sample in data.samples if sample.step == at],
    )
