"""Trackers: what they write, where, and that none of them can take a run down."""

import ast
import asyncio
import io
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.artifacts.run_directory import RunDirectory, append_json, read_jsonl
from launch.artifacts.samples import Sample, token_pieces
from launch.config.run_config import run_config
from launch.config.tracker import TrackerConfig, WandbMode
from launch.monitors.accounting import Costs
from launch.monitors.live_view import LiveView
from launch.monitors.step_metrics import Meter
from launch.monitors.tracked_run import PlannedRun
from launch.monitors.trackers import JsonlTracker, WandbTracker, check_login, make_trackers
from opd.errors import ConfigurationError
from opd.loop.train import StepRecord
from opd.observability.alerts import AlertThresholds
from opd.ports import PublishReport
from opd.types import AdvantageScores, Prompt, Scored, Scores, StepReport, StopReason, TokenScores, Trajectory
from tests.fault_matrix import Witness
from tests.processes import wait_until

STEPS = 20
COSTS = Costs(student_params=10, teacher_params=20, teacher_writes=False, teacher_reads=True)


def decode(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


def record(step: int, *, reward: float | None = None) -> StepRecord:
    """Four trajectories of five tokens; the teacher likes the third of each less than the student did."""
    behavior = np.full(5, -0.5, dtype=np.float32)
    read = np.asarray([-0.5, -0.5, -3.0, -0.5, -0.5], dtype=np.float32)
    scores: Scores = TokenScores(logprobs=read)
    if reward is not None:
        scores = AdvantageScores(advantages=behavior, rewards=np.full(5, reward, dtype=np.float32))
    ids = np.arange(5, dtype=np.int32)
    items: list[Scored[Any]] = [
        Scored(
            trajectory=Trajectory(
                prompt=Prompt(id=str(i), student_ids=ids[:2] + i, teacher_ids=ids[:2], answer="2 9"),
                sample=0,
                token_ids=ids,
                behavior=TokenScores(logprobs=behavior),
                loss_mask=np.ones(5, dtype=bool),
                versions=np.full(5, step - 1, dtype=np.int32),
                stop=StopReason.END,
            ),
            scores=scores,
        )
        for i in range(4)
    ]
    return StepRecord(
        step=step, scored=items, weights=[np.ones(5)] * 4,
        report=StepReport(loss=0.4, grad_norm=1.0, lr=2e-3, tokens=28, trained_tokens=20,
                          metrics={"reverse_kl": 0.4 / step} if reward is None else {}),
        published=PublishReport(version=step, gap=0.0, nbytes=10),
        ledger={"issued": 4 * step, "trained": 4 * step, "dropped": 0, "outstanding": 0},
        seconds={"rollout": 0.2, "score": 0.1, "wait": 0.3, "train": 0.15, "publish": 0.05, "step": 0.5},
    )  # fmt: skip


def point(step: int, examinee: EvaluatedModel = EvaluatedModel.STUDENT) -> EvaluationPoint:
    return EvaluationPoint(
        step=step, greedy=0.87, mean_at_k=0.78, pass_at_k=None, k=4, reverse_kl=float("nan"), length_mean=5.0,
        truncation_rate=0.0, seconds=1.0, tokens=100, flops=1e9, cpu_s=3.0, examinee=examinee,
    )  # fmt: skip


@pytest.fixture
def meter() -> Meter:
    return Meter(COSTS, read_cpu=lambda: 7.0)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "first")
    made.write_config("steps: 20\n")
    return made


@pytest.fixture
def plan() -> PlannedRun:
    return PlannedRun(method="opd", steps=STEPS, resolved={"lr": 2e-3, "hf_token": "geheim"}, decode=decode)


def tell(tracker: Callable[[StepRecord], Any], *steps: int) -> None:
    async def all_of_them() -> None:
        for step in steps:
            await tracker(record(step))

    asyncio.run(all_of_them())


# -- configuration


def test_the_configuration_is_a_schema() -> None:
    node = OmegaConf.merge(OmegaConf.structured(TrackerConfig), {"mode": "ONLINE", "tags": ["a"]})
    built: Any = OmegaConf.to_object(node)
    assert (built.mode, list(built.tags), built.entity) == (WandbMode.ONLINE, ["a"], None)
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(OmegaConf.structured(TrackerConfig), {"modus": "ONLINE"})


