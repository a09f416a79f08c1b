"""No process is left behind after a failure (after Ctrl-C: test_faults.py); how other tests start and watch a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
MARK = "OPD_TEST_RUN"  # inherited by every process of a run


def start(mark: str, runs: Path, *arguments: str, module: str = "launch.cli", **more: str) -> subprocess.Popen[str]:
    """`opd train ...` on the shop task, small; `more` are variables of its environment."""
    command = ["train", "experiment=shop", "evaluation.prompts.prompts_per_step=8", "evaluation.samples=1"]
    command += ["evaluation.reverse_kl_prompts=4", "steps=100000", f"output_dir={runs}", "run_name=r", *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", module, *command],
        cwd=ROOT,
        env=os.environ | {MARK: mark} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A job that a script started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def family(mark: str) -> list[psutil.Process]:
    """Living processes that were started by the marked run, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def command(process: psutil.Process) -> list[str]:
    """Its command line; nothing if it has gone meanwhile."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def nobody_is_left(mark: str, seconds: float) -> None:
    """Wait until no process of the marked run lives."""
    deadline = time.monotonic() + seconds
    while left := family(mark):
        assert time.monotonic() < deadline, f"left after {seconds} s: {[command(p)[:3] for p in left]}"
        time.sleep(0.3)


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.3)


def end_of(driver: subprocess.Popen[str], seconds: float = 60) -> str:
    """What it printed; if it does not end in time, where it stands."""
    try:
        return driver.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.kill(driver.pid, signal.SIGUSR1)
        time.sleep(2)
        driver.kill()
        pytest.fail(f"the driver did not end: {driver.communicate(timeout=10)[0]}")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_failing_run_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    """A loss that is no number: the learner's sentence reaches the user, and everything is closed."""
    mark = f"fail-{os.getpid()}"
    spoilt = ["method.objective._target_=tests.spoilt.NotFinite", "allow_targets=[tests]"]
    driver = start(mark, tmp_path, "evaluation.teacher=false", "doctor=false", *spoilt, PYTHONPATH=str(ROOT))
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 1, output
    assert "error:" in output and "Traceback" not in output, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["outcome"] == "failed" and summary["error"]
    nobody_is_left(mark, 30)
