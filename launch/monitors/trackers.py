"""Trackers of finished steps and evaluations: the run directory, wandb and the terminal, and those of other files."""

import logging
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from rich.console import Console

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.artifacts.redaction import masked, redacted
from launch.artifacts.run_directory import RunDirectory, append_json, write_text
from launch.artifacts.samples import Sample, samples_of
from launch.artifacts.terminal import in_notebook, unseen
from launch.artifacts.tracker_runs import remember_run
from launch.config.tracker import TrackerConfig, WandbMode
from launch.monitors.live_view import LiveView
from launch.monitors.mlflow_tracker import MlflowTracker
from launch.monitors.notebook_view import NotebookView
from launch.monitors.run_log import RunLog
from launch.monitors.step_metrics import Meter
from launch.monitors.tensorboard_tracker import TensorboardTracker
from launch.monitors.tracked_run import (
    BETTER,
    PlannedRun,
    Tracker,
    better_of,
    places,
    results,
    samples_are_due,
    summary,
)
from opd.errors import ConfigurationError, OpdError
from opd.loop.train import StepRecord
from opd.observability.alerts import Alert

_log = logging.getLogger(__name__)


def make_trackers(
    config: TrackerConfig, directory: RunDirectory, meter: Meter, plan: PlannedRun, console: Console
) -> list[Tracker]:
    """All trackers of a run, to be entered before it starts; files come first, so they are the most complete."""
    trackers: list[Tracker] = [
        JsonlTracker(config, directory, meter, plan),
        *_views(config, directory, meter, plan, console),
    ]
    if config.mode is not WandbMode.DISABLED:
        trackers.append(WandbTracker(config, directory, meter, plan))
    if config.tensorboard:
        trackers.append(TensorboardTracker(config, directory, meter, plan))
    if config.mlflow:
        trackers.append(MlflowTracker(config, directory, meter, plan))
    return trackers


def _views(
    config: TrackerConfig, directory: RunDirectory, meter: Meter, plan: PlannedRun, console: Console
) -> list[Tracker]:
    """The run where it is looked at; where that is a panel, the lines of the run's log are written apart."""
    title, notebook = f"{directory.name} · {plan.method}", in_notebook() and not console.quiet
    seen = LiveView(title=title, steps=plan.steps, meter=meter, console=console, print_every=config.print_every)
    if not (notebook or console.is_terminal):
        return [seen]
    silent = unseen(quiet=True)
    silent.push_render_hook(RunLog(directory.log))
    lines = LiveView(title=title, steps=plan.steps, meter=meter, console=silent, print_every=config.print_every)
    return [NotebookView(title=title, steps=plan.steps, meter=meter) if notebook else seen, lines]


