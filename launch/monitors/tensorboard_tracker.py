"""TensorBoard: event files in the run directory, written by TensorBoard's own writer."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.redaction import masked, redacted
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.samples import samples_of
from launch.artifacts.tracker_runs import remember_run
from launch.artifacts.user_yaml import dotted
from launch.config.tracker import TrackerConfig
from launch.monitors.step_metrics import Meter
from launch.monitors.tracked_run import PlannedRun, places, results, samples_are_due, summary
from opd.loop.train import StepRecord

_log = logging.getLogger(__name__)
_FLUSH_S = 10  # seconds of events that a run which is killed may lose
FOLDER = "tensorboard"  # in the run directory


class TensorboardTracker:
    """Tracker that writes event files: scalars under wandb's names, completions, alerts and settings as text, and best
    and last results beside the settings (tab HPARAMS).

    A resumed run writes to the same folder, and says that what was written there of its steps does not count.
    A disk that is full is one warning, and the run goes on without.
    """

    def __init__(self, config: TrackerConfig, directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
        self._config, self._directory, self._meter, self._plan = config, directory, meter, plan
        self._writer: Any = None

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter  # here, because a run may do without

        remember_run(self._directory, "tensorboard", {"folder": FOLDER})
        again = self._plan.first + 1 if self._plan.first else None
        self._writer = SummaryWriter(str(self._folder), purge_step=again, flush_secs=_FLUSH_S)
        settings = yaml.safe_dump(redacted(self._plan.resolved), sort_keys=False, allow_unicode=True)
        self._text("run/settings", settings, self._plan.first)
        return self

    async def __call__(self, record: StepRecord) -> None:
        self._scalars(self._meter(record), record.step)
        for alert in self._meter.news:
            self._text("alerts", alert.sentence, record.step)
        if samples_are_due(self._config, record.step, self._plan.steps):
            for number, s in enumerate(samples_of(record, self._plan.decode, self._config.samples)):
                ends = f"answer {s.answer}, reward {s.reward}, {s.stop} after {s.length} tokens"
                self._text(f"samples/{number}", f"{s.prompt}\n---\n{s.text}\n---\n{ends}", record.step)

    def evaluated(self, result: EvaluationPoint) -> None:
        """Add `eval/*` at the step that was evaluated, a teacher's as `teacher/*`."""
        self._scalars(results(result), result.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Add best and last results and the run's places, and close the file."""
        self._guarded(self._end)
        self._writer = None

    @property
    def _folder(self) -> Path:
        return self._directory.path / FOLDER

    def _end(self, writer: Any) -> None:
        from torch.utils.tensorboard.summary import hparams

        for name, text in places(self._directory).items():
            self._text(name, text, self._plan.first)
        plain = {
            name: value
            for name, value in dotted(redacted(self._plan.resolved))
            if isinstance(value, str | bool | int | float)
        }
        for part in hparams(plain, summary(self._directory)):
            writer.file_writer.add_summary(part)
        for name, value in summary(self._directory).items():
            writer.add_scalar(name, value, self._plan.first)
        writer.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._guarded(add)

    def _text(self, name: str, text: str, step: int) -> None:
        """Add text as it is: the tab shows Markdown, and a block of code is none."""
        shown = "\n".join(f"    {line}" for line in masked(text).splitlines())
        self._guarded(lambda writer: writer.add_text(name, shown, step))

    def _guarded(self, act: Callable[[Any], object]) -> None:
        """Run an action on the writer; if it cannot write any more, warn once and go on without."""
        if self._writer is None:
            return
        try:
            act(self._writer)
        except OSError as error:
            self._writer = None
            _log.warning(
                "TensorBoard's file cannot be written (%s); the run goes on without it, %s has all metrics",
                error.strerror or error,
                self._directory.metrics,
            )
