"""The student as a folder that transformers and vLLM load."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from learner import checkpoint, engine
from learner.config import LearnerConfig
from learner.model import Student
from opd.adapters import pairs, with_adapters
from opd.manifest import runs

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def export(
    student: Student, config: LearnerConfig, source: str, rank: int, directory: Path, ends: Sequence[int] = ()
) -> None:
    """Write `directory`: safetensors, configuration, and the tokenizer of `source`; all ranks must call.

    `ends` are the ids that ended texts in training; whoever generates with the folder ends them there, too.
    Adapters are merged, as an engine does it, and also written by themselves, in PEFT's format, into `adapter/`.
    """
    named = list(student.named())
    state = dict(_gathered(named, config, rank))
    if config.lora.r:
        adapters, base = state, _gathered(list(student.frozen()), config, rank)
        state = dict(with_adapters(base, pairs(adapters.items()), config.lora.scale))
    if rank == 0:
        checkpoint.start(directory)
        temporary = checkpoint.partial(directory)
        if ends and student.causal.generation_config is not None:
            student.causal.generation_config.eos_token_id = list(ends)
        student.causal.save_pretrained(temporary, state_dict=state)
        for name in _TOKENIZER_FILES:
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                shutil.copyfile(found, temporary / name)
        if config.lora.r:
            from learner.lora import save_adapter

            save_adapter(temporary / "adapter", config.lora, adapters, source)
        checkpoint.commit(directory)
    engine.barrier()


@torch.no_grad()
def _gathered(
    named: Sequence[tuple[str, nn.Parameter]], config: LearnerConfig, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values in host memory on rank 0; nothing elsewhere. All ranks must go through it."""
    sizes = [p.element_size() * torch.Size(engine.full_shape(p)).numel() for _, p in named]
    for first, last in runs(sizes, config.publish_chunk_bytes):
        with engine.whole([p for _, p in named[first:last]], config.zero_stage) as tensors:
            if rank == 0:
                names = [name for name, _ in named[first:last]]
                yield from [(n, t.to("cpu", copy=True)) for n, t in zip(names, tensors, strict=True)]
