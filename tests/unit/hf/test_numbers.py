"""Dtypes of engine, learner and teacher that do not fit are refused or said when a run is planned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hf.folder import Stored
from hf.folder_check import Folder, read_folder
from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.devices import resolved
from launch.plan.checks.numbers import FINEST, check_numbers, numbers_notes, processor_notes
from opd.errors import ConfigurationError
from opd.settings.devices import Dtype

BF16 = ["learner.dtype=BFLOAT16", "learner.zero_stage=1"]


def config(*overrides: str) -> RunConfig:
    return resolved(run_config(list(overrides)))


@pytest.mark.parametrize("coarse", [["student.dtype=BFLOAT16"], BF16, [*BF16, "student.dtype=BFLOAT16"]])
def test_a_tolerance_that_bfloat16_cannot_keep_is_refused(coarse: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"sentinel_tolerance=0\.0001 asks .* than BFLOAT16 can"):
        check_numbers(config(*coarse, "learner.sentinel_tolerance=1e-4"))
    check_numbers(config(*coarse))  # measured when the run starts
    check_numbers(config(*coarse, f"learner.sentinel_tolerance={FINEST[Dtype.BFLOAT16]}"))
    check_numbers(config("learner.sentinel_tolerance=1e-4"))


def test_an_engine_that_rounds_otherwise_than_the_learner_is_said() -> None:
    assert numbers_notes(config()) == []
    assert numbers_notes(config(*BF16, "student.dtype=BFLOAT16")) == []
    (note,) = numbers_notes(config("student.dtype=BFLOAT16"))
    assert "the engine writes in BFLOAT16, the learner reads in FLOAT32" in note


def test_float32_on_a_gpu_is_said() -> None:
    (note,) = numbers_notes(config("learner.device=GPU", "learner.dtype=FLOAT32"))
    assert "FLOAT32 on a GPU" in note and "learner.dtype=BFLOAT16" in note


def stored_in(dtype: str, part: str = "student") -> Folder:
    """A folder of the embedded demo whose tensors are all of one dtype."""
    folder = read_folder(f"assets/shop/{part}", part)
    one = Stored(file=Path("model.safetensors"), dtype=dtype, shape=(1,))
    return replace(folder, stored=dict.fromkeys(folder.stored, one))


def said(*overrides: str, stored: str = "F32", teacher: str = "F32") -> list[str]:
    return processor_notes(config(*overrides), stored_in(stored), {"default": stored_in(teacher, "teacher")})


def test_bfloat16_on_a_processor_without_it_is_said(processor: Callable[[str], None]) -> None:
    processor("avx2 avx512f")
    assert said() == []
    (note,) = said("student.dtype=BFLOAT16", *BF16, "teacher.dtype=BFLOAT16")
    assert "student.dtype and learner.dtype and teacher.dtype are BFLOAT16" in note
    assert "set student.dtype=FLOAT32 learner.dtype=FLOAT32 teacher.dtype=FLOAT32, if memory" in note
    (note,) = said("student.dtype=BFLOAT16")
    assert note.startswith("student.dtype is BFLOAT16, for which this machine's processor has no instructions")
    remote = ["teacher.backend=HTTP", "teacher.url=http://127.0.0.1:8000"]
    assert said("teacher.dtype=BFLOAT16", *remote) == [], "its server's processor is another"
    assert said("teacher.dtype=BFLOAT16", teacher="I32") == [], "quantized numbers need it"
    assert said("student.dtype=BFLOAT16", "cluster=existing") == [], "another machine's processor"
    assert said("student.dtype=BFLOAT16", "student.device=GPU") == [], "a GPU"
    for flags in ("avx512_bf16", "amx_tile"):
        processor(f"avx2 {flags}")
        assert said("student.dtype=BFLOAT16", *BF16, "teacher.dtype=BFLOAT16") == []


def test_what_amx_could_gain_is_said_where_the_weights_lose_nothing(processor: Callable[[str], None]) -> None:
    processor("avx2 avx512_bf16 amx_tile")
    (note,) = said(stored="BF16")
    assert "student.dtype=BFLOAT16 learner.dtype=BFLOAT16 may be faster" in note and "0.0078 nats" in note
    assert said() == [], "weights stored in float32 would be rounded"
    assert said("student.dtype=BFLOAT16", *BF16, stored="BF16") == []
    processor("avx2 avx512_bf16")
    assert said(stored="BF16") == []
