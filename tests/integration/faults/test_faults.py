"""Real actors die, hang, lie and lag in the middle of real runs; every trajectory is accounted for, nothing is left."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command import opd
from tests.fault_matrix import Witness
from tests.fault_plan import FOLDER, Fired, entries, fired, plan, processes
from tests.integration.runs.test_train import lines
from tests.processes import command, end_family, end_of, family, nobody_is_left, start, status, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
PROMPTS = 32
TWO_OF_EACH = [
    f"prompts.prompts_per_step={PROMPTS}", "student.replicas=2", "teacher.replicas=2", "doctor=false",
    "evaluation.every=0", "evaluation.teacher=false", "student.deadline_s=120", "teacher.deadline_s=25",
    "tracker.mode=DISABLED",
]  # fmt: skip
ASYNCHRONOUS = ["deterministic=false", "max_staleness=1"]


def actors(mark: str, name: str) -> list[psutil.Process]:
    """Processes of the run whose Ray title says that they are an actor of class `name`."""
    return sorted((p for p in family(mark) if f"ray::{name}" in " ".join(command(p))), key=lambda p: p.pid)


@dataclass
class Scene:
    """A place for runs named `r`, one after the other, whose processes follow one plan of faults."""

    folder: Path
    mark: str
    driver: subprocess.Popen[str] | None = None
    output: str = ""

    @property
    def plan(self) -> Path:
        return self.folder / "plan"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "r"

    def start(self, *options: str, **environment: str) -> None:
        environment = {FOLDER: str(self.plan)} | environment
        self.driver = start(self.mark, self.folder / "runs", *options, module="tests.faulty_run", **environment)

    def ends(self, code: int, seconds: float = 900) -> str:
        """Wait for its end, which leaves no process behind; what it printed."""
        assert self.driver is not None
        self.output = end_of(self.driver, seconds)
        assert self.driver.returncode == code, self.output
        nobody_is_left(self.mark)
        return self.output

    def steps(self) -> int:
        return len(lines(self.run / "metrics.jsonl"))

    def reach(self, condition: Any, what: str, seconds: float = 600) -> None:
        def reached() -> bool:
            assert self.driver is not None
            assert self.driver.poll() is None, f"{what}: the run has ended: {self.driver.communicate()[0]}"
            return bool(condition())

        wait_until(reached, seconds, what)

    def alive(self, role: str) -> list[int]:
        """Living processes that have the role, in the order of their numbers."""
        return [pid for pid in processes(self.plan, role) if psutil.pid_exists(pid)]

    def fired(self) -> list[Fired]:
        return fired(self.plan)

    def alerts(self) -> str:
        return " | ".join(self.summary()["alerts"])

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())

    def loses(self, name: str) -> None:
        """Kill a process of Ray itself: the run ends with a sentence, and leaves nothing."""
        at = self.steps()
        self.reach(lambda: self.steps() > at, "a step")
        (victim,) = family(self.mark, name)
        victim.kill()
        output = self.ends(1, 300)
        assert "error: OpdError: a process of Ray itself" in output and "Traceback" not in output, output
        assert self.summary()["outcome"] == "failed" and self.summary()["steps"] > at

    def accounts(self, steps: int, staleness: int, dropped: int = 0) -> None:
        """Nothing lost, nothing trained twice, nothing stale beyond the bound, every step once."""
        ledger, metrics = self.summary()["ledger"], lines(self.run / "metrics.jsonl")
        assert ledger["issued"] == steps * PROMPTS and ledger["outstanding"] == 0, ledger
        assert ledger["trained"] == steps * PROMPTS - dropped, ledger
        assert [line["step"] for line in metrics] == list(range(1, steps + 1))
        assert [line["weights/version"] for line in metrics] == list(range(1, steps + 1))
        assert max(line["sample/staleness_max"] for line in metrics) <= staleness


@contextmanager
def placed(folder: Path) -> Iterator[Scene]:
    """A scene in `folder`, of which no process is left afterwards."""
    made = Scene(folder, f"faults-{os.getpid()}-{time.monotonic_ns()}")
    made.plan.mkdir()
    try:
        yield made
    finally:
        end_family(made.mark)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with placed(tmp_path) as made:
        yield made


def bear_witness(scene: Scene, witness: Witness, kinds: list[tuple[str, str]]) -> None:
    """The faults fired in the order planned: `kinds` has (kind, place) of each."""
    found = scene.fired()
    assert [f.place for f in found] == [place for _, place in kinds], (found, scene.output)
    for kind, _ in kinds:
        witness(kind)


def looked_at(scene: Scene, sentence: str) -> str:
    """What was written about the one that hung, which its sentence names."""
    found = re.search(sentence, scene.alerts())
    assert found, scene.alerts()
    return Path(found[1]).read_text()


@pytest.mark.campaign
@pytest.mark.faults(
    "engine killed receiving weights", "engine killed while starting", "teacher killed while scoring",
    "engine segfaults while decoding", "teacher killed before its answer", "engine exits while decoding",
    "teacher exits while scoring", "teacher segfaults while scoring",
)  # fmt: skip
def test_an_asynchronous_run_survives_deaths_in_every_state(scene: Scene, witness: Witness) -> None:
    steps = 30
    chain = [
        ("engine killed receiving weights", "engine receiving", "SIGKILL", 6),
        ("engine killed while starting", "engine starting", "SIGKILL", 3),  # the first two are up
        ("teacher killed while scoring", "teacher scoring", "SIGKILL", 1),
        ("engine segfaults while decoding", "engine decoding", "segfault", 1),
        ("teacher killed before its answer", "teacher answering", "SIGKILL", 1),
        ("engine exits while decoding", "engine decoding", "exit", 1),
        ("teacher exits while scoring", "teacher scoring", "exit", 1),
        ("teacher segfaults while scoring", "teacher scoring", "segfault", 1),
    ]
    for after, (_, place, how, entry) in enumerate(chain):
        plan(scene.plan, place, how, entry=entry, after=after)
    scene.start(f"steps={steps}", *TWO_OF_EACH, *ASYNCHRONOUS)
    scene.ends(0)
    bear_witness(scene, witness, [(kind, place) for kind, place, _, _ in chain])
    assert len(re.findall(r"rollout actor \d died", scene.alerts())) == 3, "the replacement had not served yet"
    assert len(re.findall(r"teacher actor \d died", scene.alerts())) == 4
    scene.accounts(steps, staleness=1)


@pytest.mark.faults(
    "all engines killed while idle", "teacher killed after its answer", "teacher hangs while scoring",
    "engine killed", "teacher killed",
)  # fmt: skip
def test_a_run_in_lock_step_survives_the_loss_of_those_that_wait(scene: Scene, witness: Witness) -> None:
    """Roles take turns on their memory, so those that wait are asleep. Then Ctrl-C as a terminal does it, a SIGINT to
    the whole foreground group: no process is left. (SIGTERM and SIGKILL: test_resume.py.)
    """
    plan(scene.plan, "learner beginning", "kill engine", entry=3)
    plan(scene.plan, "learner beginning", "kill teacher 1 5", entry=5, after=1)
    plan(scene.plan, "teacher scoring", "SIGSTOP", after=2)
    scene.start("steps=100000", *TWO_OF_EACH, "cluster.share=TIME")
    scene.reach(lambda: len(scene.fired()) == 3, "three faults")
    hung = scene.fired()[-1].pid
    scene.reach(lambda: status(hung) == psutil.STATUS_STOPPED, "its stop")
    scene.reach(lambda: not psutil.pid_exists(hung), "the end of the one that hangs")
    for role in ("engine", "teacher"):
        at = scene.steps()
        scene.reach(lambda at=at: scene.steps() > at, "a step")
        scene.reach(lambda role=role: len(scene.alive(role)) == 2, "the replacements")
        victim = scene.alive(role)[0]
        os.kill(victim, signal.SIGKILL)
        scene.reach(lambda victim=victim: not psutil.pid_exists(victim), "the end of the one that was killed")
        scene.reach(lambda role=role: len(scene.alive(role)) == 2, "its replacement")
        witness(f"{role} killed")
    at = scene.steps()
    scene.reach(lambda: scene.steps() >= at + 2, "two steps of which the replacements may have a part")
    assert scene.driver is not None
    os.killpg(scene.driver.pid, signal.SIGINT)
    scene.ends(130, 120)
    assert scene.summary()["outcome"] == "stopped"
    kept = [path.name for path in (scene.run / "checkpoints").iterdir()]
    assert kept == [f"step_{scene.summary()['steps']}"], "the last finished step is kept"
    bear_witness(
        scene,
        witness,
        [
            ("all engines killed while idle", "learner beginning"),
            ("teacher killed after its answer", "learner beginning"),
            ("teacher hangs while scoring", "teacher scoring"),
        ],
    )
    stood = looked_at(scene, r"teacher actor \d hung .* \(where it stood: (\S+)\)")
    assert f"process {hung}" in stood and "printed nothing" in stood and "T (stopped)" in stood
    assert "== driver" in stood and "dispatch.py" in stood, "who waits for it"
    assert len(re.findall(r"rollout actor \d died", scene.alerts())) == 3
    assert len(re.findall(r"teacher actor \d died", scene.alerts())) == 2
    assert "Traceback" not in scene.output, scene.output
    scene.accounts(scene.summary()["steps"], staleness=0)


@pytest.mark.faults("engine stops and goes on", "engine hangs while decoding", "GCS killed")
def test_answers_of_an_engine_that_stopped_are_given_by_another_and_count_once(scene: Scene, witness: Witness) -> None:
    """The learner has the step that the stopped engine was writing for, before that one is woken. The loss of Ray's
    control store ends the run.
    """
    options = ["cluster.hedge_quantile=0.95", "student.deadline_s=30", "teacher.replicas=1"]
    scene.start("steps=100000", *TWO_OF_EACH, *options)
    scene.reach(lambda: scene.steps() >= 12, "enough calls for a quantile")
    plan(scene.plan, "engine decoding", "SIGSTOP")
    scene.reach(scene.fired, "the engine to stop")
    stopped, begun = scene.fired()[0].pid, entries(scene.plan, "learner beginning")
    scene.reach(lambda: entries(scene.plan, "learner beginning") > begun, "the step without its answers")
    assert psutil.Process(stopped).status() == psutil.STATUS_STOPPED
    os.kill(stopped, signal.SIGCONT)
    witness("engine stops and goes on")
    at = scene.steps()
    scene.reach(lambda: scene.steps() >= at + 2, "two more steps")
    assert psutil.pid_exists(stopped), "it was taken for hung"
    plan(scene.plan, "engine decoding", "SIGSTOP")
    scene.reach(lambda: len(scene.fired()) == 2, "the second one to stop")
    hung = scene.fired()[-1].pid
    scene.reach(lambda: not psutil.pid_exists(hung), "the end of the one that hangs")
    witness("engine hangs while decoding")
    scene.loses("gcs_server")
    witness("GCS killed")
    assert len(re.findall(r"rollout actor \d hung", scene.alerts())) == 1, scene.alerts()
    assert "T (stopped)" in looked_at(scene, r"rollout actor \d hung .* \(where it stood: (\S+)\)")
    assert "died" not in scene.alerts()
    scene.accounts(scene.summary()["steps"], staleness=0)


@pytest.mark.faults("driver stops and goes on", "engine stuck while decoding", "raylet killed")
def test_a_driver_that_was_stopped_takes_nobody_for_hung_but_an_engine_that_is_stuck(
    scene: Scene, witness: Witness
) -> None:
    """It is stopped for longer than any deadline, as when its machine sleeps: what was answered meanwhile counts. The
    actor of the engine answers, and has the same deadline: it says so itself about as often first as not. The loss of
    the raylet ends the run, before or after that of an actor on it is seen.
    """
    deadline_s = 25  # a replacement starts beside the others, on processors that other tests may use as well
    deadlines = [f"{role}.deadline_s={deadline_s}" for role in ("student", "teacher", "learner")]
    scene.start("steps=100000", *TWO_OF_EACH, *deadlines, "teacher.replicas=1")
    scene.reach(lambda: scene.steps() >= 2, "two steps")
    assert scene.driver is not None
    os.kill(scene.driver.pid, signal.SIGSTOP)
    time.sleep(deadline_s + 2)
    at = scene.steps()
    assert psutil.Process(scene.driver.pid).status() == psutil.STATUS_STOPPED
    os.kill(scene.driver.pid, signal.SIGCONT)
    witness("driver stops and goes on")
    scene.reach(lambda: scene.steps() > at, "a step")
    plan(scene.plan, "engine decoding", "sleep 3600")
    scene.reach(scene.fired, "the engine to be stuck")
    stuck = scene.fired()[0].pid
    scene.reach(lambda: not psutil.pid_exists(stuck), "the end of the one that is stuck")
    scene.loses("raylet")
    witness("raylet killed")
    bear_witness(scene, witness, [("engine stuck while decoding", "engine decoding")])
    stood = looked_at(scene, r"rollout actor \d hung .* \(where it stood: (\S+)\)")
    assert "engine_thread.py" in stood and scene.alerts().count(" hung ") == 1, scene.alerts()
    scene.accounts(scene.summary()["steps"], staleness=0)


@pytest.mark.faults("disk read-only")
def test_a_place_that_cannot_be_written_is_one_sentence_before_anything_starts(
    tmp_path: Path, witness: Witness
) -> None:
    read_only = Path("/sys") if os.geteuid() == 0 else tmp_path / "runs"  # root may write whatever the mode says
    if os.geteuid():
        read_only.mkdir(mode=0o555)
    with pytest.raises(OSError, match=r"Read-only|Permission denied|not permitted"):
        (read_only / "r").mkdir()
    witness("disk read-only")
    done = opd("train", "experiment=shop", f"output_dir={read_only}", "run_name=r")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "starting" not in done.stdout, done
    sentence = " ".join(done.stderr.split())
    assert re.search(
        rf"error: ConfigurationError: output_dir={read_only} cannot be written .*; choose another", sentence
    )


@pytest.mark.faults("engine skips pushes", "engine holds other weights", "slow learner", "slow engine")
def test_old_weights_and_slow_actors_train_nothing_stale(scene: Scene, witness: Witness) -> None:
    """A buffer of a byte: what staleness would allow is held back as soon as the size of a step is known."""
    steps = 16
    plan(scene.plan, "engine acknowledging", "skip 5", entry=8)
    plan(scene.plan, "engine acknowledging", "lie", entry=20, after=1)
    for i in range(3):
        plan(scene.plan, "learner beginning", "sleep 2", entry=4 + i)
        plan(scene.plan, "engine decoding", "sleep 1", entry=600 + 50 * i)
    options = ["deterministic=false", "max_staleness=2", "max_buffer_bytes=1", "teacher.replicas=1"]
    scene.start(f"steps={steps}", *TWO_OF_EACH, *options)
    scene.ends(0)
    for kind, place in (
        ("engine skips pushes", "skip"), ("engine holds other weights", "lie"), ("slow learner", "sleep 2"),
        ("slow engine", "sleep 1"),
    ):  # fmt: skip
        times = sum(f.how.startswith(place) for f in scene.fired())
        assert times == (3 if "slow" in kind else 1), (kind, scene.fired())
        witness(kind, times)
    assert (
        len(
            re.findall(
                r"rollout actor \d gave an invalid answer and is replaced: .* acknowledges version", scene.alerts()
            )
        )
        == 1
    )
    summary = scene.summary()
    print(summary["ledger"], [m["sample/staleness_max"] for m in lines(scene.run / "metrics.jsonl")])
    scene.accounts(steps, staleness=2, dropped=summary["ledger"]["dropped"])
