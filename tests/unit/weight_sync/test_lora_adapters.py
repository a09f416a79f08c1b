"""Adapters by name and as matrices: nothing odd is taken, and what is merged is what LoRA's paper says."""

import pytest
import torch

from opd.errors import DataError
from weight_sync.lora import merged, pairs, with_adapters


def adapter(layer: str, rows: int = 5, columns: int = 3, r: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(layer))
    return {
        f"{layer}.lora_A.weight": torch.randn(r, columns, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(rows, r, generator=generator),
    }


def test_halves_are_paired_by_name_in_any_order() -> None:
    one, two = adapter("a.q_proj"), adapter("b.down_proj")
    parts = dict(reversed((one | two).items()))
    found = pairs(parts.items())
    assert set(found) == {"a.q_proj", "b.down_proj"}
    assert found["a.q_proj"] == (one["a.q_proj.lora_A.weight"], one["a.q_proj.lora_B.weight"])


def test_half_a_pair_and_strangers_are_refused() -> None:
    whole = adapter("a.q_proj")
    for lost in whole:
        with pytest.raises(DataError, match=r"q_proj\.lora_[AB]\.weight' (is missing|came in addition)"):
            pairs((n, t) for n, t in whole.items() if n != lost)
    with pytest.raises(DataError, match=r"'a\.norm\.weight' came in addition"):
        pairs((whole | {"a.norm.weight": torch.ones(3)}).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_layer_does_what_layer_and_adapter_do(dtype: torch.dtype) -> None:
    base = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    a, b = (t.to(dtype) for t in adapter("a").values())
    x = torch.randn(7, 3)
    whole = merged(base, a, b, 0.5)
    assert whole.dtype == dtype
    expected = x @ base.float().T + 0.5 * (x @ a.float().T) @ b.float().T
    torch.testing.assert_close(x @ whole.float().T, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
    assert torch.equal(merged(base, a, torch.zeros_like(b), 0.5), base)
    for wrong in (base[:4], base[:, :2]):
        with pytest.raises(DataError, match=r"shapes \(2, 3\) and \(5, 2\) does not fit a matrix of"):
            merged(wrong, a, b, 0.5)


def test_what_has_no_adapter_passes_unchanged() -> None:
    base = {"a.weight": torch.randn(5, 3), "a.bias": torch.randn(5), "norm.weight": torch.ones(3)}
    after = dict(with_adapters(base.items(), pairs(adapter("a").items()), 1.0))
    assert [n for n in base if after[n] is not base[n]] == ["a.weight"] and list(after) == list(base)


def test_a_refusal_names_the_first_of_many_whatever_order_they_came_in() -> None:
    strangers = {f"{i:02}.norm.weight": torch.ones(3) for i in range(40, 60)}
    for parts in (strangers | adapter("a"), adapter("a") | dict(reversed(strangers.items()))):
        with pytest.raises(DataError, match=r"but '40\.norm\.weight' came in addition; check"):
            pairs(parts.items())
    lost = {f"{i}.lora_A.weight": torch.ones(2, 3) for i in range(20, 40)}
    with pytest.raises(DataError, match=r"but '20\.lora_B\.weight' is missing; check"):
        pairs(lost.items())


@pytest.mark.parametrize(("a", "b"), [((2, 3), (5, 4)), ((2, 4), (5, 2)), ((2, 3), (4, 2))], ids=str)
def test_matrices_that_do_not_fit_each_other_or_the_layer_are_refused(a: tuple[int, int], b: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"does not fit a matrix of \(5, 3\)"):
        merged(torch.zeros(5, 3), torch.ones(a), torch.ones(b), 1.0)


def test_a_base_in_another_dtype_is_first_what_the_learner_holds() -> None:
    """Rounded to the adapter's dtype before the product is added, and once more after."""
    base, (a, b) = torch.randn(5, 3), (t.bfloat16() for t in adapter("a").values())
    whole = merged(base, a, b, 0.5)
    assert torch.equal(whole, (base.bfloat16().float() + 0.5 * (b.float() @ a.float())).bfloat16())
