"""What vLLM is told when an engine starts on a GPU, where there is none to start it on."""

import pytest
import torch

from actors.config import StudentConfig, environment
from actors.startup import engine_arguments
from launch.config.run_config import run_config
from launch.plan.checks.settings import check_settings
from opd.errors import ConfigurationError
from opd.settings.devices import Device, Dtype

GPU = torch.device("cuda", 0)


def engine(**fields: object) -> StudentConfig:
    return StudentConfig(**({"path": "x", "max_model_len": 4096, "dtype": Dtype.AUTO} | fields))  # pyright: ignore


@pytest.mark.parametrize(("parallel", "backend"), [(1, "uni"), (2, "mp"), (8, "mp")])
def test_vllm_never_chooses_ray_for_its_workers(parallel: int, backend: str) -> None:
    """In a placement group it would, and then ask for one bundle per worker."""
    assert engine_arguments(engine(tensor_parallel=parallel), GPU)["distributed_executor_backend"] == backend


@pytest.mark.parametrize(
    ("sequences", "told", "tokens"), [(1, 0, 8192), (256, 0, 8192), (10_000, 0, 10_000), (64, 16384, 16384)]
)
def test_the_prefill_budget_is_said(sequences: int, told: int, tokens: int) -> None:
    config = engine(max_num_seqs=sequences, max_num_batched_tokens=told)
    assert engine_arguments(config, GPU)["max_num_batched_tokens"] == tokens


def test_a_step_on_a_processor_reads_a_whole_prompt() -> None:
    """Prompts are not cut there."""
    config = engine(max_model_len=20_000)
    assert engine_arguments(config, torch.device("cpu"))["max_num_batched_tokens"] == 20_000


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_a_step_too_small_for_vllm_is_refused(device: str) -> None:
    """With what vLLM needs: a token of each sequence, on a processor a whole prompt."""
    told = [f"student.device={device}", "student.max_num_seqs=8", "student.max_model_len=128"]
    least = 8 if device == "GPU" else 128
    config = run_config(["experiment=shop", *told, f"student.max_num_batched_tokens={least - 1}"])
    with pytest.raises(ConfigurationError, match=rf"too few: .* set student.max_num_batched_tokens={least} at least"):
        check_settings(config)
    check_settings(run_config(["experiment=shop", *told, f"student.max_num_batched_tokens={least}"]))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (["student.device=CPU"], "but these engines work on processors; leave it false"),
        (["student.device=GPU", "method=trb"], "which the blends of method trb read; leave it false"),
    ],
)
def test_an_engine_schedules_ahead_on_gpus_alone(told: list[str], said: str) -> None:
    assert engine_arguments(engine(async_scheduling=True), GPU)["async_scheduling"]
    assert not engine_arguments(engine(), GPU)["async_scheduling"]
    with pytest.raises(ConfigurationError, match=said):
        check_settings(run_config(["experiment=shop", *told, "student.async_scheduling=true"]))
    check_settings(run_config(["experiment=shop", "student.device=GPU", "student.async_scheduling=true"]))


def test_the_cache_is_measured_by_vllm_or_has_the_size_that_is_asked() -> None:
    assert "kv_cache_memory_bytes" not in engine_arguments(engine(), GPU)
    assert engine_arguments(engine(kv_cache_bytes=3 << 30), GPU)["kv_cache_memory_bytes"] == 3 << 30


@pytest.mark.parametrize("device", list(Device))
def test_float32_attention_is_float32(device: Device) -> None:
    """Triton's dot products default to TF32, 2e-3 nats from the learner on the embedded pair."""
    assert environment(device)["TRITON_F32_DEFAULT"] == "ieee"
