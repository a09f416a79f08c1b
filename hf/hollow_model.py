"""A causal model before its weights are read: modules and buffers as they will be, parameters that take no memory.

Its weights stay pages of their files, which processes have in common, until a parameter or a layer is asked for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf.folder import Stored
from hf.packable import stream
from hf.weight_names import Piece, stored_names, stored_pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Numbers of a parameter as they are stored, in pages of their file: one tensor, or `pieces` of fused experts."""

    tensors: tuple[Tensor, ...]
    pieces: tuple[Piece, ...] = ()

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The numbers in the shape, dtype and device of `parameter`; pages of the file where they are stored so."""
        if not self.pieces:
            return self.tensors[0].to(parameter)
        fused = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        for piece, tensor in zip(self.pieces, self.tensors, strict=True):
            piece.of(fused).copy_(tensor)
        return fused


def hollow_causal(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal model in the folder `path`, whose parameters have shape, dtype and device but one number in memory.

    Everything else is as `from_pretrained` would make it, buffers included, which no checkpoint has.
    """
    causal = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        device_map={"": "meta"},
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    assert isinstance(causal, PreTrainedModel)
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(causal.config, dtype=dtype, attn_implementation="eager")
    for name, buffer in made.named_buffers():
        module, _, own = name.rpartition(".")
        setattr(causal.get_submodule(module), own, buffer.to(device))
    made_of = {p: nn.Parameter(_hollow(p, device), p.requires_grad) for p in causal.parameters()}
    for module in causal.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, made_of[parameter])  # tied ones stay tied
    return causal


def _hollow(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of one number in memory, which is none, so that a trial sees what was never read."""
    return torch.tensor(math.nan, dtype=like.dtype, device=device).expand(like.shape)


def sources(causal: PreTrainedModel, stored: Mapping[str, Stored], part: str) -> Mapping[nn.Parameter, Source]:
    """Source of every parameter.

    Raises:
        ConfigurationError: a parameter is made of several stored tensors in a way that is not known (`stored_names`).
    """
    names, pieces = stored_names(causal, stored, part), stored_pieces(causal, stored)
    mapped, found = _mapped(stored), dict[nn.Parameter, Source]()
    for name, parameter in causal.named_parameters():
        own = pieces.get(name, ())
        tensors = [mapped[piece.name] for piece in own] or [mapped[names[name]]]
        found[parameter] = Source(tensors=tuple(tensors), pieces=own)
    return found


def _mapped(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """All stored tensors, in pages of their files."""
    found = dict[str, Tensor]()
    for file in {one.file for one in stored.values()}:
        with safe_open(str(file), framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name, one in stored.items() if one.file == file}
    return found


@contextmanager
def filled_by_layer(causal: PreTrainedModel, found: Mapping[nn.Parameter, Source]) -> Iterator[None]:
    """Passes through a hollow model: a layer has its weights while it computes, and so has any other module."""
    layers = stream(causal)[1:]
    within = {module for layer in layers for module in layer.modules()}
    hooks = list[torch.utils.hooks.RemovableHandle]()
    for module in causal.modules():
        own = list(module.parameters(recurse=module in layers))
        if own and (module in layers or module not in within):
            hooks += [
                module.register_forward_pre_hook(lambda *_, own=own: _fill(own, found)),
                module.register_forward_hook(lambda *_, own=own: _empty(own)),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fill(parameters: Sequence[nn.Parameter], found: Mapping[nn.Parameter, Source]) -> None:
    for parameter in parameters:
        parameter.data = found[parameter].read(parameter)


def _empty(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = _hollow(parameter, parameter.device)
