"""A model's output matrix alone, for backends that give hidden states only."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from opd.errors import ConfigurationError, DataError

_EXTRAS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


def text_config(path: str) -> dict[str, Any]:
    """The language model's part of `config.json`."""
    config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text())
    return config | config.get("text_config", {})


def load_head(path: str, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "V H"]:
    """The output matrix in `path`, tied to the embedding or not.

    Raises `ConfigurationError` for a model whose head does more than multiply, `DataError` if there is no matrix.
    """
    config = text_config(path)
    extra = next((name for name in _EXTRAS if config.get(name) not in (None, 0, 1, 1.0)), "")
    stored = {name: file for file in sorted(Path(path).glob("*.safetensors")) for name in _names(file)}
    if extra or any(name.endswith("lm_head.bias") for name in stored):
        raise ConfigurationError(
            f"teacher.backend=VLLM multiplies hidden states by the output matrix, but {path!r} has also "
            f"{extra or 'lm_head.bias'}; use teacher.backend=VLLM_LOGPROBS"
        )
    wanted = ("lm_head.weight", "embed_tokens.weight") if config.get("tie_word_embeddings") else ("lm_head.weight",)
    found = [name for suffix in wanted for name in stored if name.endswith(suffix)]
    if not found:
        raise DataError(
            f"the teacher {path!r} has no {' or '.join(wanted)} in its safetensors; use teacher.backend=VLLM_LOGPROBS"
        )
    with safe_open(str(stored[found[0]]), framework="pt") as tensors:
        return tensors.get_tensor(found[0]).to(device=device, dtype=dtype)


def _names(file: Path) -> list[str]:
    with safe_open(str(file), framework="pt") as tensors:
        return list(tensors.keys())
