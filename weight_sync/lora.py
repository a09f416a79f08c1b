"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): names of their parts, and merging.

The output of a linear layer NAME with the matrix W becomes `W x + scale * B (A x)`. A is published as
`NAME.lora_A.weight` and B as `NAME.lora_B.weight`, as in PEFT's files; `scale` is `lora_alpha / r`.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from opd.errors import DataError

A, B = ".lora_A.weight", ".lora_B.weight"


def pairs(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (A, B), in the order of the As.

    Raises:
        DataError: something is no part of an adapter, or one half of a pair is missing.
    """
    named = dict(tensors)
    layers = [name.removesuffix(A) for name in named if name.endswith(A)]
    expected = {layer + part for layer in layers for part in (A, B)}
    odd = sorted(named.keys() ^ expected)
    if odd:
        how = "came in addition" if odd[0] in named else "is missing"
        raise DataError(
            f"an adapter needs {A[1:]} and {B[1:]} of each layer and nothing else, but {odd[0]!r} {how}; check what "
            "the learner publishes"
        )
    return {layer: (named[layer + A], named[layer + B]) for layer in layers}


def merged(
    base: Float[Tensor, "out inside"], a: Float[Tensor, "r columns"], b: Float[Tensor, "rows rank"], scale: float
) -> Float[Tensor, "out inside"]:
    """W with its adapter (`[r, inside]` and `[out, r]`) merged into it.

    Computed in float32 from W in the adapter's dtype, which is the learner's, and rounded to it once.

    Raises:
        DataError: their shapes do not fit.
    """
    if base.shape != (len(b), a.shape[1]) or b.shape[1] != len(a):
        raise DataError(
            f"an adapter of shapes {tuple(a.shape)} and {tuple(b.shape)} does not fit a matrix of {tuple(base.shape)}; "
            "check that learner and engine start from the same checkpoint"
        )
    base = base.to(device=a.device, dtype=a.dtype)
    return torch.addmm(base.float(), b.float(), a.float(), alpha=scale).to(a.dtype)


def with_adapters(
    base: Iterable[tuple[str, Tensor]], adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> Iterable[tuple[str, Tensor]]:
    """`base` by name, with every matrix that has an adapter merged with it. Raises `DataError` as `merged` does."""
    for name, value in base:
        pair = adapters.get(name.removesuffix(".weight"))
        yield name, value if pair is None else merged(value, *pair, scale)
