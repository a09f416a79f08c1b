"""A student's weights as a Hugging Face folder, whole or not there at all."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers.utils.hub import cached_file

from hf.folder import TOKENIZER_FILES
from learner.checkpoints import checkpoint
from learner.config import LoraConfig
from learner.model import Student


def write_folder(
    student: Student,
    state: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    lora: LoraConfig,
    source: str,
    directory: Path,
    ends: Sequence[int] = (),
) -> None:
    """Write `directory`: `state` as safetensors, the configuration, and the tokenizer of `source`.

    `ends` are the ids that ended texts in training; an engine that generates with the folder ends them there, too.
    Adapters, which `state` has merged, are also written by themselves, in PEFT's format, into `adapter/`.
    """
    checkpoint.start(directory)
    temporary = checkpoint.partial(directory)
    if ends and student.causal.generation_config is not None:
        student.causal.generation_config.eos_token_id = list(ends)
    student.causal.save_pretrained(temporary, state_dict=dict(state))
    for name in TOKENIZER_FILES:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, temporary / name)
    if lora.r:
        from learner.lora import save_adapter

        save_adapter(temporary / "adapter", lora, adapters, source, experts=bool(student.pieces))
    checkpoint.commit(directory)
