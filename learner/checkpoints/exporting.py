"""The student of all ranks as a folder that transformers and vLLM load."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from learner import engine
from learner.checkpoints.student_folder import write_folder
from learner.config import LearnerConfig
from learner.model import Student
from learner.published import full_shape
from weight_sync.lora import pairs, with_adapters
from weight_sync.manifest import runs


def export(
    student: Student, config: LearnerConfig, source: str, rank: int, directory: Path, ends: Sequence[int] = ()
) -> None:
    """Write `directory`: safetensors, configuration, and the tokenizer of `source`; all ranks must call.

    `ends` are the ids that ended texts in training; an engine that generates with the folder ends them there, too.
    Adapters are merged, as an engine does it, and also written by themselves, in PEFT's format, into `adapter/`.
    """
    named = list(student.named())
    state, adapters = dict(_gathered(named, config, rank)), dict[str, Tensor]()
    if config.lora.r:
        adapters, base = state, _gathered(list(student.frozen()), config, rank)
        state = dict(with_adapters(base, pairs(adapters.items()), config.lora.scale))
    if rank == 0:
        write_folder(student, state, adapters, config.lora, source, directory, ends)
    engine.barrier()


@torch.no_grad()
def _gathered(
    named: Sequence[tuple[str, nn.Parameter]], config: LearnerConfig, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values in host memory on rank 0; nothing elsewhere. All ranks must go through it."""
    sizes = [p.element_size() * torch.Size(full_shape(p)).numel() for _, p in named]
    for first, last in runs(sizes, config.publish_chunk_bytes):
        with engine.whole([p for _, p in named[first:last]], config.stage) as tensors:
            if rank == 0:
                names = [name for name, _ in named[first:last]]
                yield from [(n, t.to("cpu", copy=True)) for n, t in zip(names, tensors, strict=True)]