@pytest.mark.parametrize("wrong", [{"samples": -1}, {"samples_every": 0}, {"print_every": 0}, {"project": ""}])
def test_a_field_out_of_range_is_a_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"TrackerConfig\.\w+ needs"):
        TrackerConfig(**wrong)


# -- files


def test_lines_for_steps_evaluations_and_due_samples(directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
    config = TrackerConfig(samples=2, samples_every=8)
    with JsonlTracker(config, directory, meter, plan) as tracker:
        tell(tracker, *range(1, STEPS + 1))
        tracker.evaluated(point(0))
        tracker.evaluated(point(0, EvaluatedModel.TEACHER))
    assert [line["step"] for line in read_jsonl(directory.metrics)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in read_jsonl(directory.samples)] == [1, 1, 8, 8, 16, 16, 20, 20]
    assert read_jsonl(directory.evaluations)[0]["reverse_kl"] is None
    assert [line["examinee"] for line in read_jsonl(directory.evaluations)] == ["student", "teacher"]
    first = Sample.from_json(read_jsonl(directory.samples)[0])
    assert first == Sample(
        step=1, prompt="w0 w1", answer="2 9", tokens=("w0", " w1", " w2", " w3", " w4"),
        gaps=(0.0, 0.0, -2.5, 0.0, 0.0), reward=None, version=0, stop="end", length=5,
    )  # fmt: skip
    assert first.text == "w0 w1 w2 w3 w4"


def test_no_samples_wanted_none_kept(directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
    tell(JsonlTracker(TrackerConfig(samples=0), directory, meter, plan), 1, STEPS)
    assert not directory.samples.exists()


def test_a_reward_is_kept_where_nobody_read_the_tokens(directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
    asyncio.run(JsonlTracker(TrackerConfig(), directory, meter, plan)(record(1, reward=1.0)))
    line = read_jsonl(directory.samples)[0]
    assert (line["reward"], line["gaps"]) == (1.0, None)


@pytest.mark.parametrize("text", ["has 3 7 ;", "héllo wörld", "日本語 🙂 ok", ""])
def test_pieces_of_byte_level_tokens_make_up_the_text(text: str) -> None:
    ids = np.frombuffer(text.encode(), dtype=np.uint8)
    pieces = token_pieces(ids, lambda some: bytes(some.astype(np.uint8)).decode(errors="replace"))
    assert "".join(pieces) == text
    assert len(pieces) == len(ids)


def test_a_special_token_has_no_text_but_a_place() -> None:
    pieces = token_pieces(np.asarray([5, 2, 7]), lambda ids: " ".join(f"w{i}" for i in ids if i != 2))
    assert pieces == ["w5", "", " w7"]


# -- the terminal


def test_plain_lines_where_nothing_can_be_redrawn(meter: Meter) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=60)
    with LiveView(title="first · opd", steps=STEPS, meter=meter, console=console, print_every=10) as view:
        view.evaluated(point(0))
        tell(view, *range(1, STEPS + 1))
        view.evaluated(point(0, EvaluatedModel.TEACHER))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "evaluated student at step 0: greedy 87.0%, sampled 78.0%"
    assert [line.split(" | ")[0] for line in lines[1:-1]] == ["step 1/20", "step 10/20", "step 20/20"]
    for expected in ("reverse KL 0.4000", "greedy 87.0%", "40 tokens/s", "rollout 0.20", "left", "7 cpu s"):
        assert expected in lines[1]
    assert lines[-1].startswith("evaluated teacher:")


def test_a_panel_on_a_terminal(meter: Meter) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, record=True)
    view = LiveView(title="[red]first[/red] · opd", steps=STEPS, meter=meter, console=console)
    console.print(view)
    tell(view, *range(1, 11))
    view.evaluated(point(10))
    view.evaluated(point(0, EvaluatedModel.TEACHER))
    console.print(view)
    text = console.export_text()
    for expected in (
        "waiting for the first of 20 steps", "[red]first[/red] · opd", "step 10 / 20", "reverse KL  0.0400",
        "greedy 87.0%, sampled 78.0%  at step 10", "teacher: greedy", "40 tokens/s", "0.50 s: rollout 0.20",
    ):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e30])
def test_a_loss_that_explodes_is_shown_not_raised(meter: Meter, loss: float) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view = LiveView(title="sft", steps=STEPS, meter=meter, console=console)
    for step, value in ((1, 0.5), (2, loss), (3, 0.4)):
        bad = record(step)
        asyncio.run(view(replace(bad, report=replace(bad.report, loss=value, metrics={}))))
        console.print(view)


