"""Real actors are killed and stopped in the middle of a run; it goes on, and every trajectory is accounted for."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.test_processes import end_of, family, start, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.faults]
STEPS, PROMPTS = 14, 32
TWO_OF_EACH = [
    f"steps={STEPS}", f"prompts.prompts_per_step={PROMPTS}", "student.replicas=2", "teacher.replicas=2", "doctor=false",
    "evaluation.every=0", "evaluation.teacher=false", "student.deadline_s=25", "teacher.deadline_s=25",
]  # fmt: skip


def actors(mark: str, name: str) -> list[psutil.Process]:
    """Processes of the run whose Ray title says that they are an actor of class `name`."""
    return sorted((p for p in family(mark) if f"ray::{name}" in " ".join(p.cmdline())), key=lambda p: p.pid)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


LOCK_STEP, ASYNCHRONOUS = [], ["deterministic=false", "max_staleness=1"]


@pytest.mark.parametrize(
    ("name", "how", "options", "says"),
    [
        ("VLLMEngine", signal.SIGKILL, LOCK_STEP, r"rollout actor \d died"),
        ("VLLMEngine", signal.SIGSEGV, ASYNCHRONOUS, r"rollout actor \d died"),
        ("VLLMEngine", signal.SIGSTOP, ASYNCHRONOUS, r"rollout actor \d hung"),
        ("TorchTeacher", signal.SIGKILL, ASYNCHRONOUS, r"teacher actor \d died"),
        ("TorchTeacher", signal.SIGSTOP, LOCK_STEP, r"teacher actor \d hung"),
    ],
)
def test_a_run_survives_the_loss_of_an_actor(
    name: str, how: signal.Signals, options: list[str], says: str, tmp_path: Path
) -> None:
    mark = f"{name}-{how.name}-{os.getpid()}-{time.monotonic_ns()}"
    driver = start(mark, tmp_path, *TWO_OF_EACH, *options)
    metrics = tmp_path / "r" / "metrics.jsonl"
    try:
        wait_until(lambda: len(lines(metrics)) >= 3, 240, "three steps")
        victims = actors(mark, name)
        assert len(victims) == 2, [p.cmdline() for p in family(mark)]
        before = len(lines(metrics))
        os.kill(victims[0].pid, how)
        output = end_of(driver, 240)
        assert driver.returncode == 0, output
        summary = json.loads((tmp_path / "r" / "summary.json").read_text())
        witness = " ".join(summary["alarms"])
        assert re.search(says, witness), f"the fault did not fire: {witness!r}\n{output}"
        assert before < STEPS, "it was all over when the fault came"
        ledger = summary["ledger"]
        assert ledger["issued"] == ledger["trained"] == STEPS * PROMPTS and ledger["outstanding"] == 0
        assert [line["step"] for line in lines(metrics)] == list(range(1, STEPS + 1))
        assert max(line["sample/staleness_max"] for line in lines(metrics)) <= (options is ASYNCHRONOUS)
        wait_until(lambda: not family(mark), 30, "processes are left")
    finally:
        for process in family(mark):
            process.kill()
