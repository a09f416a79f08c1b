"""A model's output matrix alone, for backends that give hidden states only."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hf.folder import Stored, output_matrix, read_headers, text_config
from hf.single_tensor import read_tensor
from opd.errors import ConfigurationError, DataError

_EXTRAS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


def load_head(path: str, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "V H"]:
    """The output matrix in `path`, tied to the embedding or not.

    Raises `ConfigurationError` for a model whose head does more than multiply, `DataError` if there is no matrix.
    """
    config, stored = text_config(path, "the teacher"), read_headers(path, "the teacher")
    extra = next((name for name in _EXTRAS if config.get(name) not in (None, 0, 1, 1.0)), "")
    if extra or any(name.endswith("lm_head.bias") for name in stored):
        raise ConfigurationError(
            f"teacher.backend=VLLM multiplies hidden states by the output matrix, but {path!r} has also "
            f"{extra or 'lm_head.bias'}; use teacher.backend=VLLM_LOGPROBS"
        )
    absent = f"the teacher {path!r} has no output matrix in its safetensors; use teacher.backend=VLLM_LOGPROBS"
    return read_head(stored, absent).to(device=device, dtype=dtype)


def read_head(stored: Mapping[str, Stored], absent: str) -> Float[Tensor, "V H"]:
    """The output matrix among a folder's tensors as it is stored. Raises `DataError`, which is `absent`, for none."""
    name = output_matrix(stored)
    if name is None:
        raise DataError(absent)
    return read_tensor(name, stored[name])
