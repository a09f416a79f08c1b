"""Quantized weights of a Hugging Face folder: their method, parameters and bytes, by configuration and headers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf.folder import HEADS, TIED, Stored
from opd.errors import DataError

READ = ("fp8", "awq", "compressed-tensors")
"""Methods (`quant_method`) that an engine of this project reads; parity was measured for each on CPUs."""
_PACKED = ("qweight", "weight_packed")
_BESIDE = ("qzeros", "g_idx", "weight_shape")
_PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Quantization of a folder: `method` is its `quant_method`, `bits` those of a weight.

    `block` inputs of a matrix have a scale in common (1: all, or no number), of `square` blocks as many outputs, too.
    `floating` numbers are FP8 or smaller floats, others integers.
    """

    method: str
    bits: int
    block: int
    square: bool = False
    floating: bool = False

    @property
    def fp8_blocks(self) -> bool:
        """Whether these are blocks of FP8, which vLLM multiplies on a processor only with its AMX instructions."""
        return self.floating and self.bits == 8 and self.square


def quantization(config: Mapping[str, Any], part: str) -> Quantization | None:
    """Quantization that a `config.json` names; None for plain weights.

    Raises:
        DataError: it names none of a known form.
    """
    raw = config.get("quantization_config")
    if raw is None:
        return None
    method = raw.get("quant_method") if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(method, str):
        raise DataError(
            f"{part} has a config.json with a quantization_config without a quant_method; copy it anew, or choose the "
            "unquantized model"
        )
    groups = raw.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, Mapping) else raw
    own = group.get("weights") if isinstance(group, Mapping) and isinstance(groups, Mapping) else raw
    own = own if isinstance(own, Mapping) else {}
    sizes = [own.get("weight_block_size"), own.get("block_structure"), own.get("group_size"), own.get("q_group_size")]
    blocks = [number for size in sizes for number in (size if isinstance(size, list) else [size])]
    known = [number for number in blocks if isinstance(number, int) and number > 0]
    widths = [own.get(key) for key in ("bits", "w_bit", "num_bits")]
    bits = next((width for width in widths if isinstance(width, int) and 0 < width <= 64), 8)
    square = any(isinstance(size, list) and len(size) == 2 for size in sizes)
    floating = method == "fp8" or own.get("type") == "float"
    return Quantization(method=method, bits=bits, block=max(known, default=1), square=square, floating=floating)


def parameters(stored: Mapping[str, Stored], quantized: Quantization | None) -> dict[str, int]:
    """Parameters of each tensor by name, as they were before quantization; scales and zero points are none."""
    return {name: _parameters(name, tensor, quantized) for name, tensor in stored.items()}


def _parameters(name: str, tensor: Stored, quantized: Quantization | None) -> int:
    if quantized is None:
        return tensor.size
    last = name.rpartition(".")[2]
    if last in _PACKED:
        return 8 * tensor.nbytes // quantized.bits
    return 0 if "scale" in last or "zero_point" in last or last in _BESIDE else tensor.size


def quantized_head(stored: Mapping[str, Stored], *, tied: bool) -> str:
    """Name of a tensor that shows that the output matrix is quantized or not there; "" if it is plain."""
    heads = sorted(name for name in stored if any(f".{name}".endswith(f".{head}") for head in HEADS))
    beside = [name for name in stored if name.split(".")[-2:-1] in (["lm_head"], ["embed_out"]) and name not in heads]
    if beside:
        return min(beside)
    ends = heads or [name for name in sorted(stored) if tied and name.endswith(TIED)]
    return "" if ends and stored[ends[0]].dtype in _PLAIN else (ends or ["lm_head.weight"])[0]
