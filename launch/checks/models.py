"""What a checkpoint folder says of its size, read without its weights."""

import json
from math import prod
from pathlib import Path

from safetensors import safe_open


def parameter_count(path: str) -> int:
    """Parameters in a folder's safetensors (tied ones once)."""
    total = 0
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def vocabulary_rows(path: str) -> int:
    """Rows of the output matrix, padding included."""
    return _size(path, "vocab_size")


def hidden_width(path: str) -> int:
    """Columns of the output matrix."""
    return _size(path, "hidden_size")


def _size(path: str, name: str) -> int:
    config = json.loads((Path(path) / "config.json").read_text())
    return int(config.get(name) or config["text_config"][name])
