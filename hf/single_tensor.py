"""Numbers of a Hugging Face folder: one tensor of its safetensors, without the rest of the model."""

from safetensors import safe_open
from torch import Tensor

from hf.folder import Stored


def read_tensor(name: str, stored: Stored) -> Tensor:
    """The tensor `name` on the host, in the dtype in which it is `stored`."""
    with safe_open(str(stored.file), framework="pt") as file:
        return file.get_tensor(name)
