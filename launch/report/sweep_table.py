"""The runs of a sweep side by side: their values, how they ended, and which ended best."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.summary import Outcome
from launch.artifacts.sweep_record import SweepRecord
from launch.report.comparison_table import Cells
from launch.report.figures import short_number
from launch.report.run_list import NOTHING, run_line, settings_of

_LONGEST = 24  # letters of a name beside a line of a picture
SEED = "seed"  # runs that differ in it alone are one arm
Figure = Callable[[EvaluationPoint], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun:
    """One run: its values of the settings that vary, its state as in a list of runs, and its evaluations.

    `measure` has the settings of these by their names, for figures compare where they are the same.
    """

    name: str
    values: Mapping[str, str]
    state: str
    steps: int = 0
    points: tuple[EvaluationPoint, ...] = ()
    teacher: EvaluationPoint | None = None
    notes: tuple[str, ...] = ()
    measure: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """It has trained to its end."""
        return self.state == Outcome.FINISHED.value

    def last(self, figure: Figure) -> float | None:
        """The newest measurement of a figure."""
        return next((value for point in reversed(self.points) if (value := figure(point)) is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepArm:
    """Runs that differ in their seed alone, by their common values. `number` counts from 1 in the order planned."""

    number: int
    label: str
    values: Mapping[str, str]
    runs: tuple[SweepRun, ...]

    def ends(self, figure: Figure) -> list[float]:
        """A figure at the end of every finished run."""
        found = (run.last(figure) for run in self.runs if run.finished)
        return [value for value in found if value is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All runs of a sweep, in the order in which they were planned."""

    name: str
    runs: tuple[SweepRun, ...]

    @property
    def keys(self) -> list[str]:
        """The settings that vary, the seed apart."""
        named = [key for key in dict.fromkeys(key for run in self.runs for key in run.values) if key != SEED]
        several = [key for key in named if len({run.values.get(key) for run in self.runs}) > 1]
        return several or ([] if self.seeded else named)

    @property
    def seeded(self) -> bool:
        """Seeds vary."""
        return len({run.values.get(SEED) for run in self.runs}) > 1

    @property
    def settings(self) -> list[str]:
        """All settings that vary."""
        return [*self.keys, *([SEED] if self.seeded else [])]

    @property
    def short(self) -> Mapping[str, str]:
        """For every setting its last word, where that is no other's."""
        last = [key.rpartition(".")[2] for key in self.keys]
        return {key: word if last.count(word) == 1 else key for key, word in zip(self.keys, last, strict=True)}

    @property
    def arms(self) -> list[SweepArm]:
        """Runs by their values, the seed apart."""
        found: dict[tuple[tuple[str, str], ...], list[SweepRun]] = {}
        for run in self.runs:
            found.setdefault(tuple((key, run.values[key]) for key in self.keys if key in run.values), []).append(run)
        short = self.short
        return [
            SweepArm(
                number=number,
                label=", ".join(f"{short[k]}={v}" for k, v in values) or "all seeds",
                values=dict(values),
                runs=tuple(runs),
            )
            for number, (values, runs) in enumerate(found.items(), start=1)
        ]

    @property
    def numbered(self) -> bool:
        """The names are too long for a picture, so that it has numbers, which are those of the tables."""
        return any(len(arm.label) > _LONGEST for arm in self.arms)

    @property
    def apart(self) -> list[str]:
        """Settings in which the evaluations of the runs differ."""
        known = [run.measure for run in self.runs if run.measure]
        names = dict.fromkeys(name for one in known for name in one)
        return [name for name in names if any(one.get(name) != known[0].get(name) for one in known)]

    @property
    def teacher(self) -> EvaluationPoint | None:
        """The teacher's figures, if a run measured them."""
        return next((run.teacher for run in self.runs if run.teacher is not None), None)

    @property
    def ranked(self) -> list[SweepArm]:
        """Arms that can be judged, best first: by accuracy at T=1, or by the reverse KL where there is none."""
        judged = [arm for arm in self.arms if arm.ends(accuracy)]
        if judged:
            return sorted(judged, key=lambda arm: -float(np.mean(arm.ends(accuracy))))
        judged = [arm for arm in self.arms if arm.ends(divergence)]
        return sorted(judged, key=lambda arm: float(np.mean(arm.ends(divergence))))


