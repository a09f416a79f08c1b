"""Facts about a run that all trackers share: names of its results, its best and last ones, places of its files."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from hf.folder import has_config
from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.evaluation_point import HIGH, LOW, EvaluatedModel, EvaluationPoint
from launch.artifacts.redaction import masked
from launch.artifacts.run_directory import RunDirectory, read_steps
from launch.artifacts.samples import Decode
from launch.config.tracker import TrackerConfig
from opd.loop.train import StepRecord

BETTER = {"greedy": max, "mean_at_k": max, "pass_at_k": max, "reverse_kl": min}  # of an evaluation
COSTS = ("k", "seconds", "tokens", "generated", "learned", "flops", "cpu_s")  # axes to plot against, no panels


class Tracker(Protocol):
    """An `opd.ports.Observer` that also receives evaluations; used as a context manager around a run."""

    async def __call__(self, record: StepRecord) -> None:
        """Record a finished step."""
        ...

    def evaluated(self, result: EvaluationPoint) -> None:
        """Record an evaluation of the student or its teacher."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """Facts about a run that trackers need before it starts. `resolved` is its whole configuration, `first` the number
    of steps that were done before (of a resumed run).
    """

    method: str
    steps: int
    resolved: Mapping[str, Any]
    decode: Decode
    first: int = 0


def samples_are_due(config: TrackerConfig, step: int, steps: int) -> bool:
    """Whether completions of this step are kept."""
    return config.samples > 0 and (step in (1, steps) or step % config.samples_every == 0)


def results(point: EvaluationPoint) -> dict[str, float]:
    """Numbers of an evaluation by the names that every tracker gives them.

    What was measured is `eval/*` (of a named set `eval/SET/*`, of a teacher `teacher/*`); what it was measured with and
    after which costs is `eval_cost/*`, so that it has no place among the panels.
    """
    teacher = point.examinee is EvaluatedModel.TEACHER
    measured, costs = ("teacher", "teacher_cost") if teacher else ("eval", "eval_cost")
    return {
        f"{costs if name.rpartition('/')[2] in COSTS else measured}/{name}": value
        for name, value in point.tracked().items()
    }


def better_of(name: str) -> Callable[..., Any] | None:
    """`max` or `min` for a result of an evaluation, whichever is better; None for what has no better and worse."""
    last = name.rpartition("/")[2]
    if last.startswith(("mean_at_", "pass_at_", "maj_at_")) and not last.endswith((LOW, HIGH)):
        return max if "." not in last else None
    return BETTER.get(last)


def best_and_last(points: Iterable[EvaluationPoint]) -> dict[str, float]:
    """Best and last results of a run's student, and the step of each best one, as `best/greedy`, `best_step/greedy`
    and `last/greedy`. Of equal ones the first is the best.
    """
    found: dict[str, float] = {}
    for point in points:
        for name, value in results(point).items():
            place, _, rest = name.partition("/")
            better = better_of(rest)
            if place != "eval" or better is None:
                continue
            if f"best/{rest}" not in found or better(value, found[f"best/{rest}"]) != found[f"best/{rest}"]:
                found |= {f"best/{rest}": value, f"best_step/{rest}": point.step}
            found[f"last/{rest}"] = value
    return found


def summary(directory: RunDirectory) -> dict[str, float]:
    """`best_and_last` over all that the run directory has, also from before a resumption."""
    points = map(EvaluationPoint.from_json, read_steps(directory.evaluations))
    return best_and_last(point for point in points if point.examinee is EvaluatedModel.STUDENT)


def places(directory: RunDirectory) -> dict[str, str]:
    """Places of a run, for its trackers: the command that repeats it, its directory, newest checkpoint and export."""
    command = directory.command.read_text().strip() if directory.command.exists() else ""
    kept = CheckpointStore(directory.checkpoints)
    found = {
        "run/command": command,
        "run/directory": str(directory.path),
        "run/report": str(directory.report),
        "run/checkpoint": str(kept.path(kept.steps()[0])) if kept.steps() else "",
        "run/export": str(directory.export) if has_config(directory.export) else "",
    }
    return {name: masked(text) for name, text in found.items() if text}
