"""Checkpoints of real sizes without their numbers: configuration, tokenizer, and the headers of sparse files."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from tests.tiny_models import TOKENIZER

_TIED: Mapping[str, Any] = {"tie_word_embeddings": True}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-0.6B": _TIED | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "Qwen3-1.7B": _TIED | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "Qwen3-4B": _TIED | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
    "Qwen3-30B-A3B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
    },
}  # fmt: skip
PARAMETERS = {
    "Qwen3-0.6B": 596_049_920, "Qwen3-1.7B": 1_720_574_976, "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264, "Qwen3-30B-A3B": 30_532_122_624, "Qwen3-235B-A22B": 235_093_634_560,
}  # fmt: skip
_COMMON = {
    "vocab_size": 151936, "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "dtype": "bfloat16",
}  # fmt: skip


def checkpoint(name: str, folder: Path) -> Path:
    """The folder `folder / name`; its weights are one sparse file, which takes no room on the disk."""
    path = folder / name
    if path.exists():
        return path
    path.mkdir(parents=True)
    sparse = "num_experts" in SIZES[name]
    kind, model = ("qwen3_moe", "Qwen3MoeForCausalLM") if sparse else ("qwen3", "Qwen3ForCausalLM")
    config = _COMMON | SIZES[name] | {"model_type": kind, "architectures": [model]}
    (path / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(file, path)
    _headers(dict(_tensors(config)), path / "model.safetensors")
    return path


def _tensors(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, q, k = c["hidden_size"], 128 * c["num_attention_heads"], 128 * c["num_key_value_heads"]
    yield "model.embed_tokens.weight", (c["vocab_size"], h)
    for layer in (f"model.layers.{n}" for n in range(c["num_hidden_layers"])):
        yield from ((f"{layer}.{name}_layernorm.weight", (h,)) for name in ("input", "post_attention"))
        for name, shape in (("q", (q, h)), ("k", (k, h)), ("v", (k, h)), ("o", (h, q))):
            yield f"{layer}.self_attn.{name}_proj.weight", shape
        yield from ((f"{layer}.self_attn.{name}_norm.weight", (128,)) for name in "qk")
        experts, width = c.get("num_experts", 0), c.get("moe_intermediate_size", c["intermediate_size"])
        if experts:
            yield f"{layer}.mlp.gate.weight", (experts, h)
        for mlp in [f"mlp.experts.{n}" for n in range(experts)] or ["mlp"]:
            yield from ((f"{layer}.{mlp}.{name}_proj.weight", (width, h)) for name in ("gate", "up"))
            yield f"{layer}.{mlp}.down_proj.weight", (h, width)
    yield "model.norm.weight", (h,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], h)


def _headers(tensors: Mapping[str, tuple[int, ...]], file: Path) -> None:
    header, end = dict[str, object](), 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
