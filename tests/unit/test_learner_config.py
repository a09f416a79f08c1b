"""What can be set about training: the schedule is what it says, and what cannot work is refused by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from launch.typed import construct
from learner.config import LearnerConfig, LoraConfig, Schedule, environment, learning_rate
from learner.learner import LearnerRank
from opd.devices import Device, Dtype
from opd.errors import ConfigurationError
from opd.shared_memory import SharedMemory


def rank_of(config: LearnerConfig) -> LearnerRank:
    return LearnerRank(config, "nowhere", (), 1, 0, lambda handle: handle, SharedMemory)


def test_the_schedule_warms_up_and_ends_where_it_says() -> None:
    config = LearnerConfig(lr=0.2, warmup_steps=4, schedule=Schedule.LINEAR, final_lr_fraction=0.1)
    rates = [learning_rate(config, update, 101) for update in range(101)]
    assert rates[0] == pytest.approx(0.2 / 4)
    assert rates[50] == pytest.approx(0.2 * 0.55)
    assert rates[100] == learning_rate(config, 500, 101) == pytest.approx(0.02)
    cosine = replace(config, schedule=Schedule.COSINE)
    assert learning_rate(cosine, 50, 101) == pytest.approx(0.2 * 0.55)
    assert learning_rate(cosine, 25, 101) > learning_rate(config, 25, 101)
    constant = replace(config, schedule=Schedule.CONSTANT)
    assert {learning_rate(constant, update, 101) for update in range(3, 101)} == {0.2}
    assert learning_rate(replace(constant, warmup_steps=0), 0, 1) == 0.2


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
