"""Remaining probability mass of a distribution, in logarithms."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    Array = Any
else:
    Array = np.ndarray | Tensor

ABSENT = -80.0  # the log-probability of what a distribution leaves out: its terms vanish, in float32 too


def remainder(logprobs: Float[Array, "T K"]) -> Float[Array, " T"]:
    """`log(1 - sum exp)` per row, never below one rounding step of the dtype: the mass outside of K known values."""
    given = logprobs if isinstance(logprobs, Tensor) else torch.from_numpy(np.array(logprobs))
    covered = given.double().exp().sum(-1).clamp(max=1 - torch.finfo(given.dtype).eps)
    left = torch.log1p(-covered).to(given.dtype)
    return left if isinstance(logprobs, Tensor) else left.numpy()
