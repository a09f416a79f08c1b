"""Causal attention over packed sequences, exact, with PyTorch's own kernels.

Linear layers, norms and the head see only real tokens; attention alone works on a padded view. A padded row
lies behind every real one, so the causal mask already hides it. Sliding windows, soft-capping and sinks are computed
as the model asks; whatever else it asks of its attention is refused. Sequences are
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

_BLOCK = 1024  # rows of one sequence whose scores are computed at once, where PyTorch's kernel lacks a feature
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
    """Places of packed sequences in their padded views; made once per batch, used by every layer."""

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
    """Order by length, longest first, cut into classes of at most `_WASTE` times the needed query-key pairs."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """Features of a layer besides causal softmax attention.

    `window` counts the tokens that are seen, the token itself among them; `softcap` bounds the scores by
    `softcap * tanh(score / softcap)`; `sinks` are logits, one per query head, that take their share of the softmax
    and give nothing.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " Hq"] | None = None


class _Move(torch.autograd.Function):
    """Rows `source` of `x` moved to rows `target` of zeros `[size, ...]`; `None` is all rows in order.

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
    value: Float[Tensor, "1 Hk N E"],
    packing: Packing,
    scale: float | None = None,
    extras: Extras = Extras(),
) -> Float[Tensor, "1 N Hq E"]:
    """Softmax attention in which a token sees its own sequence up to itself.

    Query heads may outnumber key heads (grouped-query attention). `scale` is `1 / sqrt(D)` if not given.
    """
    tokens, total = query.shape[2], None
    for group in packing.classes:

        def pad(x: Tensor, group: LengthClass = group) -> Tensor:
            flat = _move(x[0].transpose(0, 1), group.tokens, group.slots, group.rows * group.longest)
            return flat.unflatten(0, (group.rows, group.longest)).transpose(1, 2)

        out = _attention(pad(query), pad(key), pad(value), scale, extras)
        part = _move(out.transpose(1, 2).flatten(0, 1), group.slots, group.tokens, tokens)
        total = part if total is None else total + part
    assert isinstance(total, Tensor)
    return total[None]


def _attention(
    query: Float[Tensor, "R Hq L D"],
    key: Float[Tensor, "R Hk L D"],
    value: Float[Tensor, "R Hk L E"],
    scale: float | None,
    extras: Extras,
) -> Float[Tensor, "R Hq L E"]:
    """Causal attention of rows of one length, by PyTorch's kernel wherever it has the features."""
    longest, gqa = query.shape[2], query.shape[1] != key.shape[1]
    window = longest if extras.window is None else extras.window
    if extras.softcap is None and extras.sinks is None and window >= longest:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    parts = []
    for start in range(0, longest, _BLOCK):  # no mask or matrix of all rows by all columns has to exist
        stop, first = min(start + _BLOCK, longest), max(0, start - window + 1)
        seen = (key[:, :, first:stop], value[:, :, first:stop])
        parts.append(_block(query[:, :, start:stop], *seen, start - first, window, scale, extras))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _block(
    query: Float[Tensor, "R Hq B D"],
    key: Float[Tensor, "R Hk C D"],
    value: Float[Tensor, "R Hk C E"],
    offset: int,
    window: int,
    scale: float | None,
    extras: Extras,
) -> Float[Tensor, "R Hq B E"]:
    """Causal attention of a run of rows, the first of which is at place `offset` of the columns, within the window."""
    columns = key.shape[2]
    place = torch.arange(columns, device=query.device)
    behind = place[offset : offset + query.shape[2], None] - place  # how far the key lies behind the query
    visible = (behind >= 0) & (behind < window)
    groups = query.shape[1] // key.shape[1]
    if extras.softcap is None and extras.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=groups > 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if extras.softcap is not None:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if extras.sinks is not None:
        sinks = extras.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    return scores.softmax(-1)[..., :columns].to(value.dtype) @ value


# Keyword arguments of transformers' attention functions that leave the result as it is. `dropout` would not, and is
# left out on purpose: the policy that is trained must be the policy that sampled. A window arrives as the mask.
_HARMLESS = frozenset({"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "sliding_window"})


def mask(*, config: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> Tensor | None:
    """Attention mask of a layer of a packed model: its window (int64, no axes), or None for all.

    transformers calls it with what a layer's mask is made from, to be registered as `NAME`.
    """
    window = getattr(config, "sliding_window", None)
    if use_vmap or not getattr(config, "is_causal", True) or local_size not in (None, window):
        raise ConfigurationError(
            f"packed sequences are read causally, all of it or a sliding window, but {type(config).__name__} asks for "
            "another mask (chunks, or both directions); choose a model with causal attention"
        )
    return None if local_size is None else torch.tensor(local_size)


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N E"],
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " Hq"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 N Hq E"], None]:
    """`packed_attention` as transformers calls it, to be registered as `NAME` beside `mask`.

    `packing` arrives as a model argument. What could change the result and is not computed here is refused.
    """
    if packing is None:
        raise ConfigurationError(
            f"{type(module).__name__} is not told how sequences are packed, since its model does not pass arguments on "
            "to it; choose another architecture"
        )
    given = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    causal = others.get("is_causal") is not False and getattr(module, "is_causal", True)
    unknown = [name for name in given if name != "is_causal"] + ["attention in both directions"] * (not causal)
    if attention_mask is not None and attention_mask.ndim:
        unknown.append("a mask of its own")
    window = None if attention_mask is None or attention_mask.ndim else int(attention_mask)
    longest, window_size = max(group.longest for group in packing.classes), others.get("sliding_window")
    if window is None and window_size is not None and longest > int(window_size):
        unknown.append(f"a window of {window_size} tokens without a mask")
    if unknown:
        raise ConfigurationError(
            f"{type(module).__name__} needs {unknown[0]}, which attention over packed sequences does not compute; "
            "choose a model with plain causal attention"
        )
    extras = Extras(window=window, softcap=softcap, sinks=s_aux)
    return packed_attention(query, key, value, packing, scaling, extras), None


def register(functions: Any, masks: Any) -> None:
    """Registration of `NAME`: `functions` is transformers' `AttentionInterface`, `masks` its `AttentionMaskInterface`.

    Both together: without the mask a window would be lost.
    """
    functions.register(NAME, attend)
    masks.register(NAME, mask)
