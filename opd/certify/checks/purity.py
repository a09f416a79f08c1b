"""State that a part must leave as it is: its arguments, and the randomness that all parts of a process share."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fresh_random_state() -> tuple[bytes, int, bytes]:
    """The state after one more draw of each: not the one that a part set when it was called before."""
    np.random.random()
    torch.rand(1)
    return random_state()


def random_state() -> tuple[bytes, int, bytes]:
    """State of the generators that numpy and torch share among all parts of a process.

    Not that of Python, from which a checker of types draws at any call.
    """
    state = np.random.get_state(legacy=False)["state"]
    return state["key"].tobytes(), state["pos"], torch.get_rng_state().numpy().tobytes()


def content_of(value: Any) -> list[bytes]:
    """Bytes of all arrays within data: texts, scores, batches, and what holds several of them."""
    match value:
        case np.ndarray():
            return [value.tobytes()]
        case Tensor():
            flat = value.detach().flatten().clone(memory_format=torch.contiguous_format)
            return [flat.view(torch.uint8).numpy().tobytes()]
        case Mapping():
            return [part for key in value for part in content_of(value[key])]
        case list() | tuple():
            return [part for one in value for part in content_of(one)]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    return [part for f in fields(value) for part in content_of(getattr(value, f.name))]
