"""TensorBoard and MLflow, read back by their own readers: names, resumption, best and last, places, no secrets."""

import asyncio
import base64
import importlib.util
import io
import json
import logging
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from rich.console import Console

import launch.plan.checks.trackers as checks
from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.tracker_runs import remember_run, tracker_runs
from launch.config.run_config import run_config
from launch.config.tracker import TrackerConfig, WandbMode
from launch.monitors.mlflow_tracker import MlflowTracker
from launch.monitors.run_log import logged
from launch.monitors.step_metrics import Meter
from launch.monitors.tensorboard_tracker import TensorboardTracker
from launch.monitors.tracked_run import PlannedRun, best_and_last, results
from launch.monitors.trackers import JsonlTracker, make_trackers
from launch.plan.checks.trackers import check_trackers
from opd.errors import ConfigurationError, DataError, OpdError
from tests.unit.monitors.test_tracking import COSTS, STEPS, cut_short, decode, point, record

SECRET = "geheimnis-7"
CONFIG = TrackerConfig(samples=1, tags=("t",), group="g", tensorboard=True, mlflow=True)


def new_meter() -> Meter:
    return Meter(COSTS, read_cpu=lambda: 7.0)


def planned(first: int = 0) -> PlannedRun:
    resolved = {
        "learner": {"lr": 2e-3},
        "hf_token": SECRET,
        "notes": ["a"],
        "teacher": {"url": f"https://u:{SECRET}@h/"},
    }
    return PlannedRun(method="opd", steps=STEPS, resolved=resolved, decode=decode, first=first)


def play(kind: Any, directory: RunDirectory, first: int, last: int, broken: bool = False) -> None:
    """A run of some steps that is evaluated at its ends, as `Run` tells its trackers."""
    meter, plan = new_meter(), planned(first)
    files = JsonlTracker(CONFIG, directory, meter, plan)
    with kind(CONFIG, directory, meter, plan) as tracker:
        for step in range(first, last + 1):
            if step > first:
                for one in (files, tracker):
                    asyncio.run(one(record(step)))
            if step in (first, last) and not (first and step == first):
                for one in (files, tracker):
                    one.evaluated(replace(point(step), greedy=0.5 + 0.1 * (step == 2)))
        if last == 3:
            for one in (files, tracker):
                one.evaluated(point(0, EvaluatedModel.TEACHER))
        if broken:
            tracker.__exit__(KeyError, KeyError(), None)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "first")
    made.write_config("steps: 20\n")
    made.write_command(["steps=20", "notes=[a b]"])
    (made.checkpoints / "step_2").mkdir()
    return made


