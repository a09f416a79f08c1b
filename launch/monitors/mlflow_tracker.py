"""MLflow: a run on its server, or in a file beside the run directories, sent by a thread of its own."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any, Self

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.redaction import masked, redacted
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.tracker_runs import remember_run, tracker_runs
from launch.artifacts.user_yaml import dotted
from launch.config.tracker import TrackerConfig
from launch.monitors.step_metrics import Meter
from launch.monitors.tracked_run import PlannedRun, places, results, summary
from opd.errors import OpdError
from opd.loop.train import StepRecord

_log = logging.getLogger(__name__)
_START_S = 120  # seconds until there is a run: a new file takes some for its tables
_END_S = 60  # seconds that the end of a run waits for what was not sent yet
_SETTINGS = {  # of the package, unless the user's own; its telemetry would go to its makers
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the login that the address may have
}
_LONGEST, _AT_ONCE = 6000, 100  # characters of a parameter, and parameters of a call, that MLflow takes
_STEPS, _EVALUATIONS = "step", "eval_cost/k"  # metrics that tell which were sent already

Act = Callable[[Any, str], object]
"""Action on a client of MLflow and the id of our run there."""


def tracking_uri(directory: RunDirectory) -> str:
    """Server that `MLFLOW_TRACKING_URI` names, or a file beside the run directories, which all of them share."""
    beside = (directory.path.parent / "mlflow.db").resolve()
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"sqlite:///{beside}"


class MlflowTracker:
    """Tracker that sends metrics, evaluations, settings and the run's places to MLflow, under wandb's names.

    Calls are made by a thread, in order, so that a slow server does not hold up training; what was not sent when the
    run ends has a minute. A server that fails is one warning, and the run goes on without. Steps and evaluations that a
    killed run had sent after its checkpoint are not sent again: as in wandb, the first ones count.
    """

    def __init__(self, config: TrackerConfig, directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
        self._config, self._directory, self._meter, self._plan = config, directory, meter, plan
        self._waiting: Queue[Act | None] = Queue()
        self._stopped = False  # what waits is not taken any more
        self._began: Future[None] = Future()
        self._thread = Thread(target=self._work, name="mlflow", daemon=True)
        self._sent: dict[str, set[int]] = {_STEPS: set(), _EVALUATIONS: set()}
        self._set: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        own = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
        os.environ.update(own)
        self._set = tuple(own)
        self._thread.start()
        try:
            self._began.result(timeout=_START_S)
        except (TooLate, OSError, _mlflow_error()) as error:
            self._leave()
            said = " ".join(str(error).split()) or f"no answer within {_START_S} s"
            raise OpdError(
                f"MLflow did not start ({masked(said)}); {_remedy(error)}, or leave mlflow out of tracker="
            ) from error
        return self

    async def __call__(self, record: StepRecord) -> None:
        if record.step not in self._sent[_STEPS]:
            self._metrics(dict(self._meter(record)), record.step)
        for alert in self._meter.news:
            self._tags({f"alert/{alert.name}": f"step {record.step}: {alert.sentence}"})

    def evaluated(self, result: EvaluationPoint) -> None:
        """Send as `eval/*` at the step that was evaluated, a teacher's as `teacher/*`."""
        values = results(result)
        if _EVALUATIONS not in values or result.step not in self._sent[_EVALUATIONS]:
            self._metrics(values, result.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send best and last results, the places, and how it ended."""
        status = "FINISHED" if kind is None else "FAILED"
        self._metrics(summary(self._directory), self._plan.steps)
        self._tags(places(self._directory))
        self._put(lambda client, run: client.set_terminated(run, status))
        self._waiting.put(None)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            _log.warning(
                "MLflow did not take the last %d messages within %d s; %s has all metrics",
                self._waiting.qsize(),
                _END_S,
                self._directory.metrics,
            )
        self._leave()

    def _leave(self) -> None:
        for name in self._set:
            os.environ.pop(name, None)

    def _metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._put(lambda client, run: client.log_batch(run, metrics=found))

    def _put(self, act: Act) -> None:
        if not self._stopped:
            self._waiting.put(act)

    def _tags(self, values: Mapping[str, str]) -> None:
        def send(client: Any, run: str) -> None:
            for name, value in values.items():
                client.set_tag(run, name, masked(value))

        self._put(send)

    def _work(self) -> None:
        """Loop of the thread: a run of MLflow, then every action on it, until the last one or a failure."""
        try:
            client, run = self._begin()
        except BaseException as error:  # noqa: BLE001 (raised where the run is begun)
            self._began.set_exception(error)
            return
        self._began.set_result(None)
        while (act := self._waiting.get()) is not None:
            try:
                act(client, run)
            except (OSError, _mlflow_error()) as error:
                _log.warning(
                    "MLflow stopped (%s); the run goes on without it, %s has all metrics",
                    masked(" ".join(str(error).split())),
                    self._directory.metrics,
                )
                self._stopped = True
                return

    def _begin(self) -> tuple[Any, str]:
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # a new file's tables are no news
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # what is tried again is none either
        uri = tracking_uri(self._directory)
        client = MlflowClient(tracking_uri=uri)
        known = tracker_runs(self._directory).get("mlflow", {}).get("run_id", "")
        run = self._known(client, known) if known else ""
        if not run:
            run = self._new(client, uri)
        self._describe(client, run)
        return client, run

    def _known(self, client: Any, run: str) -> str:
        """The run that this directory had before; "" where the server has it no more."""
        from mlflow.exceptions import MlflowException

        try:
            client.update_run(run, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            _log.warning("MLflow has no run %s any more; a new one is begun", run)
            return ""
        self._sent = {name: {metric.step for metric in client.get_metric_history(run, name)} for name in self._sent}
        return run

    def _new(self, client: Any, uri: str) -> str:
        found = client.get_experiment_by_name(self._config.project)
        experiment = found.experiment_id if found else client.create_experiment(self._config.project)
        tags = dict.fromkeys(self._config.tags, "") | ({"group": self._config.group} if self._config.group else {})
        run = client.create_run(experiment, run_name=self._directory.name, tags=tags).info.run_id
        place = masked(uri)  # a login in the address is the environment's to know
        remember_run(self._directory, "mlflow", {"uri": place, "experiment_id": experiment, "run_id": run})
        return run

    def _describe(self, client: Any, run: str) -> None:
        """Send the settings; of a resumed run those that are new, for MLflow's parameters never change."""
        from mlflow.entities import Param

        known = client.get_run(run).data.params
        settings = {"method": self._plan.method, **dict(dotted(redacted(self._plan.resolved)))}
        new = [Param(n, masked(str(v))[:_LONGEST]) for n, v in settings.items() if n not in known and _named(n)]
        for start in range(0, len(new), _AT_ONCE):
            client.log_batch(run, params=new[start : start + _AT_ONCE])
        for name, value in places(self._directory).items():
            client.set_tag(run, name, value)


def _named(name: str) -> bool:
    """Whether MLflow takes the name of a parameter."""
    return len(name) <= 250 and all(c.isalnum() or c in "_-. :/" for c in name)


def _remedy(error: BaseException) -> str:
    """Advice about a server that did not begin a run."""
    status: Callable[[], int] = getattr(error, "get_http_status_code", lambda: 0)  # of MLflow's own errors
    if status() in (401, 403):
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to a valid login"
    return "check MLFLOW_TRACKING_URI and the network"


def _mlflow_error() -> type[Exception]:
    from mlflow.exceptions import MlflowException

    return MlflowException
