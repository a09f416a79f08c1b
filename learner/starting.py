"""The student as a rank starts with it: whole on its device, or under ZeRO-3 never whole on any rank."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, distributed, nn

from hf.folder import read_headers
from hf.hollow_model import Source, hollow_causal, sources
from hf.packable import Trial, check_head, check_layers
from hf.weight_names import stored_names, stored_pieces
from learner import engine
from learner.config import LearnerConfig
from learner.model import Student, load_student
from opd.loss.packed_attention import NAME
from weight_sync.parking import trim


def starting_student(path: str, config: LearnerConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Student:
    """The student in the folder `path` with its adapters, for `engine.initialize`; all ranks must call.

    Raises:
        ConfigurationError: as `load_student`, or adapters do not fit it.
    """
    if config.stage == 3:
        return _divided(path, config, dtype, device, seed)
    student = load_student(path, dtype, config.checkpointed, None if device.type == "cpu" else device)
    _adapt(student, config, seed)
    return student


def _divided(path: str, config: LearnerConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Student:
    """The same as ranks have it under ZeRO-3: the first one reads a parameter at a time, and each keeps its part."""
    part, stored = f"the student {path!r}", read_headers(path, "the student")
    causal = hollow_causal(path, dtype)
    check_layers(causal, part)
    check_head(causal, part, bias=False)
    found = sources(causal, stored, part)
    student = Student(causal, stored_names(causal, stored, part), stored_pieces(causal, stored))
    _adapt(student, config, seed)
    engine.divide(student, _reader(found, device), config)
    trim()  # under `learner.config.environment` glibc keeps what is freed, for the steps' sake
    for buffer in student.buffers():
        buffer.data = buffer.data.to(device)
    with engine.whole_by_layer(student):
        trial = Trial.of(student.eval().causal, student.vocabulary, part)
        causal.set_attn_implementation(NAME)
        trial.check(student.train().logits, part)  # as it is trained, so that a dropout would be seen
    trim()
    if config.checkpointed:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return student


def _reader(found: Mapping[nn.Parameter, Source], device: torch.device) -> Callable[[nn.Parameter], Tensor]:
    """Reader of a parameter by its source, on the first rank alone; adapters have their numbers already."""
    first = distributed.get_rank() == 0

    def read(parameter: nn.Parameter) -> Tensor:
        source = found.get(parameter)
        if source is None:
            return parameter.data.to(device)
        if first:
            return source.read(parameter.shape, parameter.dtype).to(device)
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)

    return read


def _adapt(student: Student, config: LearnerConfig, seed: int) -> None:
    if config.lora.r:
        from learner.lora import adapt

        adapt(student.causal, config.lora, seed)