def test_the_signal_is_what_the_method_has(meter: Meter) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with LiveView(title="grpo", steps=STEPS, meter=meter, console=console) as view:
        asyncio.run(view(record(1, reward=0.25)))
    assert "reward 0.2500" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_step_that_trained_nothing_is_shown_and_the_run_goes_on(meter: Meter) -> None:
    idle = StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, trained_tokens=0, metrics={})
    consoles = [Console(file=io.StringIO(), force_terminal=t, width=200, record=True) for t in (False, True)]
    for console in consoles:
        view = LiveView(title="opd", steps=STEPS, meter=meter, console=console, print_every=1)
        for step in (1, 2, 3):
            asyncio.run(view(replace(record(step), report=idle) if step != 2 else record(step)))
            console.print(view)
        text = console.export_text()
        assert "nothing trained" in text and "reverse KL" in text


def cut_short(step: int) -> StepRecord:
    """A step whose completions all ran into the token limit."""
    plain = record(step)
    items = [replace(item, trajectory=replace(item.trajectory, stop=StopReason.LENGTH)) for item in plain.scored]
    return replace(plain, scored=items)


def tell_cut_short(tracker: Any, steps: int) -> None:
    for step in range(1, steps + 1):
        asyncio.run(tracker(cut_short(step)))


def test_an_alert_is_a_line_when_it_begins_and_a_metric_while_it_lasts(
    directory: RunDirectory, plan: PlannedRun
) -> None:
    meter = Meter(COSTS, read_cpu=lambda: 7.0, thresholds=AlertThresholds(window=2))
    console = Console(file=io.StringIO(), force_terminal=False, width=60)
    with LiveView(title="first · opd", steps=STEPS, meter=meter, console=console) as view:
        tell_cut_short(view, 6)
        files = JsonlTracker(TrackerConfig(samples=0), directory, meter, plan)
        asyncio.run(files(cut_short(6)))
        for step in range(7, 11):
            asyncio.run(view(record(step)))
    said = [line for line in console.file.getvalue().splitlines() if "alert" in line]  # type: ignore[attr-defined]
    assert len(said) == 1 and said[0].startswith("alert at step 4: 100% of the completions are cut by the token limit")
    assert read_jsonl(directory.metrics)[-1]["alert/truncation"] == 1.0
    assert not meter.alerts, "the completions end by themselves again"
    assert [sentence.split(": ")[0] for sentence in meter.ever.values()] == ["step 4"]


def test_an_alert_stands_in_the_panel(directory: RunDirectory) -> None:
    meter = Meter(COSTS, read_cpu=lambda: 7.0, thresholds=AlertThresholds(window=2))
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)
    view = LiveView(title="first", steps=STEPS, meter=meter, console=console)
    tell_cut_short(view, 4)
    console.print(view)
    assert "100% of the completions are cut by the token limit" in console.export_text()


# -- wandb


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_online_without_a_login_is_refused_before_anything_starts(
    no_login: Path, directory: RunDirectory, meter: Meter, plan: PlannedRun
) -> None:
    config = TrackerConfig(mode=WandbMode.ONLINE)
    with pytest.raises(ConfigurationError, match=r"needs a login for api\.wandb\.ai"):
        check_login(config)
    with pytest.raises(ConfigurationError, match=r"use tracker\.mode=offline"):
        make_trackers(config, directory, meter, plan, Console(file=io.StringIO()))
    check_login(TrackerConfig(mode=WandbMode.OFFLINE))
    check_login(TrackerConfig(mode=WandbMode.DISABLED))


def test_a_key_or_a_netrc_entry_is_a_login(no_login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrackerConfig(mode=WandbMode.ONLINE)
    no_login.write_text("machine elsewhere.org login user password x\n")
    no_login.chmod(0o600)
    with pytest.raises(ConfigurationError, match="needs a login"):
        check_login(config)
    no_login.write_text("machine api.wandb.ai login user password x\n")
    check_login(config)
    no_login.write_text("nonsense\n")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        check_login(config)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check_login(config)


def test_wandb_s_own_variables_hold_where_no_setting_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for told, mode, project in (
        (["tracker=wandb"], WandbMode.OFFLINE, "mine"),
        (["tracker=[wandb,tensorboard]"], WandbMode.OFFLINE, "mine"),
        (["tracker=wandb", "tracker.mode=online", "tracker.project=other"], WandbMode.ONLINE, "other"),
        (["tracker=none"], WandbMode.DISABLED, "mine"),
    ):
        found = run_config(told).tracker
        assert (found.mode, found.project) == (mode, project)
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ConfigurationError, match=r"tracker\.mode needs one of .*sometimes"):
        run_config(["tracker=wandb"])
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_PROJECT")
    assert run_config(["tracker=wandb"]).tracker == TrackerConfig(mode=WandbMode.ONLINE)


