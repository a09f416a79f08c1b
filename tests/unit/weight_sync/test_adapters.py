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
