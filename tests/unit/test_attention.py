"""Packed attention is attention, sequence by sequence."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from opd.attention import Packing, packed_attention


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 9),
)
def test_equals_attention_of_each_sequence(lengths, heads, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = heads
    total, width = sum(lengths), 6
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])

    def random(n: int) -> torch.Tensor:
        return torch.randn(1, n, total, width, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = random(queries), random(keys), random(keys)
    outward = torch.randn(1, total, queries, width, generator=generator, dtype=torch.float64)

    packed = packed_attention(query, key, value, Packing.of(cu_seqlens), scale)
    parts = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q = query[:, :, start:stop]
        k = key[:, :, start:stop].repeat_interleave(queries // keys, dim=1)
        v = value[:, :, start:stop].repeat_interleave(queries // keys, dim=1)
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2))
    plain = torch.cat(parts, 1)

    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((packed * outward).sum(), (query, key, value))
    theirs = torch.autograd.grad((plain * outward).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_every_token_has_one_place_and_padding_is_bounded(lengths):
    packing = Packing.of(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    places = [torch.arange(sum(lengths)) if c.tokens is None else c.tokens for c in packing.classes]
    assert torch.cat(places).sort().values.tolist() == list(range(sum(lengths)))
    pairs = sum(c.rows * c.longest**2 for c in packing.classes)
    assert pairs <= 1.4 * sum(n * n for n in lengths) + 1e-6


def test_one_long_sequence_does_not_make_the_short_ones_long():
    packing = Packing.of(torch.tensor([0, *torch.tensor([1000] + [10] * 50).cumsum(0).tolist()]))
    assert [(c.rows, c.longest) for c in packing.classes] == [(1, 1000), (50, 10)]
