"""What vLLM is told when an engine starts on a GPU, where there is none to start it on."""

import pytest
import torch

from actors.config import StudentConfig, environment
from actors.startup import engine_arguments
from opd.settings.devices import Device, Dtype

GPU = torch.device("cuda", 0)


def engine(**fields: object) -> StudentConfig:
    return StudentConfig(**({"path": "x", "max_model_len": 4096, "dtype": Dtype.AUTO} | fields))  # pyright: ignore


@pytest.mark.parametrize(("parallel", "backend"), [(1, "uni"), (2, "mp"), (8, "mp")])
def test_vllm_never_chooses_ray_for_its_workers(parallel: int, backend: str) -> None:
    """In a placement group it would, and then ask for one bundle per worker."""
    assert engine_arguments(engine(tensor_parallel=parallel), GPU)["distributed_executor_backend"] == backend


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 8192), (256, 8192), (10_000, 10_000)])
def test_the_prefill_budget_is_said(sequences: int, tokens: int) -> None:
    assert engine_arguments(engine(max_num_seqs=sequences), GPU)["max_num_batched_tokens"] == tokens


def test_the_cache_is_measured_by_vllm_or_has_the_size_that_is_asked() -> None:
    assert "kv_cache_memory_bytes" not in engine_arguments(engine(), GPU)
    assert engine_arguments(engine(kv_cache_bytes=3 << 30), GPU)["kv_cache_memory_bytes"] == 3 << 30


@pytest.mark.parametrize("device", list(Device))
def test_float32_attention_is_float32(device: Device) -> None:
    """Triton's dot products default to TF32, 2e-3 nats from the learner on the embedded pair."""
    assert environment(device)["TRITON_F32_DEFAULT"] == "ieee"