def files_of(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


# -- names that all of them share


def test_what_was_measured_is_apart_from_what_it_cost() -> None:
    found = results(replace(point(3), greedy_by_task={"sums": 0.5}))
    assert {n.partition("/")[0] for n in found} == {"eval", "eval_cost"}
    assert {n for n in found if n.startswith("eval/")} == {
        "eval/greedy", "eval/mean_at_k", "eval/length_mean", "eval/truncation_rate", "eval/greedy_by_task.sums",
    }  # fmt: skip
    assert "eval/reverse_kl" not in found, "NaN was not measured"
    assert {n.partition("/")[0] for n in results(point(0, EvaluatedModel.TEACHER))} == {"teacher", "teacher_cost"}


@given(st.lists(st.tuples(st.floats(0, 1), st.one_of(st.none(), st.floats(0, 9))), min_size=1, max_size=12))
def test_best_is_the_first_of_the_best_and_last_the_last(measured: list[tuple[float, float | None]]) -> None:
    points: list[EvaluationPoint] = [
        replace(point(10 * i), greedy=greedy, reverse_kl=kl) for i, (greedy, kl) in enumerate(measured)
    ]
    found = best_and_last(points)
    accuracies, divergences = [g for g, _ in measured], [k for _, k in measured if k is not None]
    assert found["best/greedy"] == max(accuracies) and found["last/greedy"] == accuracies[-1]
    assert found["best_step/greedy"] == 10 * accuracies.index(max(accuracies))
    assert found.get("best/reverse_kl") == min(divergences, default=None)
    assert found.get("last/reverse_kl") == (divergences[-1] if divergences else None)


# -- TensorBoard


def test_tensorboard_reads_its_own_files_also_of_a_resumed_run(directory: RunDirectory) -> None:
    """Killed after step 3, resumed from the checkpoint of step 2: step 3 stands there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(TensorboardTracker, directory, 0, 3, broken=True)
    directory.rewind(2, STEPS)
    play(TensorboardTracker, directory, 2, 5)
    seen = EventAccumulator(str(directory.path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars: Mapping[str, list[Any]] = {tag: seen.Scalars(tag) for tag in seen.Tags()["scalars"]}
    assert [(e.step, round(e.value, 4)) for e in scalars["distill/reverse_kl"]] == [
        (1, 0.4), (2, 0.2), (3, 0.1333), (4, 0.1), (5, 0.08),
    ]  # fmt: skip
    assert [e.step for e in scalars["eval/greedy"]] == [0, 5] and "eval/seconds" not in scalars
    assert [e.step for e in scalars["eval_cost/seconds"]] == [0, 5]
    assert scalars["best/greedy"][-1].value == pytest.approx(0.5)
    texts = {
        tag: b"".join(e.tensor_proto.string_val[0] for e in seen.Tensors(tag)).decode()
        for tag in seen.Tags()["tensors"]
    }
    assert "opd train steps=20 'notes=[a b]'" in texts["run/command/text_summary"]
    assert (
        texts["run/checkpoint/text_summary"].endswith("checkpoints/step_2")
        and "w0 w1" in texts["samples/0/text_summary"]
    )
    assert "lr: 0.002" in texts["run/settings/text_summary"]
    assert tracker_runs(directory)["tensorboard"] == {"folder": "tensorboard"}
    assert not any(SECRET.encode() in data for data in files_of(directory.path))


def test_an_alert_is_text_in_tensorboard(directory: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from opd.observability.alerts import AlertThresholds

    meter = Meter(COSTS, read_cpu=lambda: 7.0, thresholds=AlertThresholds(window=2))
    with TensorboardTracker(replace(CONFIG, samples=0), directory, meter, planned()) as tracker:
        for step in range(1, 7):
            asyncio.run(tracker(cut_short(step)))
    seen = EventAccumulator(str(directory.path / "tensorboard")).Reload()
    (alert,) = seen.Tensors("alerts/text_summary")
    assert alert.step == 4 and b"100% of the completions are cut" in alert.tensor_proto.string_val[0]


# -- MLflow


def test_mlflow_has_one_run_also_of_a_resumed_one(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the file beside the runs. Step 3 was sent before it was killed, and is not sent again."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    session = "_MLFLOW_TELEMETRY_SESSION_ID"  # of a package that a test of this process imported with telemetry
    before = {name: value for name, value in os.environ.items() if name != session}
    play(MlflowTracker, directory, 0, 3, broken=True)
    directory.rewind(2, STEPS)
    play(MlflowTracker, directory, 2, 5)
    assert {name: value for name, value in os.environ.items() if name != session} == before
    from mlflow.tracking import MlflowClient

    known = tracker_runs(directory)["mlflow"]
    assert known["uri"] == f"sqlite:///{directory.path.parent}/mlflow.db"
    client = MlflowClient(tracking_uri=known["uri"])
    experiment = client.get_experiment_by_name("opd")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (known["run_id"], "first", "FINISHED")
    steps = [(m.step, round(m.value, 4)) for m in client.get_metric_history(known["run_id"], "distill/reverse_kl")]
    assert steps == [(1, 0.4), (2, 0.2), (3, 0.1333), (4, 0.1), (5, 0.08)]
    assert [m.step for m in client.get_metric_history(known["run_id"], "eval/greedy")] == [0, 3, 5]
    assert run.data.metrics["teacher/greedy"] == 0.87 and run.data.metrics["last/greedy"] == 0.5
    assert run.data.params["learner.lr"] == "0.002" and run.data.params["hf_token"] != SECRET
    assert run.data.tags["run/command"] == "opd train steps=20 'notes=[a b]'" and run.data.tags["group"] == "g"
    assert run.data.tags["run/checkpoint"] == str(directory.checkpoints / "step_2") and "t" in run.data.tags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"], "nothing beside the runs"
    assert not any(SECRET.encode() in data for data in files_of(tmp_path))
    # A run that its server has no more begins anew.
    remember_run(directory, "mlflow", known | {"run_id": "0" * 32})
    play(MlflowTracker, directory, 0, 1)
    assert tracker_runs(directory)["mlflow"]["run_id"] not in ("0" * 32, known["run_id"])
    # A store that breaks while a run goes on is one warning.
    caplog.clear()
    with MlflowTracker(CONFIG, directory, new_meter(), planned()) as tracker:
        with closing(sqlite3.connect(directory.path.parent / "mlflow.db")) as database:
            database.execute("DROP TABLE metrics")
            database.commit()
        for step in (4, 5, 6):
            asyncio.run(tracker(record(step)))
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("launch.")]
    assert warning.startswith("MLflow stopped (") and "the run goes on without it" in warning


class _Broken(BaseHTTPRequestHandler):
    """A server that has errors alone."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("how", ["refuses", "fails"])
def test_a_server_that_cannot_be_used_is_one_sentence_before_the_first_step(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
        port = unused.getsockname()[1] if how == "refuses" else server.server_port
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:{port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(OpdError, match=r"MLflow did not start \(.*; check MLFLOW_TRACKING_URI") as caught:
                MlflowTracker(CONFIG, directory, new_meter(), planned()).__enter__()
        finally:
            server.shutdown()
            server.server_close()
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


# -- which of them


class _Standing(BaseHTTPRequestHandler):
    """A server that takes everything of one run, with a login."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        login = base64.b64encode(f"user:{SECRET}".encode()).decode()
        known = self.headers.get("Authorization") == f"Basic {login}"
        run = {"run_id": "7" * 32, "run_uuid": "7" * 32, "experiment_id": "1", "status": "RUNNING"}
        answer = {"experiment": {"experiment_id": "1"}, "run": {"info": run, "data": {}}, "run_info": run}
        body = json.dumps(answer).encode() if known else b"a login is needed"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


def test_a_server_s_login_is_asked_for_and_never_printed(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's client prints the run's address when it ends, as it was given. A server that dies is one warning."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Standing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for user, begins in (("", False), ("user:wrong@", False), (f"user:{SECRET}@", True)):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{user}127.0.0.1:{server.server_port}")
            if begins:
                play(MlflowTracker, directory, 0, 1)
            else:
                with pytest.raises(OpdError, match=r"401.*; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
                    MlflowTracker(CONFIG, directory, new_meter(), planned()).__enter__()
        assert capfd.readouterr() == ("", "")
        caplog.clear()
        with MlflowTracker(CONFIG, directory, new_meter(), planned()) as tracker:
            server.shutdown()
            server.server_close()
            asyncio.run(tracker(record(1)))
    (warning,) = [r.getMessage() for r in caplog.records]
    assert warning.startswith("MLflow stopped (") and SECRET not in warning + "".join(capfd.readouterr())


@pytest.mark.parametrize("address", ["127.0.0.1:5000", "http://", "/some/folder", "nope"])
def test_an_address_of_mlflow_that_is_none_is_refused_by_the_plan(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigurationError, match=r"MLFLOW_TRACKING_URI needs an address such as http://127\.0\.0\.1"):
        check_trackers(CONFIG)


def test_several_are_chosen_by_one_override() -> None:
    config = run_config(["experiment=shop", "tracker=[offline,tensorboard,mlflow]"]).tracker
    assert (config.mode, config.tensorboard, config.mlflow) == (WandbMode.OFFLINE, True, True)
    alone = run_config(["experiment=shop", "tracker=tensorboard"]).tracker
    assert (alone.mode, alone.tensorboard, alone.mlflow) == (WandbMode.DISABLED, True, False)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tracker=[tensorbord]", r"tracker=\[tensorbord\] does not exist; did you mean tracker=\[tensorboard\]"),
        ("tracker=[wandb,offline]", r"says two things"),
        ("tracker=[none,mlflow]", r"says two things"),
        ("tracker=[mlflow,mlflow]", r"needs different names"),
        ("tracker=[]", r"needs different names"),
        ("method=[sft,grpo]", r"method=\[sft,grpo\] does not exist"),
    ],
)
def test_what_cannot_be_chosen_together_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        run_config(["experiment=shop", override])


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: set[str] = set()
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name in gone else importlib.util.find_spec(name))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_trackers(CONFIG)
    gone |= {"tensorboard", "sqlalchemy"}
    with pytest.raises(ConfigurationError, match=r"tracker=tensorboard needs tensorboard.*`pip install tensorboard`"):
        check_trackers(CONFIG)
    only = replace(CONFIG, tensorboard=False)
    with pytest.raises(ConfigurationError, match=r"tracker=mlflow needs sqlalchemy.*`pip install sqlalchemy`"):
        check_trackers(only)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking")
    check_trackers(only)
    check_trackers(TrackerConfig())


def test_each_has_its_tracker(directory: RunDirectory) -> None:
    made = make_trackers(CONFIG, directory, new_meter(), planned(), Console(file=io.StringIO()))
    assert {TensorboardTracker, MlflowTracker} <= {type(tracker) for tracker in made}


@pytest.mark.parametrize("text", ["[]", "{", '{"mlflow": 3}', '{"mlflow": {"run_id": 7}}'])
def test_another_file_of_tracker_runs_is_refused(directory: RunDirectory, text: str) -> None:
    directory.trackers.write_text(text)
    with pytest.raises(DataError, match=r"trackers\.json .*remove it, and trackers begin new runs"):
        tracker_runs(directory)


# -- the run's log


def test_what_a_console_prints_is_in_the_log_with_the_time(directory: RunDirectory, caplog: Any) -> None:
    console = Console(file=io.StringIO(), width=20)

    def run() -> None:
        with logged(console, directory.log):
            console.print("a sentence that is longer than the console is wide", soft_wrap=True)
            logging.getLogger("launch.x").warning("a warning of %s", "ours")
            raise OpdError("what went wrong")

    with pytest.raises(OpdError):
        run()
    console.print("after the run")
    lines = directory.log.read_text().splitlines()
    assert [line[20:] for line in lines] == [
        "a sentence that is longer than the console is wide", "warning: a warning of ours", "ended by: what went wrong",
    ]  # fmt: skip
    assert "wide" in console.file.getvalue() and "a warning of ours" in caplog.text  # type: ignore[attr-defined]


def test_a_panel_has_lines_in_the_log(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as the kernel of a notebook sets it
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with logged(console, directory.log):
        views = make_trackers(TrackerConfig(), directory, new_meter(), planned(), console)[1:]
        for view in views:
            view.__enter__()
        console.print("in between")
        for step in (1, 2, STEPS):
            for view in views:
                asyncio.run(view(record(step)))
        for view in views:
            view.__exit__(None, None, None)
    lines = [line[20:] for line in directory.log.read_text().splitlines()]
    assert lines[0] == "in between" and [line.split(" | ")[0] for line in lines[1:]] == ["step 1/20", "step 20/20"]
