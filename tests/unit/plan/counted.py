"""Bytes that torch really keeps: tensors saved for the backward pass, and the most alive at once."""

import gc
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from hf.packed_model import PackedModel  # registers packed attention
from launch.plan.memory.shapes import ModelShape, shape_of
from learner.model import Student
from opd.loss.packed_attention import Packing
from opd.settings.devices import Dtype
from tests.small_learner import SMOOTH, VOCABULARY, Likelihood, batches_of, group_of_its_own, rank_of
from tests.tiny_models import tiny_model

LENGTHS = (40, 33, 57, 21, 64, 50)
SMALL: Mapping[str, PreTrainedConfig] = {
    "Qwen3": Qwen3Config(
        vocab_size=160, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    ),
    "Llama": LlamaConfig(
        vocab_size=160, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    ),
    "Qwen3-MoE": Qwen3MoeConfig(
        vocab_size=160, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48,
        mlp_only_layers=[1],
    ),
}  # fmt: skip


def causal(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def shape(model: Any) -> ModelShape:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    normed = any(name.endswith("q_norm.weight") for name in sizes)
    return shape_of(model.config.to_dict(), sum(sizes.values()), max(sizes.values()), normed=normed)


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass kept, of how many tokens in how many slots of the padded view."""

    shape: ModelShape
    bytes: int
    tokens: int
    slots: int


def _student(config: PreTrainedConfig, dtype: torch.dtype, checkpointed: bool) -> tuple[Any, Student]:
    model = causal(config, dtype)
    student = Student(model).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, student


def _packed(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sequence boundaries, and what a student is called with."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ids, places = torch.randint(0, 160, (int(ends[-1]),)), torch.cat([torch.arange(n) for n in lengths])
    return ends, ids, places, ends, torch.arange(len(ids))


def kept(config: PreTrainedConfig, dtype: torch.dtype, *, checkpointed: bool, lengths: Sequence[int] = LENGTHS) -> Kept:
    """What the learner's own student keeps of packed sequences: every storage once, parameters not."""
    model, student = _student(config, dtype, checkpointed)
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    found: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def tables(*call: Any) -> None:  # checkpointed layers hold them as arguments
        for table in call[-1]:
            see(table)

    model.base_model.rotary_emb.register_forward_hook(tables)
    ends, *packed = _packed(lengths)
    with saved_tensors_hooks(see, lambda tensor: tensor):
        held = student(*packed, lambda hidden, _: hidden)
    slots = sum(group.rows * group.longest for group in Packing.of(ends).classes)
    assert held.grad_fn is not None
    return Kept(shape=shape(model), bytes=sum(found.values()), tokens=int(ends[-1]), slots=slots)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once that were made within."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata: 0 for t in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def training_peak(
    config: PreTrainedConfig, dtype: torch.dtype, *, checkpointed: bool, lengths: Sequence[int] = LENGTHS
) -> Kept:
    """The most that a forward and a backward pass have alive; gradients of parameters are given away as they come."""
    model, student = _student(config, dtype, checkpointed)
    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ends, *packed = _packed(lengths)
    with LiveBytes(*student.parameters(), *model.buffers()) as live:
        student(*packed, lambda hidden, _: hidden.float().sum()).backward()
    slots = sum(group.rows * group.longest for group in Packing.of(ends).classes)
    return Kept(shape=shape(model), bytes=live.peak, tokens=int(ends[-1]), slots=slots)


def forward_peak(config: PreTrainedConfig, dtype: torch.dtype, length: int) -> tuple[ModelShape, int]:
    """What a teacher's pass over one sequence has alive at most, its weights not."""
    model = causal(config, dtype)
    teacher = PackedModel(model.eval().requires_grad_(False))
    model.set_attn_implementation("opd_packed")
    ids = torch.randint(0, 160, (length,))
    with torch.no_grad(), LiveBytes(*model.parameters(), *model.buffers()) as live:
        teacher.hidden([ids])
    return shape(model), live.peak


@dataclass(frozen=True)
class Peaks:
    """The most bytes of a learner alive at its start and in its second step (passes, optimizer), and what is left.

    With `host`, those that `offload_optimizer` keeps in host memory, which are not among those of a step.
    """

    shape: ModelShape
    start: int
    train: int
    step: int
    rest: int
    host: int


def learner_peaks(
    stage: int, dtype: Dtype, folder: Path, patch: pytest.MonkeyPatch, *, offloaded: bool = False
) -> Peaks:
    """Counts of the product's own learner rank, of whose memory little are activations."""
    from learner import engine

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    model = tiny_model(0, std=0.05, head_dim=32, num_attention_heads=8, num_key_value_heads=4, **sizes)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    config = replace(SMOOTH, zero_stage=stage, dtype=dtype, tokens_per_microbatch=64, offload_optimizer=offloaded)
    live, found, real = LiveBytes(), list[int](), engine.apply

    def watched(*given: Any) -> float:
        found.append(live.peak)
        live.peak = live.now
        norm = real(*given)
        found.append(live.peak)
        return norm

    with group_of_its_own(), live, patch.context() as patched:
        rank = rank_of(config, folder)
        rank.setup(0, 1, *rank.address())
        began = live.peak
        for step in range(2):
            (batches,) = batches_of(step, config)
            patched.setattr(engine, "apply", watched)
            live.peak = live.now
            rank.step(batches, Likelihood())
        gc.collect()
        rest = live.now
        training = rank._training
        assert training is not None
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in engine.on_host(training._engine, config)}
        host = sum(storage.nbytes() for storage in kept.values())
        rank.close()
    return Peaks(
        shape=shape(model), start=began, train=found[2] - host, step=found[3] - host, rest=rest - host, host=host
    )
