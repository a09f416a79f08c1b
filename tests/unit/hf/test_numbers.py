"""Dtypes of engine, learner and teacher that do not fit are refused or said when a run is planned."""

import pytest

from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.devices import resolved
from launch.plan.checks.numbers import FINEST, check_numbers, numbers_notes
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
