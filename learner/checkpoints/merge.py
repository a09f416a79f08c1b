"""A checkpoint as a folder that transformers and vLLM load, put together on a CPU: no other rank, no DeepSpeed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from learner.checkpoints import checkpoint
from learner.checkpoints.student_folder import write_folder
from learner.config import LoraConfig
from learner.model import load_student
from learner.published import described, published
from learner.publishing import Publisher, StagedSender
from opd.settings.devices import Dtype, resolve_dtype
from weight_sync.lora import pairs, with_adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Origin of a checkpoint: the student's folder, and the settings that decide names and dtypes."""

    student: str
    dtype: Dtype
    lora: LoraConfig
    seed: int
    ends: tuple[int, ...] = ()  # the ids that ended texts in training


def export_checkpoint(shards: Path, origin: Origin, target: Path) -> None:
    """Write `target` from the files in `shards` that all ranks saved, bit by bit as those ranks would export it.

    Raises:
        DataError: the files are foreign, cut off or incomplete.
        ConfigurationError: they are of another model than `origin`.
    """
    read = checkpoint.Shards(shards)
    facts = read.facts[0]
    dtype = resolve_dtype(origin.dtype, torch.device(facts.device))  # the device that it was trained on
    student = load_student(origin.student, dtype, gradient_checkpointing=False)
    if origin.lora.r:
        from learner.lora import adapt

        adapt(student.causal, origin.lora, origin.seed)
    named, parts = list(student.named()), published(student)
    manifest = Publisher(
        *described(parts),
        chunk_bytes=1 << 30,
        rank=0,
        ranks=1,
        sender=StagedSender(np.copy),
        lora_scale=origin.lora.scale,
    ).manifest
    checkpoint.check_model(shards, facts, hashlib.sha256(repr(manifest).encode()).hexdigest()[:16])
    # The float32 master weights, rounded to the dtype that is computed with, as after every update.
    state = {n: read.read(checkpoint.MASTER, n, 0, p.numel()).view(p.shape).to(p.dtype) for n, p in named}
    adapters = {}
    if origin.lora.r:
        adapters, base = state, [(name, p.detach()) for name, p in student.frozen()]
        state = dict(with_adapters(base, pairs(adapters.items()), origin.lora.scale))
    write_folder(student, state, adapters, origin.lora, origin.student, target, origin.ends)
