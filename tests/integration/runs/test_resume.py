"""A run that was killed goes on as if nothing had happened: the same losses, the same weights, no line twice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.command import ROOT, opd
from tests.fault_matrix import Witness
from tests.integration.runs.test_train import SMALL, lines
from tests.processes import MARK, end_family, end_of, family, nobody_is_left, wait_until

OWN = [*SMALL, "steps=6", "evaluation.every=2", "learner.deterministic=true", "checkpoint_every=2"]
OWN += ["evaluation.teacher=false", "learner.schedule=CONSTANT"]  # so that `steps` may differ until it is killed


def interrupted(how: signal.Signals, when: int, runs: Path, *arguments: str) -> tuple[int, str]:
    """A run named `cut` that gets a signal once `when` steps are done and a checkpoint is there."""
    mark, run = f"resume-{os.getpid()}-{how}", runs / "cut"
    driver = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", *arguments, f"output_dir={runs}", "run_name=cut"],
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def reached() -> bool:
        assert driver.poll() is None, driver.communicate()[0]
        enough = len(lines(run / "metrics.jsonl")) >= when
        return enough and (how == signal.SIGTERM or any((run / "checkpoints").glob("step_*/manifest.json")))

    try:
        wait_until(reached, 200, f"{when} steps")
        if how == signal.SIGKILL:  # the lock says so
            few = "steps=6"  # if it is let in after all, it ends soon
            refused = opd("train", *arguments, few, f"output_dir={runs}", "run_name=cut", "resume=latest")
            assert refused.returncode == 2 and "is still running" in refused.stderr, refused.stderr
        assert len(family(mark)) > 4
        os.kill(driver.pid, how)
        output = end_of(driver)
        nobody_is_left(mark)
    finally:
        end_family(mark)
    return driver.returncode, output


@pytest.mark.ray
@pytest.mark.timeout(1200)  # several runs, one after the other
def test_a_killed_run_ends_bit_by_bit_as_one_that_was_not(tmp_path: Path) -> None:
    follow = ["method=topk_reverse_kl", "teacher.mixup=0.1", "teacher.mixup_every=2", "doctor=false"]
    follow += [f"teacher.path={ROOT / 'assets' / 'shop' / 'student'}"]
    own = [*OWN, *follow]
    done = opd("train", *own, f"output_dir={tmp_path}", "run_name=whole")
    assert done.returncode == 0, done.stdout + done.stderr
    turns = "cluster.share=TIME"  # by turns or all resident, the numbers are the same
    slow = [*own, turns, "steps=500", "checkpoint_keep=500"]  # harmless, and keeps it from ending before it is killed
    interrupted(signal.SIGKILL, 3, tmp_path, *slow)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert not (cut / "summary.json").exists()
    done = opd("train", *own, turns, f"output_dir={tmp_path}", "run_name=cut", "resume=2")
    assert done.returncode == 0, done.stdout + done.stderr

    first, second = lines(whole / "metrics.jsonl"), lines(cut / "metrics.jsonl")
    assert [m["step"] for m in second] == [1, 2, 3, 4, 5, 6] == [m["weights/version"] for m in second]
    exact = [k for k in first[0] if k.startswith(("actor/", "distill/", "tokens/", "flops/", "ledger/", "response"))]
    assert len(exact) > 15
    for ours, theirs in zip(second, first, strict=True):
        assert {k: ours[k] for k in exact} == {k: theirs[k] for k in exact}
    assert (cut / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    for name in ("rank_0.safetensors",):  # weights and both moments; the schedule and the random state, too
        shards = [run / "checkpoints" / "step_6" / "learner" / name for run in (cut, whole)]
        assert shards[0].read_bytes() == shards[1].read_bytes()
    teachers = [run / "checkpoints" / "step_6" / "teacher_default.safetensors" for run in (cut, whole)]
    assert teachers[0].read_bytes() == teachers[1].read_bytes()

    told = [[(e["step"], e["examinee"]) for e in lines(run / "evaluations.jsonl")] for run in (whole, cut)]
    assert told[0] == told[1]
    summary = [json.loads((run / "summary.json").read_text()) for run in (whole, cut)]
    assert summary[1]["outcome"] == "finished"
    for key in ("steps", "tokens", "flops", "ledger"):
        assert summary[0][key] == summary[1][key], key
    assert summary[0]["student_start"]["greedy"] == summary[1]["student_start"]["greedy"]
    ids = {path.name.rpartition("-")[2] for path in (cut / "wandb").glob("offline-run-*")}
    assert ids == {(cut / "wandb_id").read_text()}, "another wandb run"
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == ["step_4", "step_6"]  # checkpoint_keep=2
    _refusals(cut, own)
    _a_new_run_from(cut / "checkpoints" / "step_6", own)


def _a_new_run_from(place: Path, own: list[str]) -> None:
    """It takes the next step of the run that the checkpoint belongs to, and is a run of its own."""
    runs, cut = place.parents[2], place.parents[1]
    done = opd("train", *own, "steps=7", f"output_dir={runs}", "run_name=next", f"resume={place}")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lines(runs / "next" / "metrics.jsonl")
    assert line["step"] == 7
    assert line["tokens/completion"] > lines(cut / "metrics.jsonl")[-1]["tokens/completion"]
    assert yaml.safe_load((runs / "next" / "config.yaml").read_text())["resume"] == str(place)


def _refusals(run: Path, own: list[str]) -> None:
    """On the finished run: each is one sentence with exit code 2 or 1, and changes nothing."""
    before = (run / "metrics.jsonl").read_bytes(), (run / "summary.json").read_bytes()
    where = [f"output_dir={run.parent}", "run_name=cut"]
    for arguments, sentence in (
        (["resume=latest"], "has finished its 6 steps; raise steps"),
        (["resume=2"], r"no checkpoint of step 2 (have: 6, 4)"),
        (["resume=latest", "seed=1"], "was made with seed=0, but this run has seed=1"),
        (["resume=latest", f"teacher.path={ROOT / 'assets' / 'peak' / 'student'}"], "teacher 'default' of fingerprint"),
    ):
        done = opd("train", *own, *where, *arguments)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert before == ((run / "metrics.jsonl").read_bytes(), (run / "summary.json").read_bytes())


@pytest.mark.ray
@pytest.mark.faults("driver told to stop", "another layout resumes", "checkpoint damaged")
@pytest.mark.timeout(1200)  # several runs, one after the other
def test_sigterm_saves_and_another_layout_goes_on(tmp_path: Path, witness: Witness) -> None:
    """Exit code 75; a damaged checkpoint is passed over; two ranks and two actors go on where one of each stopped, in
    the same order; their many small chunks travel through Ray's store."""
    own = [*OWN, "evaluation.every=0", "evaluation.on_start=false", "tracker.mode=DISABLED"]
    code, output = interrupted(signal.SIGTERM, 5, tmp_path, *own, "steps=200")
    assert code == 75 and "resume=latest goes on" in output and "Traceback" not in output, output
    witness("driver told to stop")
    run = tmp_path / "cut"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "stopped" and not summary["error"]
    newest, older = sorted((int(p.name[5:]) for p in (run / "checkpoints").iterdir()), reverse=True)[:2]
    assert newest == summary["steps"] == len(lines(run / "metrics.jsonl"))
    straight = lines(run / "metrics.jsonl")[older:]
    (shard,) = (run / "checkpoints" / f"step_{newest}" / "learner").iterdir()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (run / "checkpoints" / ".step_1.partial").mkdir()

    layout = ["learner.ranks=2", "learner.zero_stage=2", "student.replicas=2", "learner.tokens_per_microbatch=300"]
    layout += ["learner.publish_chunk_bytes=20000", "learner.transport=OBJECT_STORE", "cluster.share=TIME"]
    done = opd("train", *own, *layout, f"steps={newest}", f"output_dir={tmp_path}", "run_name=cut", "resume=latest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped: " in done.stdout and "rank_0.safetensors has digest" in done.stdout
    witness("checkpoint damaged")
    witness("another layout resumes")
    again = lines(run / "metrics.jsonl")
    assert [m["step"] for m in again] == list(range(1, newest + 1))
    assert [m["actor/loss"] for m in again[older:]] == pytest.approx([m["actor/loss"] for m in straight], abs=1e-4)
    assert again[older]["tokens/prompt"] == straight[0]["tokens/prompt"], "other prompts"
    assert not (run / "checkpoints" / ".step_1.partial").exists()
    ended = json.loads((run / "summary.json").read_text())
    assert ended["student_start"] is None and ended["student_end"]["step"] == newest
