"""RMS norms in one kernel on CPUs: vLLM ships the kernel but there computes norms as six small operations each.

A small model on a CPU spends more time between operations than in them; this takes a tenth off a rollout.
"""

import torch
from torch import Tensor
from vllm import ir

PROVIDER = "opd_cpu"
PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}


def _plain(
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,  # noqa: ARG001 (the signature of the op, here and below)
    variance_size: int | None = None,
) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _plain_fused(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _plain(x, weight, epsilon, variance_size) and x.is_contiguous() and x_residual.is_contiguous()


@ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_plain)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,  # noqa: ARG001
) -> Tensor:
    """`x` over its root mean square (last axis), times `weight`."""
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(out, x.contiguous(), weight, epsilon)
    return out


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_plain_fused, inplace=True)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """The norm of `x + x_residual`, and that sum; in place."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
