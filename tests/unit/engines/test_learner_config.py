"""What can be set about training: a field takes what fits, and what cannot work is refused by name."""

from typing import Any

import pytest
import torch

from launch.config.typed import construct
from learner.config import LearnerConfig, LoraConfig, environment
from learner.learner import LearnerRank
from learner.schedule import Schedule
from opd.errors import ConfigurationError
from opd.settings.devices import Device, Dtype
from weight_sync.shared_memory import SharedMemory


def rank_of(config: LearnerConfig) -> LearnerRank:
    return LearnerRank(config, "nowhere", (), 1, 0, lambda handle: handle, SharedMemory)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": 0},
        {"zero_stage": 4},
        {"lr": 0.0},
        {"beta2": 1.0},
        {"final_lr_fraction": 2.0},
        {"head_chunk": -1},
        {"overlap_k": -1},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=rf"LearnerConfig\.{name} needs .*, got {wrong[name]}"):
        LearnerConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"r": -1}, {"lora_alpha": 0.0}, {"target_modules": ()}])
def test_an_adapter_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"LoraConfig\.{next(iter(wrong))} needs .*, got"):
        LoraConfig(**wrong)


def test_no_adapter_has_no_scale() -> None:
    assert LearnerConfig().lora == LoraConfig() and LoraConfig().scale == 0.0
    assert LoraConfig(r=8, lora_alpha=16).scale == 2.0


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="float32 master weights"):
        LearnerConfig(zero_stage=0, dtype=Dtype.BFLOAT16)
    with pytest.raises(ConfigurationError, match="needs setup"):
        rank_of(LearnerConfig()).share(0)
    with pytest.raises(ConfigurationError, match="as many as configured"):
        rank_of(LearnerConfig()).setup(0, 2, "localhost", 1)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="sees no CUDA device"):
            rank_of(LearnerConfig(device=Device.GPU)).setup(0, 1, "localhost", 1)


def test_what_is_asked_of_a_rank_before_or_after_its_life_is_harmless_or_refused() -> None:
    rank = rank_of(LearnerConfig())
    assert rank.stats() == {"busy_s": 0.0, "peak_memory_bytes": 0.0}
    rank.close()
    host, port = rank.address()
    assert host and 0 < port < 65536


def test_yaml_may_name_every_field() -> None:
    config = construct(LearnerConfig, {"schedule": "cosine", "zero_stage": 3}, "learner")
    assert isinstance(config, LearnerConfig)
    assert config.schedule is Schedule.COSINE and config.zero_stage == 3


def test_only_a_rank_on_a_cpu_is_told_so() -> None:
    assert "DS_ACCELERATOR" not in environment(Device.GPU) | environment(Device.AUTO)
    assert environment(Device.CPU)["DS_ACCELERATOR"] == "cpu"
    assert all(isinstance(value, str) for value in environment(Device.CPU).values())