def test_disabled_means_no_wandb(directory: RunDirectory, meter: Meter, plan: PlannedRun) -> None:
    made = make_trackers(TrackerConfig(mode=WandbMode.DISABLED), directory, meter, plan, Console())
    assert [type(tracker) for tracker in made] == [JsonlTracker, LiveView]


def test_wandb_offline_for_real_and_resumed(
    directory: RunDirectory, meter: Meter, plan: PlannedRun, no_login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails and is resumed: the same run id, our own steps, no secret (of the arguments, which wandb keeps,
    neither), all inside."""
    monkeypatch.setattr(sys, "argv", ["opd", "train", "teacher.url=https://user:geheim@host:1/", "steps=3"])
    config = TrackerConfig(mode=WandbMode.OFFLINE, samples=1, tags=("t",), group="g")
    directory.write_command(["steps=3"])
    append_json(directory.evaluations, point(0).as_json())
    tracker = WandbTracker(config, directory, meter, plan)
    with tracker:
        tracker.evaluated(point(0))
        tell(tracker, 1, 2)
        tracker.__exit__(KeyError, KeyError(), None)  # what `with` does when the run fails
    with WandbTracker(config, directory, meter, plan) as tracker:
        tell(tracker, 3)
        tracker.evaluated(point(3))
        tracker.evaluated(point(0, EvaluatedModel.TEACHER))
    logs = sorted(directory.path.glob("wandb/offline-run-*/*.wandb"))  # their names begin with the time
    _wait_for_the_last_record(logs[-1])
    failed, finished = ([*_records(log)] for log in logs)
    assert [r.exit.exit_code for r in (*failed, *finished) if r.HasField("exit")] == [1, 0]
    (identity,) = {r.run.run_id for r in (*failed, *finished) if r.HasField("run")}
    assert (directory.path / "wandb_id").read_text() == identity
    history = [
        {"/".join(item.nested_key) or item.key: item.value_json for item in r.history.item}
        for r in (*failed, *finished)
        if r.HasField("history")
    ]
    assert [row["step"] for row in history] == ["0", "1", "2", "3"]
    hidden = {m.glob_name or m.name for r in finished if r.HasField("metric") for m in [r.metric] if m.options.hidden}
    assert hidden == {"eval_cost/*"} and "eval_cost/seconds" in history[0], "no panels for what an evaluation cost"
    said = {"/".join(u.nested_key) or u.key for r in finished if r.HasField("summary") for u in r.summary.update}
    assert {"run/command", "run/directory", "last/greedy", "best/greedy", "best_step/greedy", "teacher/greedy"} <= said
    assert {"eval/greedy", "distill/reverse_kl"} <= history[3].keys()  # an evaluation stands in the row of its step
    assert {"eval/greedy", "eval/mean_at_k"} <= history[0].keys()
    assert "eval/reverse_kl" not in history[0]  # NaN: not measured
    assert float(history[1]["distill/reverse_kl"]) == pytest.approx(0.4)
    assert [any("samples" in name for name in row) for row in history] == [False, True, False, False]
    assert len(list(directory.path.rglob("*.table.json"))) == 1
    assert any(b"steps=3" in log.read_bytes() for log in logs), "wandb keeps no arguments any more"
    assert not any(b"geheim" in path.read_bytes() for path in directory.path.rglob("*") if path.is_file())


@pytest.mark.parametrize("run_name", ["", "mine"])
def test_an_alert_is_a_wandb_alert_once_in_a_run_that_wandb_s_variables_name(
    run_name: str, directory: RunDirectory, plan: PlannedRun, no_login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_NAME", "from outside")
    monkeypatch.setenv("WANDB_TAGS", "one,two")
    wandb.teardown()  # it reads them once in a process
    plan = replace(plan, resolved={"run_name": run_name})
    meter = Meter(COSTS, read_cpu=lambda: 7.0, thresholds=AlertThresholds(window=2))
    with WandbTracker(TrackerConfig(mode=WandbMode.OFFLINE, samples=0), directory, meter, plan) as tracker:
        tell_cut_short(tracker, 6)
    (log,) = directory.path.glob("wandb/offline-run-*/*.wandb")
    _wait_for_the_last_record(log)
    named = {(r.run.display_name, *r.run.tags) for r in _records(log) if r.HasField("run")}
    assert named == {(directory.name if run_name else "from outside", "one", "two")}
    (alert,) = (r.alert for r in _records(log) if r.HasField("alert"))
    assert (alert.title, alert.level) == ("opd: truncation", "WARN")
    assert alert.text.startswith("step 4: 100% of the completions are cut")


@pytest.mark.faults("wandb killed")
def test_a_run_survives_the_death_of_wandb(directory: RunDirectory, no_login: Path, witness: Witness) -> None:
    """In a process of its own: wandb keeps one service per process, which would be dead for later tests."""
    program = """
import logging, sys, time, psutil
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_tracking import COSTS, Meter, RunDirectory, PlannedRun, TrackerConfig, WandbMode, WandbTracker, decode, point
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda entry: said.append(entry.getMessage())
logging.getLogger("launch").addHandler(handler)
plan = PlannedRun(method="opd", steps=9, resolved={}, decode=decode)
config = TrackerConfig(mode=WandbMode.OFFLINE)
with WandbTracker(config, RunDirectory(Path(sys.argv[1])), Meter(COSTS), plan) as tracker:
    tracker.evaluated(point(1))
    services = psutil.Process().children(recursive=True)
    assert services
    for service in services:
        with suppress(psutil.NoSuchProcess):  # it has ended by itself
            service.kill()
    psutil.wait_procs(services, timeout=10)
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:  # the pipe breaks a moment later
        tracker.evaluated(point(2))
        time.sleep(0.05)
    tracker.evaluated(point(3))
print(said)
"""
    arguments = [sys.executable, "-c", program, str(directory.path), str(Path(__file__).parent)]
    # Else wandb would use the service that an earlier test has started in this process.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    result = subprocess.run(
        arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3], env=own
    )
    (warning,) = ast.literal_eval(result.stdout)
    assert warning.startswith("wandb stopped (")
    assert "the run goes on without it" in warning
    assert "Traceback" not in result.stderr and "atexit" not in result.stderr, result.stderr
    witness("wandb killed")


@pytest.mark.faults("wandb down")
@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_a_server_that_cannot_be_reached_is_one_sentence_before_the_first_step(
    directory: RunDirectory, no_login: Path, how: str, witness: Witness
) -> None:
    """In a process of its own, because wandb reads the address once."""
    program = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from launch.monitors import trackers as tracking
from test_tracking import COSTS, Meter, RunDirectory, PlannedRun, TrackerConfig, WandbMode, WandbTracker, decode
tracking._START_S = 5
plan = PlannedRun(method="opd", steps=9, resolved={}, decode=decode)
config = TrackerConfig(mode=WandbMode.ONLINE)
try:
    WandbTracker(config, RunDirectory(Path(sys.argv[1])), Meter(COSTS), plan).__enter__()
except tracking.OpdError as error:
    print(error)
"""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if how == "hangs":
            server.listen()  # the kernel accepts; nobody answers
        address = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
        own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | address
        arguments = [sys.executable, "-c", program, str(directory.path), str(Path(__file__).parent)]
        result = subprocess.run(
            arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3], env=own
        )
        (sentence,) = result.stdout.splitlines()
        assert sentence.startswith("wandb did not start (") and "check the login and the network, or use" in sentence
        if how == "hangs":
            server.settimeout(10)
            server.accept()[0].close()  # it was asked
        else:
            assert "refused" in sentence
        witness("wandb down")


def _wait_for_the_last_record(log: Path) -> None:
    """wandb's own process may write it a moment after `finish`."""
    wait_until(lambda: any(record.HasField("exit") for record in _records(log)), 60, "wandb's last record", 0.1)


def _records(path: Path) -> Any:
    """What wandb wrote, in its own format: a file header, then blocks of 32 KiB with framed protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too small for a frame: padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):  # still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