class JsonlTracker:
    """Tracker of the run directory: a line per step, per evaluation and per sample, written at once."""

    def __init__(self, config: TrackerConfig, directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
        self._config, self._directory, self._meter, self._plan = config, directory, meter, plan

    async def __call__(self, record: StepRecord) -> None:
        append_json(self._directory.metrics, self._meter(record))
        if samples_are_due(self._config, record.step, self._plan.steps):
            for sample in samples_of(record, self._plan.decode, self._config.samples):
                append_json(self._directory.samples, sample.as_json())

    def evaluated(self, result: EvaluationPoint) -> None:
        """Append to `evaluations.jsonl`."""
        append_json(self._directory.evaluations, result.as_json())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close: every line is its own file operation."""


def check_login(config: TrackerConfig) -> None:
    """Refuse `mode=online` without a login, before anything is started; contacts no server."""
    if config.mode is not WandbMode.ONLINE:
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc(host):
        return
    raise ConfigurationError(
        f"tracker.mode=online needs a login for {host}, but found neither WANDB_API_KEY nor a netrc entry; "
        "run `wandb login`, or use tracker.mode=offline and `wandb sync` later"
    )


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except FileNotFoundError:
        return False
    except (OSError, netrc.NetrcParseError) as error:
        raise ConfigurationError(
            f"tracker.mode=online looked for a login in {path}, which cannot be read ({error}); correct "
            "that file or set WANDB_API_KEY"
        ) from error


_START_S = 30  # seconds a server may take before wandb counts as unreachable
_FOLDERS = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")


class WandbTracker:
    """Tracker that sends metrics, evaluations, sample tables and alerts (as wandb alerts) to wandb.

    wandb writes through a process of its own, which keeps everything in the run directory and, online, sends
    what it can when it can: a server that is down or slow does not reach training. Should that process itself
    die, one warning says so and the run goes on without wandb; `metrics.jsonl` has everything.

    The horizontal axis is our own `step`, and wandb's internal one is the same: an evaluation stands in the row of its
    step, and of the steps that a killed run had logged after its checkpoint and logs again, a server keeps one. The
    run's id is kept in the run directory: resuming continues the same wandb run.
    """

    _COLUMNS: tuple[str, ...] = (
        "step", "version", "prompt", "completion", "answer", "reward", "stop", "length",
        "teacher_minus_student",
    )  # fmt: skip

    def __init__(self, config: TrackerConfig, directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
        check_login(config)
        self._config, self._directory, self._meter, self._plan = config, directory, meter, plan
        self._run: Any = None
        self._set: tuple[str, ...] = ()
        self._defined: set[str] = set()

    def _name(self) -> str:
        """Name of the run in wandb: `run_name`; without one its own variable, or else the folder that was made."""
        own = None if self._plan.resolved.get("run_name") else os.environ.get("WANDB_NAME")
        return own or self._directory.name

    def __enter__(self) -> Self:
        folder = self._directory.path
        # wandb would stage tables and logs in the home directory, which may be small or read-only.
        own = {name: str(folder / "wandb") for name in _FOLDERS if name not in os.environ}
        os.environ.update(own)
        self._set = tuple(own)
        import wandb  # here, because it takes a second and a run may do without

        arguments, sys.argv = sys.argv, [masked(argument) for argument in sys.argv]  # which wandb keeps
        try:
            self._run = wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                group=self._config.group,
                tags=list(self._config.tags) or None,  # wandb reads WANDB_TAGS then
                name=self._name(),
                id=_stable_id(self._directory),
                resume="allow",
                dir=str(folder),
                mode=self._config.mode.value,
                config=redacted(self._plan.resolved),
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, save_code=False, init_timeout=_START_S
                ),
            )
        except (wandb.Error, OSError) as error:
            raise OpdError(
                f"wandb did not start ({' '.join(str(error).split())}); check the login and the network, "
                "or use tracker.mode=offline"
            ) from error
        finally:
            sys.argv = arguments
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for name, better in BETTER.items():
            self._run.define_metric(f"eval/{name}", step_metric="step", summary=f"{better.__name__},last")
        self._run.define_metric("eval_cost/*", step_metric="step", hidden=True)  # axes, no panels
        self._run.summary.update(places(self._directory))
        remember_run(self._directory, "wandb", {"run_id": self._run.id, "url": self._run.url or ""})
        return self

    async def __call__(self, record: StepRecord) -> None:
        values: dict[str, Any] = dict(self._meter(record))
        if samples_are_due(self._config, record.step, self._plan.steps):
            values["samples"] = self._table(samples_of(record, self._plan.decode, self._config.samples))
        self._guarded(lambda run: run.log(values, step=record.step))
        for alert in self._meter.news:
            self._alert(alert, record.step)

    def evaluated(self, result: EvaluationPoint) -> None:
        """Log as `eval/*` at the step that was evaluated; the teacher, which has no steps, in the summary.

        Of a named set as `eval/SET/*`; the ends of its intervals have no panels.
        """
        values, step = results(result), result.step
        self._define(values)
        if result.examinee is EvaluatedModel.TEACHER:
            self._guarded(lambda run: run.summary.update(values))
        else:
            self._guarded(lambda run: run.log({"step": step} | values, step=step))

    def _define(self, names: Iterable[str]) -> None:
        """Tell wandb of measures of named sets when they come for the first time."""
        for name in names:
            if name.count("/") < 2 or not name.startswith("eval/") or name in self._defined:
                continue
            self._defined.add(name)
            better = better_of(name)
            how: dict[str, Any] = {"summary": f"{better.__name__},last"} if better else {"hidden": True}
            self._guarded(lambda run, name=name, how=how: run.define_metric(name, step_metric="step", **how))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the wandb run in any case; a failed one is marked as failed. Its summary gets best and last results,
        and where checkpoint and export are.
        """
        self._guarded(lambda run: run.summary.update(summary(self._directory) | places(self._directory)))
        self._guarded(lambda run: run.finish(exit_code=0 if kind is None else 1))
        self._run = None
        for name in self._set:  # the next run of this process has a directory of its own
            os.environ.pop(name, None)

    def _alert(self, alert: Alert, step: int) -> None:
        import wandb

        title, text = f"{self._plan.method}: {alert.name.replace('_', ' ')}", masked(f"step {step}: {alert.sentence}")
        self._guarded(lambda run: run.alert(title=title, text=text, level=wandb.AlertLevel.WARN))  # pyright: ignore

    def _table(self, samples: Sequence[Sample]) -> Any:
        import wandb

        rows: list[Any] = [
            [
                s.step, s.version, s.prompt, s.text, s.answer, s.reward, s.stop, s.length,
                None if s.gaps is None else " ".join(f"{gap:+.2f}" for gap in s.gaps),
            ]
            for s in samples
        ]  # fmt: skip
        return wandb.Table(columns=list(self._COLUMNS), data=rows)

    def _guarded(self, act: Callable[[Any], object]) -> None:
        """Run an action on the wandb run; if wandb's process is gone, warn once and go on without."""
        if self._run is None:
            return
        import wandb

        try:
            act(self._run)
        except (wandb.Error, OSError) as error:  # nothing we do brings that process back
            self._run = None
            _log.warning(
                "wandb stopped (%s); the run goes on without it, %s has all metrics",
                error,
                self._directory.metrics,
            )
            _forget_wandb()


def _forget_wandb() -> None:
    """Tear wandb down: with its process gone, its exit hook would print a traceback."""
    import wandb

    try:
        wandb.teardown(exit_code=1)
    except Exception as error:  # noqa: BLE001 (it says once more that the process is gone, after it took its hook back)
        _log.debug("wandb could not be closed (%s)", error)


def _stable_id(directory: RunDirectory) -> str:
    """Id of this run directory at wandb, made once."""
    path = directory.path / "wandb_id"
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text()