def accuracy(point: EvaluationPoint) -> float | None:
    """Accuracy of samples at temperature 1."""
    return point.mean_at_k


def divergence(point: EvaluationPoint) -> float | None:
    """Reverse KL to the teacher."""
    return point.reverse_kl


def read_sweep(root: Path) -> Sweep:
    """The sweep in a directory, as far as it got. Raises `DataError` if it is none."""
    record = SweepRecord.read(root)
    return Sweep(name=root.name, runs=tuple(_read(root / name, values) for name, values in record.runs.items()))


def _read(path: Path, values: Mapping[str, str]) -> SweepRun:
    if not (path / "config.yaml").is_file():
        return SweepRun(name=path.name, values=values, state="not begun")
    line = run_line(path)
    if not line.readable:
        return SweepRun(name=path.name, values=values, state=line.state)
    data = RunData.read(RunDirectory(path))
    return SweepRun(
        name=path.name,
        values=values,
        state=line.state,
        steps=line.steps,
        points=tuple(data.student),
        teacher=data.teacher,
        notes=data.summary.notes if data.summary else (),
        measure={name: value for name, value in settings_of(data.config).items() if _MEASURE.fullmatch(name)},
    )


# Those say when, and whether the teacher as well.
_MEASURE = re.compile(r"evaluation\.(?!every$|parts$|on_start$|teacher$).*")


# --- tables ---------------------------------------------------------------------------------------------------------

_FIGURES: Mapping[str, tuple[Figure, Callable[[float], str]]] = {
    "T=1": (accuracy, lambda value: f"{100 * value:.1f}"),
    "greedy": (lambda point: point.greedy, lambda value: f"{100 * value:.1f}"),
    "KL": (divergence, lambda value: f"{value:.2g}"),
    "tokens": (lambda point: float(point.tokens), short_number),
    "CPU s": (lambda point: point.cpu_s, lambda value: f"{value:.0f}"),
}
NUMBER = "no."
_NOTE = (
    "At the end of each run. T=1, greedy: accuracy in percent, of samples at temperature 1 and of greedy answers. KL: "
    "reverse KL to the teacher, nats per token. tokens: of completions. CPU s: of training, without start-up and "
    "evaluations."
)


def tables(sweep: Sweep) -> list[Cells]:
    """A row for every arm where seeds vary, and a row for every run."""
    return [*([_arms_table(sweep)] if sweep.seeded else []), _runs_table(sweep)]


def _arms_table(sweep: Sweep) -> Cells:
    rows = [
        [
            *([str(arm.number)] if sweep.numbered else []),
            *(arm.values.get(key, NOTHING) for key in sweep.keys),
            f"{sum(run.finished for run in arm.runs)} of {len(arm.runs)}",
            *(_ends(arm.ends(figure), written, ranged=figure is accuracy) for figure, written in _FIGURES.values()),
        ]
        for arm in sweep.arms
    ]
    return Cells(
        title=f"sweep {sweep.name}, seeds together",
        note=f"Means over the seeds that have finished, of T=1 in brackets the least and the greatest. {_NOTE}",
        columns=[*([NUMBER] if sweep.numbered else []), *sweep.short.values(), "finished", *_FIGURES],
        rows=rows,
        whole=_whole(1 + len(sweep.keys) + sweep.numbered),
    )


def _runs_table(sweep: Sweep) -> Cells:
    """A row for every run; states and steps where they are not the same for all."""
    told = {"state": [run.state for run in sweep.runs], "steps": [str(run.steps) for run in sweep.runs]}
    apart = {name: cells for name, cells in told.items() if len(set(cells)) > 1}
    alike = [f"{name}: {cells[0]}" for name, cells in told.items() if name not in apart and cells]
    numbers = {run.name: str(arm.number) for arm in sweep.arms for run in arm.runs}
    rows = [
        [
            *([numbers[run.name]] if sweep.numbered else []),
            *(run.values.get(key, NOTHING) for key in sweep.settings),
            *(cells[i] for cells in apart.values()),
            *(_cell(run.last(figure), written) for figure, written in _FIGURES.values()),
        ]
        for i, run in enumerate(sweep.runs)
    ]
    return Cells(
        title=f"sweep {sweep.name}, every run" + (f" ({', '.join(alike)})" if alike else ""),
        note=_NOTE,
        columns=[
            *([NUMBER] if sweep.numbered else []),
            *(sweep.short.get(key, key) for key in sweep.settings),
            *apart,
            *_FIGURES,
        ],
        rows=rows,
        whole=_whole(len(sweep.settings) + len(apart) + sweep.numbered),
    )


