"""What can be set about training: a field takes what fits, and what cannot work is refused by name."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.config.typed import construct
from learner.config import (
    LearnerConfig,
    LoraConfig,
    LossKernel,
    StudentText,
    Transport,
    environment,
    learning_rate,
)
from learner.learner import LearnerRank
from learner.schedule import Schedule
from opd.errors import ConfigurationError
from opd.settings.auto import Auto
from opd.settings.devices import Device, Dtype
from weight_sync.shared_memory import SharedMemorySender


def rank_of(config: LearnerConfig) -> LearnerRank:
    return LearnerRank(config, "nowhere", (), 1, 0, lambda handle: handle, SharedMemorySender)


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
    assert rank.busy_s() == 0.0
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


def test_what_is_not_set_is_what_the_docs_say() -> None:
    """A run that names nothing trains as it did: one number that changes here changes all runs."""
    assert asdict(LearnerConfig()) == {
        "ranks": 1, "zero_stage": Auto.AUTO, "offload_optimizer": False, "dtype": Dtype.AUTO, "device": Device.AUTO,
        "lr": 5e-6, "beta1": 0.9,
        "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 1.0, "warmup_steps": 5,
        "schedule": Schedule.CONSTANT_WITH_WARMUP, "final_lr_fraction": 0.0, "decay_steps": 0,
        "tokens_per_microbatch": 8192, "head_chunk": 0, "loss_kernel": LossKernel.TORCH, "overlap_k": 16,
        "gradient_checkpointing": Auto.AUTO, "sentinel_tolerance": 0.0, "publish_chunk_bytes": 256 * 2**20,
        "transport": Transport.AUTO, "deadline_s": 600.0, "max_skipped_steps": 3, "deterministic": False,
        "lora": {"r": 0, "lora_alpha": 16.0, "target_modules": ("all-linear",)},
    }  # fmt: skip
    assert StudentText() == StudentText(ends=(), sentinel=())


@pytest.mark.parametrize(
    ("field", "fine", "wrong"),
    [("lr", (1e-12, 1.0), (0.9e-12, 1.01)), ("beta1", (0.0, 0.999), (-0.1, 1.0)), ("beta2", (0.0, 0.999), (-0.1, 1.0))],
)
def test_ranges_end_where_their_sentences_say(field: str, fine: tuple[float, ...], wrong: tuple[float, ...]) -> None:
    for value in fine:
        LearnerConfig(**{field: value})
    for value in wrong:
        with pytest.raises(ConfigurationError, match=rf"LearnerConfig\.{field} needs"):
            LearnerConfig(**{field: value})


def test_a_decay_and_its_length_come_together() -> None:
    LearnerConfig(schedule=Schedule.WARMUP_STABLE_DECAY, decay_steps=1)
    with pytest.raises(ConfigurationError, match=r"needs to know how many of the last updates fall, got .*=0"):
        LearnerConfig(schedule=Schedule.WARMUP_STABLE_DECAY)
    for schedule in set(Schedule) - {Schedule.WARMUP_STABLE_DECAY}:
        LearnerConfig(schedule=schedule)
        with pytest.raises(ConfigurationError, match=rf"decay_steps is 2, but learner.schedule={schedule.name} has no"):
            LearnerConfig(schedule=schedule, decay_steps=2)


LEARNERS = st.builds(
    LearnerConfig,
    dtype=st.sampled_from([Dtype.AUTO, Dtype.FLOAT32, Dtype.BFLOAT16]),
    zero_stage=st.sampled_from([Auto.AUTO, 1, 2, 3]),
    gradient_checkpointing=st.sampled_from([Auto.AUTO, True, False]),
)


@given(LEARNERS, st.booleans(), st.sampled_from(Dtype))
def test_the_device_decides_what_is_not_told(config: LearnerConfig, on_gpu: bool, engine: Dtype) -> None:
    """What is told stays, nothing is left open, and to decide again changes nothing."""
    now = config.decided(on_gpu=on_gpu, engine=engine)
    assert now.decided(on_gpu=not on_gpu) == now
    assert now.dtype is not Dtype.AUTO and now.stage in range(4) and now.checkpointed in (True, False)
    for name in ("dtype", "zero_stage", "gradient_checkpointing"):
        was = getattr(config, name)
        assert was in (Dtype.AUTO, Auto.AUTO) or getattr(now, name) is was


@pytest.mark.parametrize(
    ("on_gpu", "engine", "told", "expected"),
    [
        (True, Dtype.AUTO, {}, (Dtype.BFLOAT16, 2, True)),
        (True, Dtype.FLOAT32, {}, (Dtype.FLOAT32, 0, True)),
        (True, Dtype.AUTO, {"zero_stage": 0}, (Dtype.FLOAT32, 0, True)),
        (True, Dtype.AUTO, {"zero_stage": 3, "gradient_checkpointing": False}, (Dtype.BFLOAT16, 3, False)),
        (False, Dtype.BFLOAT16, {}, (Dtype.FLOAT32, 0, False)),
        (False, Dtype.AUTO, {"dtype": Dtype.BFLOAT16}, (Dtype.BFLOAT16, 2, False)),
        (False, Dtype.AUTO, {"offload_optimizer": True}, (Dtype.FLOAT32, 2, False)),
    ],
)
def test_a_gpu_gets_bfloat16_zero_2_and_checkpoints(
    on_gpu: bool, engine: Dtype, told: dict[str, Any], expected: tuple[Dtype, int, bool]
) -> None:
    now = LearnerConfig(**told).decided(on_gpu=on_gpu, engine=engine)
    assert (now.dtype, now.stage, now.checkpointed) == expected


def test_the_shipped_settings_for_gpus_are_what_a_gpu_gets() -> None:
    shipped, default = run_config(["learner=gpu"]).learner, run_config(["learner=default"]).learner
    assert shipped.decided(on_gpu=False) == shipped
    now = default.decided(on_gpu=True)
    names = ("dtype", "zero_stage", "gradient_checkpointing")
    assert [getattr(now, name) for name in names] == [getattr(shipped, name) for name in names]


def test_16_bits_without_masters_are_refused() -> None:
    LearnerConfig(dtype=Dtype.FLOAT32, zero_stage=0)
    for stage in (1, 2, 3):
        LearnerConfig(dtype=Dtype.BFLOAT16, zero_stage=stage)


def test_the_rate_of_an_update_is_that_of_its_schedule() -> None:
    config = LearnerConfig(
        schedule=Schedule.WARMUP_STABLE_DECAY, lr=0.1, warmup_steps=2, decay_steps=4, final_lr_fraction=0.5
    )
    rates = [learning_rate(config, update, 10) for update in range(11)]
    assert rates[:7] == pytest.approx([0.05, 0.075, *[0.1] * 5])
    assert rates[6:] == sorted(rates[6:], reverse=True) and 0.05 < rates[9] < rates[7]
    assert rates[10] == pytest.approx(0.05)


def test_a_rank_on_a_host_keeps_the_memory_that_glibc_lets_it_keep() -> None:
    """32 MiB is the most that glibc takes for one block; the others are those of docs/benchmarks.md."""
    host = {
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20), "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={256 << 10}",
    }  # fmt: skip
    assert environment(Device.CPU).items() >= environment(Device.AUTO).items() >= host.items()
    assert not environment(Device.GPU).keys() & host.keys()


def test_an_optimizer_in_host_memory_needs_weights_of_its_own() -> None:
    for stage in (1, 2, 3):
        LearnerConfig(offload_optimizer=True, zero_stage=stage)
    with pytest.raises(ConfigurationError, match=r"offload_optimizer=true needs .*; set learner.zero_stage=2, or"):
        LearnerConfig(offload_optimizer=True, zero_stage=0, dtype=Dtype.FLOAT32)
