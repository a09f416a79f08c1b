"""A learner goes on from its checkpoint as if nothing had happened, and reads no checkpoint that is not whole."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from learner.checkpoints.checkpoint import shard_name
from learner.learner import LearnerRank
from learner.schedule import Schedule
from opd.errors import ConfigurationError, DataError, OpdError
from opd.settings.devices import Dtype
from opd.types import StepReport
from tests.small_learner import SMOOTH, STAGES, STEPS, Likelihood, Start, batches_of, keep, parameters
from weight_sync.receiver import assemble

CONFIG = replace(SMOOTH, eps=1e-8, lr=1e-2, schedule=Schedule.LINEAR, weight_decay=0.1, warmup_steps=3)


def steps(rank: LearnerRank, first: int, last: int) -> list[StepReport]:
    return [rank.step(batches_of(step, CONFIG)[0], Likelihood()) for step in range(first, last)]


@pytest.mark.parametrize(
    ("stage", "dtype"),
    STAGES,
    ids=str,
)
def test_a_run_cut_at_any_step_ends_bit_by_bit_as_the_whole(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    config = replace(CONFIG, zero_stage=stage, dtype=dtype)
    whole = start(config, models["tied"])
    reports = []
    for step in range(STEPS):
        keep(whole, tmp_path / f"step_{step}", step)
        reports += steps(whole, step, step + 1)
    end = whole.share(STEPS)
    for cut in range(STEPS) if stage in (0, 2) else (0, 3):
        resumed = start(config, models["tied"])
        assert resumed.load(tmp_path / f"step_{cut}") == cut
        assert steps(resumed, cut, STEPS) == reports[cut:]
        again = resumed.share(STEPS)
        assert assemble([again]).digest == assemble([end]).digest


def test_what_is_written_is_the_moment_of_save(models: dict[str, Path], start: Start, tmp_path: Path) -> None:
    """Training goes on while the file is written; the file knows nothing of it."""
    rank = start(CONFIG, models["tied"])
    steps(rank, 0, 1)
    then = parameters(rank.share(1))
    rank.save(tmp_path, 1)
    steps(rank, 1, 2)
    name, digest = rank.written()
    assert name == shard_name(0) and len(digest) == 32
    with safe_open(str(tmp_path / name), framework="pt") as file:
        for parameter, value in then.items():
            assert torch.equal(file.get_tensor(f"master/0/{parameter}"), value.view(-1))
        assert any("exp_avg_sq/" in key and file.get_tensor(key).any() for key in file.keys())  # noqa: SIM118


def test_one_stage_reads_what_another_wrote(models: dict[str, Path], start: Start, tmp_path: Path) -> None:
    first = start(replace(CONFIG, zero_stage=2), models["untied"])
    steps(first, 0, 2)
    keep(first, tmp_path, 2)
    rest = steps(first, 2, 4)
    for stage in (0, 1, 3):
        other = start(replace(CONFIG, zero_stage=stage), models["untied"])
        other.load(tmp_path)
        for ours, theirs in zip(steps(other, 2, 4), rest, strict=True):
            assert (ours.loss, ours.grad_norm, ours.lr) == pytest.approx((theirs.loss, theirs.grad_norm, theirs.lr))


def test_what_is_no_checkpoint_is_refused_in_one_sentence(
    models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    rank = start(CONFIG, models["tied"])
    path = keep(rank, tmp_path / "step_1", 1) / shard_name(0)
    with pytest.raises(ConfigurationError, match="needs a student with model="):
        start(CONFIG, models["untied"]).load(path.parent)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="is no 'opd learner shard"):
        rank.load(path.parent)
    path.write_bytes(content.replace(b'"ranks\\": 1', b'"ranks\\": 2').replace(b'\\"ranks\\": 1', b'\\"ranks\\": 2'))
    with pytest.raises(DataError, match=r"lacks rank_1\.safetensors"):
        rank.load(path.parent)
    path.write_bytes(b"\x08" + bytes(7) + b"{}      ")
    with pytest.raises(DataError, match="its format is None"):
        rank.load(path.parent)
    path.unlink()
    with pytest.raises(DataError, match=r"lacks rank_0\.safetensors"):
        rank.load(path.parent)


def test_a_disk_that_cannot_be_written_is_one_sentence(models: dict[str, Path], start: Start, tmp_path: Path) -> None:
    rank = start(CONFIG, models["tied"])
    rank.save(tmp_path / "nowhere", 1)
    with pytest.raises(OpdError, match=r"cannot write .*No such file.*make room or choose another output_dir"):
        rank.written()
    if Path("/dev/full").exists():
        os.symlink("/dev/full", tmp_path / shard_name(0))
        rank.save(tmp_path, 1)
        with pytest.raises(OpdError, match="No space left on device"):
            rank.written()
    steps(rank, 0, 1)  # training itself is not harmed
