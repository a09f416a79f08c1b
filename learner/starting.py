"""The student as a rank starts with it: whole on its device, or under ZeRO-3 never whole on any rank."""

import torch
from torch import Tensor, distributed, nn

from hf.folder import read_headers
from hf.hollow_model import filled_by_layer, hollow_causal, sources
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
    """The same as ranks have it under ZeRO-3, of which no more than a layer or a parameter is whole at any time."""
    part, stored = f"the student {path!r}", read_headers(path, "the student")
    causal = hollow_causal(path, dtype, device)
    check_layers(causal, part)
    check_head(causal, part, bias=False)
    found = sources(causal, stored, part)
    student = Student(causal, stored_names(causal, stored, part), stored_pieces(causal, stored))
    with filled_by_layer(causal, found):
        trial = Trial.of(student.eval().causal, student.vocabulary, part)
        causal.set_attn_implementation(NAME)
        trial.check(student.train().logits, part)  # as it is trained, so that a dropout would be seen
    if config.checkpointed:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _adapt(student, config, seed)

    def whole(parameter: nn.Parameter) -> Tensor:
        source = found.get(parameter)
        if source is None:  # of an adapter, which every rank has made
            return parameter.data.to(device)
        if distributed.get_rank() == 0:
            return source.read(parameter)
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)

    engine.divide(student, whole, config)
    trim()  # under `learner.config.environment` glibc keeps what is freed, for the steps' sake
    return student


def _adapt(student: Student, config: LearnerConfig, seed: int) -> None:
    if config.lora.r:
        from learner.lora import adapt

        adapt(student.causal, config.lora, seed)
