"""Causal attention over packed sequences, exact, with PyTorch's own kernels.

Linear layers, norms and the head see only real tokens; attention alone works on a padded view. A padded row
lies behind every real one, so the causal mask already hides it and no other mask is needed. Sequences are
padded in classes of similar length, so that one long sequence does not make the short ones long.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opd.errors import ConfigurationError

NAME = "opd_packed"
"""Under which transformers knows `attend`."""

_WASTE = 1.4  # measured on CPU for 64 sequences of 44..95 tokens: 1.2 .. 1.5 are equally fast, 2 is slower


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthClass:
    """Sequences that are padded together to `[rows, longest]`.

    `tokens` are their places among the packed tokens, `slots` the places in the padded view (row-major).
    `None` stands for "all of them, in order": nothing has to be moved.
    """

    rows: int
    longest: int
    tokens: Int[Tensor, " n"] | None
    slots: Int[Tensor, " n"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where packed sequences lie in their padded views; made once per batch, used by every layer."""

    classes: tuple[LengthClass, ...]

    @staticmethod
    def of(cu_seqlens: Int[Tensor, " M1"]) -> "Packing":
        """From sequence boundaries `[0, n_0, n_0 + n_1, ..., N]`; every sequence has at least one token."""
        device = cu_seqlens.device
        bounds = cu_seqlens.detach().cpu().long()  # the only wait for the device in all layers
        lengths, (order, chosen) = bounds.diff(), _classes(bounds.diff())
        classes = []
        for start, stop in chosen:
            members = order[start:stop].sort().values
            rows, longest = stop - start, int(lengths[members].max())
            row = torch.repeat_interleave(torch.arange(rows), lengths[members])
            starts = lengths[members].cumsum(0) - lengths[members]
            column = torch.arange(len(row)) - starts[row]
            everything, even = len(chosen) == 1, len(row) == rows * longest
            tokens = None if everything else (bounds[members][row] + column).to(device)
            slots = None if even else (row * longest + column).to(device)
            classes.append(LengthClass(rows=rows, longest=longest, tokens=tokens, slots=slots))
        return Packing(classes=tuple(classes))


def _classes(lengths: Int[Tensor, " M"]) -> tuple[Int[Tensor, " M"], list[tuple[int, int]]]:
    """Longest first, and that order cut into classes of at most `_WASTE` times the needed query-key pairs."""
    order = torch.argsort(lengths, descending=True, stable=True)
    falling = lengths[order]
    cuts, start = [], 0
    while start < len(order):
        rest = falling[start:]
        fits = rest[0] ** 2 * torch.arange(1, len(rest) + 1) <= _WASTE * (rest**2).cumsum(0)
        stop = start + int(fits.sum())  # true, then false: the mean only falls
        cuts.append((start, stop))
        start = stop
    return order, cuts


class _Move(torch.autograd.Function):
    """Rows `source` of `x` written to rows `target` of zeros `[size, ...]`; `None` is all rows in order.

    Both index lists are free of repetitions, so the gradient is the same move backwards: no accumulation,
    which is what makes the gradient of plain indexing slow.
    """

    @staticmethod
    def forward(ctx, x, source, target, size):
        ctx.indices, ctx.size = (source, target), len(x)
        return _moved(x, source, target, size)

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (source, target) = grads, ctx.indices
        return _moved(grad, target, source, ctx.size), None, None, None


def _moved(x: Tensor, source: Tensor | None, target: Tensor | None, size: int) -> Tensor:
    rows = x if source is None else x.index_select(0, source)
    return rows.contiguous() if target is None else x.new_zeros(size, *x.shape[1:]).index_copy_(0, target, rows)


def _move(x: Tensor, source: Tensor | None, target: Tensor | None, size: int) -> Tensor:
    if source is None and target is None:
        return x
    out = _Move.apply(x, source, target, size)
    assert isinstance(out, Tensor)
    return out


def packed_attention(
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N D"],
    packing: Packing,
    scale: float | None = None,
) -> Float[Tensor, "1 N Hq D"]:
    """Softmax attention in which a token sees its own sequence up to itself.

    Query heads may outnumber key heads (grouped-query attention). `scale` is `1 / sqrt(D)` if not given.
    """
    tokens, total = query.shape[2], None
    for group in packing.classes:

        def pad(x: Tensor, group: LengthClass = group) -> Tensor:
            flat = _move(x[0].transpose(0, 1), group.tokens, group.slots, group.rows * group.longest)
            return flat.unflatten(0, (group.rows, group.longest)).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            pad(query),
            pad(key),
            pad(value),
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        part = _move(out.transpose(1, 2).flatten(0, 1), group.slots, group.tokens, tokens)
        total = part if total is None else total + part
    assert isinstance(total, Tensor)
    return total[None]


def attend(
    module: nn.Module,  # noqa: ARG001 (the signature of transformers' attention functions)
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N D"],
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,  # what other kernels want (dropout, position ids, ...)
) -> tuple[Float[Tensor, "1 N Hq D"], None]:
    """`packed_attention` as transformers calls it, to be registered as `NAME`.

    transformers has no mask function of that name, so it passes no mask; `packing` arrives as a model argument.
    """
    assert attention_mask is None
    longest = max(group.longest for group in packing.classes)
    if sliding_window is not None and longest > sliding_window:
        raise ConfigurationError(
            f"the model attends to a window of {sliding_window} tokens, but a sequence has {longest} and all of it "
            "would be read; shorten prompts or max_tokens, or choose a model with full attention"
        )
    return packed_attention(query, key, value, packing, scaling), None
