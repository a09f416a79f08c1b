"""What the learner's ranks hold, read and tell DeepSpeed, without a training process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner.checkpoints import checkpoint
from learner.checkpoints.optimizer_shards import Fragment, _moments, host_copies
from learner.config import LearnerConfig, LoraConfig
from learner.engine import _settings, adam
from learner.lora import save_adapter
from learner.model import _layer, load_student
from opd.settings.devices import Dtype
from tests.tiny_models import VOCABULARY, save, tiny_model


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_what_all_hold_is_written_once_and_whole(zero_stage: int, ranks: int) -> None:
    """Of stage 0 each rank writes an equal part; under ZeRO each writes what it alone holds."""
    sizes = {"a": 10, "b": 1, "c": 6}
    held = [
        Fragment(parameter=name, start=4, state={checkpoint.MASTER: torch.arange(n) + 100.0})
        for name, n in sizes.items()
    ]
    for name, size in sizes.items():
        found: dict[int, float] = {}
        for rank in range(ranks if zero_stage == 0 else 1):
            pieces = host_copies([f for f in held if f.parameter == name], zero_stage, rank, ranks)
            for piece, values in pieces.items():
                start = next(at for at in range(99) if piece == checkpoint.piece_name(checkpoint.MASTER, at, name))
                assert not found.keys() & range(start, start + len(values)), "written twice"
                found |= {start + i: float(value) for i, value in enumerate(values)}
        assert found == {4 + i: 100.0 + i for i in range(size)}


@pytest.mark.parametrize(("numel", "bucket"), [(1000, 1000), (2_000_000_000, 500_000_000)])
def test_what_deepspeed_is_told(numel: int, bucket: int) -> None:
    told = _settings(LearnerConfig(zero_stage=2, dtype=Dtype.BFLOAT16, grad_clip=0.7), numel)
    assert told["zero_optimization"] == {"stage": 2, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    assert (told["gradient_clipping"], told["bf16"]) == (0.7, {"enabled": True})
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}, "many micro-batches add up"
    assert not told["zero_force_ds_cpu_optimizer"], "its own optimizer is compiled where it runs"
    moved = _settings(LearnerConfig(zero_stage=2, dtype=Dtype.BFLOAT16, offload_optimizer=True), numel)
    assert moved["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert told["train_micro_batch_size_per_gpu"] == told["gradient_accumulation_steps"] == 1
    plain = _settings(LearnerConfig(zero_stage=0, dtype=Dtype.FLOAT32, grad_clip=0.7), numel)
    assert plain["gradient_clipping"] == 0.0 and not {"bf16", "data_types"} & plain.keys()


def test_defaults_that_change_what_is_trained_or_how_fast() -> None:
    """As docs and the plan say them."""
    config = LearnerConfig()
    assert not config.deterministic and not config.decided(on_gpu=False).checkpointed


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_fused_optimizer_serves_every_device(decay: float) -> None:
    """On CUDA, too; its kernel reads the step on the device of the parameter, wherever the state is made."""
    student = torch.nn.Linear(4, 4, device="meta")
    optimizer = adam(student, LearnerConfig(weight_decay=decay))
    assert optimizer.defaults["fused"] and not optimizer.defaults["foreach"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == ([decay, 0.0] if decay else [0.0])
    engine: Any = SimpleNamespace(optimizer=optimizer)
    made = _moments(engine, list(student.parameters()))
    assert {value.device.type for state in made.values() for value in state.values()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("a.q_proj.weight", "a.q_proj"),
        ("a.q_proj.bias", "a.q_proj"),
        ("a.q_proj.lora_A.weight", "a.q_proj"),
        ("a.q_proj.lora_B.weight", "a.q_proj"),
        ("a.scale", "a.scale"),
    ],
)
def test_a_tensor_belongs_to_its_layer(name: str, layer: str) -> None:
    assert _layer(name) == layer


def test_a_packed_neighbor_changes_no_log_probability(tmp_path: Path) -> None:
    student = load_student(
        str(save(tiny_model(3, tied=False, positions=64), tmp_path / "student")), torch.float32, False
    )
    ids = torch.randint(3, VOCABULARY, (20,), generator=torch.Generator().manual_seed(1))
    alone = student.logprobs(ids)
    for after in (1, 7, 20):
        torch.testing.assert_close(student.logprobs(ids, after), alone, rtol=0, atol=1e-5)


def test_a_place_for_a_checkpoint_is_made_and_emptied(tmp_path: Path) -> None:
    final = tmp_path / "not" / "there" / "step_4"
    checkpoint.start(final)
    (checkpoint.partial(final) / "left over").write_text("of a crash")
    checkpoint.start(final)
    assert not any(checkpoint.partial(final).iterdir()) and not final.exists()


def test_an_adapter_never_mixes_with_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(FileExistsError):
        save_adapter(tmp_path / "adapter", LoraConfig(r=2), {}, "base")
