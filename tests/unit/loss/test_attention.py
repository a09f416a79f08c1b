"""Packed attention is attention, sequence by sequence."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import opd.loss.packed_attention
from opd.errors import ConfigurationError
from opd.loss.packed_attention import Extras, Packing, attend, mask, packed_attention, register


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


def naive(query: Tensor, key: Tensor, value: Tensor, extras: Extras) -> Tensor:
    """One sequence, token by token, from the definition: `[1, N, H, E]`."""
    rows = []
    for i in range(query.shape[2]):
        first = 0 if extras.window is None else max(0, i + 1 - extras.window)
        scores = (query[0, :, i, None] * key[0, :, first : i + 1]).sum(-1) * query.shape[-1] ** -0.5
        if extras.softcap is not None:
            scores = extras.softcap * torch.tanh(scores / extras.softcap)
        weights = scores.exp()
        total = weights.sum(-1) + (0 if extras.sinks is None else extras.sinks.exp())
        rows.append(((weights / total[:, None])[..., None] * value[0, :, first : i + 1]).sum(1))
    return torch.stack(rows)[None]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 3, 24, 99]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    block=st.sampled_from([1, 5, 1024]),
    seed=st.integers(0, 9),
)
def test_windows_caps_and_sinks_are_those_of_the_definition(lengths, window, softcap, sinks, block, seed):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    query, key, value = (
        3 * torch.randn(1, heads, sum(lengths), width, generator=generator, dtype=torch.float64)
        for heads, width in ((4, 6), (2, 6), (2, 5))
    )
    extras = Extras(
        window=window,
        softcap=softcap,
        sinks=torch.randn(4, generator=generator, dtype=torch.float64) if sinks else None,
    )
    with patch.object(opd.loss.packed_attention, "_BLOCK", block):  # how many rows at once changes nothing
        packed = packed_attention(query, key, value, Packing.of(cu_seqlens), extras=extras)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    places = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    plain = [naive(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], extras) for a, b in places]
    torch.testing.assert_close(packed, torch.cat(plain, 1), rtol=0, atol=1e-11)


def asked(module: nn.Module | None = None, seen: Tensor | None = None, **others: Any) -> Tensor:
    x = torch.randn(1, 2, 5, 4)
    packing = {"packing": Packing.of(torch.tensor([0, 5]))} | others
    return attend(module or nn.Identity(), x, x, x, seen, **packing)[0]


def test_what_changes_nothing_is_ignored():
    torch.manual_seed(0)
    expected = asked()
    torch.manual_seed(0)
    harmless = {"dropout": 0.1, "position_ids": torch.arange(5), "use_cache": False, "sliding_window": 5}
    assert torch.equal(asked(**harmless, position_bias=None, is_causal=True), expected)


@pytest.mark.parametrize(
    ("others", "needs"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"indices": torch.zeros(1)}, "indices"),
        ({"anything_new": 3}, "anything_new"),
        ({"is_causal": False}, "both directions"),
        ({"seen": torch.ones(1, 1, 5, 5)}, "a mask of its own"),
        ({"sliding_window": 4}, "a window of 4 tokens without a mask"),
        ({"packing": None}, "not told how sequences are packed"),
        ({"module": type("Encoder", (nn.Module,), {"is_causal": False})()}, "both directions"),
    ],
)
def test_what_would_change_the_result_is_refused(others, needs):
    with pytest.raises(ConfigurationError, match=needs):
        asked(**others)


def test_the_longest_sequence_decides_whether_a_window_is_missed():
    """Also where it is padded apart from the short ones."""
    packing = Packing.of(torch.tensor([0, 1, 5]))
    assert [group.longest for group in packing.classes] == [4, 1]
    asked(packing=packing, sliding_window=4)
    with pytest.raises(ConfigurationError, match="a window of 3 tokens without a mask"):
        asked(packing=packing, sliding_window=3)


def test_of_several_things_that_it_does_not_compute_the_same_one_is_named():
    for others in ({"zoom": 1, "bend": 2}, {"bend": 2, "zoom": 1}):
        with pytest.raises(ConfigurationError, match="Identity needs bend, which"):
            asked(**others)


@pytest.mark.parametrize(("window", "causal"), [(None, True), (99, True), (5, True), (4, False), (1, False)])
def test_the_kernel_s_own_causal_mask_is_used_wherever_a_window_hides_nothing(monkeypatch, window, causal):
    """It is several times as fast as a mask that is given."""
    seen, kernel = [], F.scaled_dot_product_attention

    def recorded(*tensors: Tensor, **options: Any) -> Tensor:
        seen.append(options.get("is_causal", False))
        assert ("attn_mask" in options) != seen[-1]
        return kernel(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    asked(seen=None if window is None else torch.tensor(window))
    assert seen == [causal]


def test_attention_and_its_mask_are_registered_together():
    found = {}

    class Interface:
        def __init__(self, of: str) -> None:
            self.of = of

        def register(self, name: str, function: Any) -> None:
            found[self.of, name] = function

    register(Interface("functions"), Interface("masks"))
    assert found == {("functions", "opd_packed"): attend, ("masks", "opd_packed"): mask}


def test_a_mask_is_a_window_or_nothing_else():
    assert mask(config=SimpleNamespace(), batch_size=1) is None
    window = mask(config=SimpleNamespace(sliding_window=7), local_size=7)
    assert window is not None and int(window) == 7
    for config, others in (
        (SimpleNamespace(attention_chunk_size=7), {"local_size": 7}),
        (SimpleNamespace(is_causal=False), {}),
        (SimpleNamespace(), {"use_vmap": True}),
    ):
        with pytest.raises(ConfigurationError, match="another mask"):
            mask(config=config, **others)