def _whole(before: int) -> range:
    """Columns of figures, which stand behind so many others."""
    return range(before, before + len(_FIGURES))


def _cell(value: float | None, written: Callable[[float], str]) -> str:
    return NOTHING if value is None else written(value)


def _ends(values: Sequence[float], written: Callable[[float], str], *, ranged: bool) -> str:
    if not values:
        return NOTHING
    mean, low, high = written(float(np.mean(values))), written(min(values)), written(max(values))
    return f"{mean} ({low}–{high})" if ranged and low != high else mean


# --- sentences ------------------------------------------------------------------------------------------------------


def notes(sweep: Sweep) -> list[str]:
    """Sentences about the best values, and about what is missing."""
    unfinished = [run for run in sweep.runs if not run.finished]
    found = [_best(sweep)] if len(sweep.ranked) > 1 and not sweep.apart else []
    if sweep.apart:
        more = f" and {len(sweep.apart) - _SHOWN} more" if len(sweep.apart) > _SHOWN else ""
        found.append(
            f"The runs were not measured alike (other {', '.join(sweep.apart[:_SHOWN])}{more}), so none is called best."
        )
    if unfinished:
        named = ", ".join(f"{run.name} ({run.state})" for run in unfinished[:_SHOWN])
        more = f" and {len(unfinished) - _SHOWN} more" if len(unfinished) > _SHOWN else ""
        found.append(f"Not finished: {len(unfinished)} of {len(sweep.runs)} runs, {named}{more}.")
    return [*found, *dict.fromkeys(_of_whom(sweep, run, note) for run in sweep.runs for note in run.notes)]


def _of_whom(sweep: Sweep, run: SweepRun, note: str) -> str:
    """A note of a run, with its name where not all that have finished have it."""
    return note if all(note in one.notes for one in sweep.runs if one.finished) else f"{run.name}: {note}"


_SHOWN = 4


def _best(sweep: Sweep) -> str:
    first, second = sweep.ranked[:2]
    figure, column = (accuracy, "T=1") if first.ends(accuracy) else (divergence, "KL")
    what, unit = ("accuracy at T=1", " %") if figure is accuracy else ("reverse KL", "")
    ends = [f"{_FIGURES[column][1](float(np.mean(arm.ends(figure))))}{unit}" for arm in (first, second)]
    if ends[0] == ends[1]:
        return f"{_name(sweep, first)} and {_name(sweep, second)} ended best by {what}, and alike ({ends[0]})."
    edge = "".join(_edge(sweep, first, key) for key in sweep.keys)
    return (
        f"{_name(sweep, first)} ended best by {what} ({ends[0]}; next {_name(sweep, second)}, {ends[1]}). It was "
        "chosen on the very problems shown here, which flatters it: measure it on others, or with other seeds, before "
        f"it is reported.{edge}"
    )


def _name(sweep: Sweep, arm: SweepArm) -> str:
    return f"{NUMBER} {arm.number} ({arm.label})" if sweep.numbered else arm.label


def _edge(sweep: Sweep, best: SweepArm, key: str) -> str:
    """A sentence about a value at the end of those that were tried."""
    tried = {arm.values[key]: number(arm.values[key]) for arm in sweep.ranked if key in arm.values}
    values = [value for value in tried.values() if value is not None]
    mine = tried.get(best.values.get(key, ""))
    if len(values) < max(2, len(tried)) or mine is None or min(values) < mine < max(values):
        return ""
    side, beyond = ("smallest", "smaller") if mine == min(values) else ("largest", "larger")
    return f" Its {key} is the {side} that was tried: a {beyond} one may be better."


def number(text: str) -> float | None:
    """The value as a finite number; None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


# --- for other programs ---------------------------------------------------------------------------------------------


def as_json(sweep: Sweep) -> dict[str, Any]:
    """All runs with their values, states and evaluations."""
    return {
        "name": sweep.name,
        "settings": sweep.settings,
        "notes": notes(sweep),
        "runs": [
            {
                "run": run.name,
                "values": dict(run.values),
                "state": run.state,
                "steps": run.steps,
                "evaluations": [point.as_json() for point in run.points],
            }
            for run in sweep.runs
        ],
    }
