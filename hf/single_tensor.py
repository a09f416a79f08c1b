"""Numbers of a Hugging Face folder: one tensor of its safetensors, without the rest of the model."""

from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from hf.folder import Stored


def read_tensor(name: str, stored: Stored) -> Tensor:
    """The tensor `name` on the host, in the dtype in which it is `stored`."""
    with safe_open(str(stored.file), framework="pt") as file:
        return file.get_tensor(name)


def same_rows(first: str, second: str, stored: Mapping[str, Stored], count: int = 16) -> bool:
    """Whether two matrices of one shape agree in `count` rows that lie evenly in them."""
    rows = stored[first].shape[0]
    places = sorted({rows * i // count for i in range(count)} | {rows - 1})
    found = []
    for name in (first, second):
        with safe_open(str(stored[name].file), framework="pt") as file:
            matrix = file.get_slice(name)
            found.append([matrix[place : place + 1] for place in places])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))
