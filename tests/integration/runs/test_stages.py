"""A run with stages that was cut off in its second one ends bit by bit as one that was not, and repeats nothing."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command import opd
from tests.integration.runs.test_train import lines

OWN = ["experiment=shop", "doctor=false", "tracker=none", "prompts.prompts_per_step=8", "checkpoint_every=1"]
OWN += ["evaluation.every=0", "evaluation.samples=1", "evaluation.teacher=false", "learner.deterministic=true"]
OWN += ["evaluation.prompts.prompts_per_step=8", "evaluation.reverse_kl_prompts=8", "checkpoint_keep=3"]
STAGES = ["stages.cold.method=cold_start", "stages.cold.method.rollout.at_least=1", "stages.cold.steps=2"]
STAGES += ["stages.opd.method=topk_reverse_kl", "stages.opd.steps=3", "stages.opd.prompts.seed=5"]


def cut(run: Path) -> None:
    """What a SIGKILL after the second step of the second stage leaves: no outcome, no export, a stale line."""
    second = run / "2-opd"
    shutil.rmtree(second / "checkpoints" / "step_3")
    shutil.rmtree(second / "checkpoints" / "step_2")  # as if it had not been written to its end
    shutil.rmtree(second / "export")
    (second / "export").mkdir()
    (second / "summary.json").unlink()


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_cut_off_in_its_second_stage_ends_as_one_that_was_not(tmp_path: Path) -> None:
    done = opd("train", *OWN, *STAGES, f"output_dir={tmp_path}", "run_name=whole")
    assert done.returncode == 0, done.stdout + done.stderr
    whole, again = tmp_path / "whole", tmp_path / "again"
    first = whole / "1-cold"
    assert (first / "export" / "model.safetensors").read_bytes() != (
        whole / "2-opd" / "export" / "model.safetensors"
    ).read_bytes()
    told = lines(first / "metrics.jsonl")
    assert all(0 <= line["sample/left_out"] < 1 and 0 < line["reward/mean"] <= 1 for line in told)
    assert told[-1]["ledger/issued"] == 16 == told[-1]["ledger/trained"] + told[-1].get("ledger/dropped", 0)

    shutil.copytree(whole, again)
    cut(again)
    before = {path: path.stat().st_mtime_ns for path in (again / "1-cold").rglob("*") if path.is_file()}
    done = opd("train", *OWN, *STAGES, f"output_dir={tmp_path}", "run_name=again", "resume=latest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 1 of 2, cold: finished before" in done.stdout and "going on after step 1" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (again / "1-cold").rglob("*") if path.is_file()}

    ours, theirs = (lines(run / "2-opd" / "metrics.jsonl") for run in (again, whole))
    exact = [k for k in theirs[0] if k.startswith(("actor/", "distill/", "tokens/", "flops/", "ledger/", "sample/"))]
    assert len(exact) > 15 and [line["step"] for line in ours] == [1, 2, 3]
    assert [{k: line[k] for k in exact} for line in ours] == [{k: line[k] for k in exact} for line in theirs]
    for file in ("export/model.safetensors", "checkpoints/step_3/learner/rank_0.safetensors"):
        assert (again / "2-opd" / file).read_bytes() == (whole / "2-opd" / file).read_bytes(), file
    assert json.loads((again / "2-opd" / "summary.json").read_text())["outcome"] == "finished"
