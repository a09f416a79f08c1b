"""Trackers of a Python program's own: functions that are called after every step, and objects that log."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.monitors.step_metrics import Meter
from launch.monitors.tracked_run import results
from opd.loop.train import StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a run after a step, for a callback: the step's metrics, and the newest evaluations of the student.

    `evaluation` is on the set that stands for the run, `by_set` has the newest on each, by its name.
    """

    step: int
    steps: int
    metrics: Mapping[str, float]
    evaluation: EvaluationPoint | None
    by_set: Mapping[str, EvaluationPoint] = field(default_factory=dict)


Callback = Callable[[Progress], object]
"""Called after every step, before its checkpoint; `True` ends the run there, in good order."""


class Logger(Protocol):
    """An object that records named numbers, as the runs of wandb and trackio do."""

    def log(self, data: Mapping[str, float], /, *, step: int) -> object:
        """Record the numbers of a step."""
        ...


class CallbackTracker:
    """Tracker that calls a function; `stops` once it has returned `True`."""

    def __init__(self, callback: Callback, meter: Meter, steps: int) -> None:
        self._callback, self._meter, self._steps = callback, meter, steps
        self._newest: dict[str, EvaluationPoint] = {}
        self.stops = False

    async def __call__(self, record: StepRecord) -> None:
        metrics = dict(self._meter(record))
        newest = next(iter(self._newest.values()), None)
        progress = Progress(
            step=record.step, steps=self._steps, metrics=metrics, evaluation=newest, by_set=dict(self._newest)
        )
        self.stops |= self._callback(progress) is True

    def evaluated(self, result: EvaluationPoint) -> None:
        """Keep it for the next call."""
        if result.examinee is EvaluatedModel.STUDENT:
            self._newest[result.set] = result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class LoggerTracker:
    """Tracker that hands metrics to an object with `log(data, step=)`, evaluations as `eval/*`.

    It is the caller's to close: one object may follow several runs.
    """

    def __init__(self, logger: Logger, meter: Meter) -> None:
        self._logger, self._meter = logger, meter

    async def __call__(self, record: StepRecord) -> None:
        self._logger.log(dict(self._meter(record)), step=record.step)

    def evaluated(self, result: EvaluationPoint) -> None:
        """Log as `eval/*`, of a named set as `eval/SET/*`, a teacher's as `teacher/*`, costs as `eval_cost/*`."""
        self._logger.log(results(result), step=result.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


UserTracker = CallbackTracker | LoggerTracker
MakeTracker = Callable[[Meter, int], UserTracker]
"""A tracker of a run's meter and its number of steps."""
