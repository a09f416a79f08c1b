"""Rollouts that run ahead, on real engines: repeatable bit by bit across a SIGKILL at every step (a long test; at other
speeds and across two of them: test_fault_chain.py)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, opd
from tests.integration.runs.test_train import SMALL, lines
from tests.processes import MARK, end_family, end_of, nobody_is_left, wait_until

STEPS, EVERY = 20, 4
# Four steps of text between two checkpoints, all but the first of them written one update ahead.
AHEAD = [*SMALL, f"steps={STEPS}", "max_staleness=1", f"checkpoint_every={EVERY}", f"checkpoint_keep={STEPS}"]
AHEAD += ["evaluation.every=0", "evaluation.teacher=false", "doctor=false", "learner.deterministic=true"]
AHEAD += ["learner.schedule=CONSTANT"]  # so that `steps` may differ while it is to be killed
# All that training is made of. Not how many trajectories were under way when a step ended, which is a matter of speed.
EXACT = ("actor/", "distill/", "tokens/", "flops/", "ledger/trained", "ledger/dropped", "response", "sample/staleness")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    runs = tmp_path_factory.mktemp("runs")
    done = opd("train", *AHEAD, f"output_dir={runs}", "run_name=whole")
    assert done.returncode == 0, done.stdout + done.stderr
    stale = [line["sample/staleness_max"] for line in lines(runs / "whole" / "metrics.jsonl")]
    assert stale == [float(step % EVERY > 0) for step in range(STEPS)], "it did not run ahead"
    return runs / "whole"


def start(run: Path, *arguments: str) -> subprocess.Popen[str]:
    where = [f"output_dir={run.parent}", f"run_name={run.name}"]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", *AHEAD, *arguments, *where],
        cwd=ROOT,
        env=os.environ | {MARK: str(run)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def steps_done(run: Path) -> int:
    return len(lines(run / "metrics.jsonl"))


def assert_same(run: Path, whole: Path) -> None:
    """Metrics of every step, the student, and the learner's whole state, bit by bit."""
    ours, theirs = (lines(r / "metrics.jsonl") for r in (run, whole))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1)) == [line["weights/version"] for line in ours]
    names = [name for name in theirs[0] if name.startswith(EXACT)]
    assert len(names) > 15
    for our, their in zip(ours, theirs, strict=True):
        assert {name: our[name] for name in names} == {name: their[name] for name in names}
    for file in ("export/model.safetensors", f"checkpoints/step_{STEPS}/learner/rank_0.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


def newest(run: Path, before: int) -> list[str]:
    """How to go on from the newest checkpoint of an earlier step; nothing if there is none."""
    found = [int(p.parent.name[5:]) for p in (run / "checkpoints").glob("step_*/manifest.json")]
    return [f"resume={max(step for step in found if step < before)}"] if found and min(found) < before else []


def kill_after(run: Path, step: int) -> int:
    """Go on from the newest checkpoint before `step`, SIGKILL the driver when `step` is done; how many were done."""
    resume = newest(run, step)
    if not resume and run.exists():  # killed before its first checkpoint: that is another start
        run.rename(run.with_name(f"{run.name}-before-{step}"))
    driver = start(run, "steps=500", *resume)
    begun = False

    def reached() -> bool:
        nonlocal begun
        assert driver.poll() is None, driver.communicate()[0]
        begun = begun or steps_done(run) < step  # what the killed run had done after that checkpoint is cut off
        return begun and steps_done(run) >= step

    try:
        wait_until(reached, 300, f"step {step}", 0.02)
        done = steps_done(run)
        os.kill(driver.pid, signal.SIGKILL)
        end_of(driver)
        nobody_is_left(str(run))
    finally:
        end_family(str(run))
    assert driver.returncode == -signal.SIGKILL
    return done


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_that_is_killed_at_every_step_ends_as_one_that_was_not(whole: Path) -> None:
    run, kills = whole.parent / "killed", range(1, STEPS + 1)
    done = [kill_after(run, step) for step in kills]
    assert all(step <= n <= step + 2 for step, n in zip(kills, done, strict=True)), f"too late: {done} for {kills}"
    ended = opd("train", *AHEAD, f"output_dir={run.parent}", f"run_name={run.name}", *newest(run, STEPS))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_same(run, whole)
