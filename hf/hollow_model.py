"""A causal model before its weights are read: modules and buffers as they will be, parameters that take no memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf.folder import Stored
from hf.single_tensor import read_tensor
from hf.weight_names import Piece, stored_names, stored_pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Place of a parameter's numbers among the `stored` ones: under `name`, or in `pieces` of fused experts."""

    stored: Mapping[str, Stored]
    name: str
    pieces: tuple[Piece, ...] = ()

    def read(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The parameter on the host; of one that is stored as it is these are pages of the file."""
        if not self.pieces:
            return read_tensor(self.name, self.stored[self.name]).to(dtype)
        fused = torch.empty(shape, dtype=dtype)
        for piece in self.pieces:
            piece.of(fused).copy_(read_tensor(piece.name, self.stored[piece.name]))
        return fused


def hollow_causal(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal model in the folder `path`, whose parameters have shape and dtype but one number in memory each.

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
        setattr(causal.get_submodule(module), own, buffer)
    _fill(causal, dtype)
    return causal


def _fill(causal: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put parameters on the host in place of those on the meta device; tied ones stay tied."""
    hollow = {
        parameter: nn.Parameter(torch.zeros((), dtype=dtype).expand(parameter.shape), parameter.requires_grad)
        for parameter in causal.parameters()
    }
    for module in causal.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, hollow[parameter])


def sources(causal: PreTrainedModel, stored: Mapping[str, Stored], part: str) -> Mapping[nn.Parameter, Source]:
    """Source of every parameter.

    Raises:
        ConfigurationError: a parameter is made of several stored tensors in a way that is not known (`stored_names`).
    """
    names, pieces = stored_names(causal, stored, part), stored_pieces(causal, stored)
    return {
        parameter: Source(stored=stored, name=names[name], pieces=pieces.get(name, ()))
        for name, parameter in causal.named_parameters()
    }
