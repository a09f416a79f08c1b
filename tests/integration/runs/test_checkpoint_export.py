"""A checkpoint, put together on a CPU without other ranks, is bit by bit what the ranks export themselves."""

from dataclasses import replace
from pathlib import Path

import pytest

from learner.checkpoints.merge import Origin, export_checkpoint
from learner.config import LoraConfig
from opd.errors import ConfigurationError, DataError
from opd.settings.devices import Dtype
from tests.small_learner import SMOOTH, STAGES, Likelihood, Start, batches_of, keep

CONFIG = replace(SMOOTH, eps=1e-8, lr=1e-2)
LORA = LoraConfig(r=2, target_modules=("q_proj", "down_proj"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Flat partitions (stages 1 and 2) are told apart by the tied student alone.
KINDS = [(*each, kind) for each in STAGES for kind in ("tied", "untied", "lora") if kind == "tied" or each[0] in (0, 3)]


@pytest.mark.parametrize(("stage", "dtype", "kind"), KINDS, ids=str)
def test_a_checkpoint_gives_what_its_ranks_export(
    stage: int, dtype: Dtype, kind: str, models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    lora = LORA if kind == "lora" else LoraConfig()
    student = models["untied" if kind == "untied" else "tied"]
    rank = start(replace(CONFIG, zero_stage=stage, dtype=dtype, lora=lora), student)
    for step in range(2):
        rank.step(batches_of(step, CONFIG)[0], Likelihood())
    rank.export(tmp_path / "ranks")
    keep(rank, tmp_path / "step_2", 2)
    rank.step(batches_of(2, CONFIG)[0], Likelihood())
    origin = Origin(student=str(student), dtype=dtype, lora=lora, seed=0)
    export_checkpoint(tmp_path / "step_2", origin, tmp_path / "alone")
    assert files(tmp_path / "alone") == files(tmp_path / "ranks") and (tmp_path / "alone" / "config.json").exists()


def test_a_checkpoint_of_another_student_is_refused(models: dict[str, Path], start: Start, tmp_path: Path) -> None:
    rank = start(CONFIG, models["tied"])
    keep(rank, tmp_path / "step_1", 1)
    origin = Origin(student=str(models["untied"]), dtype=Dtype.FLOAT32, lora=LoraConfig(), seed=0)
    with pytest.raises(ConfigurationError, match="needs a student with model="):
        export_checkpoint(tmp_path / "step_1", origin, tmp_path / "out")
    (tmp_path / "step_1" / "rank_0.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="is no 'opd learner shard"):
        export_checkpoint(tmp_path / "step_1", origin, tmp_path / "out")
    assert not (tmp_path / "out").exists()
