"""Tiny models with quantized layers, in the forms of published checkpoints, beside what the numbers mean."""

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from tests.tiny_models import save, tiny_model

GROUP = 32  # of inputs that share a scale in `Form.AWQ`
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # in which AWQ packs eight numbers into one


class Form(Enum):
    """Form of quantized layers."""

    FP8 = "fp8"  # blocks of 128 x 128, as Qwen3 and DeepSeek have
    INT8 = "compressed-tensors"  # rows, and activations token by token (W8A8)
    AWQ = "awq"  # groups of inputs in 4 bits


def quantized(form: Form, folder: Path, **changes: Any) -> Qwen3ForCausalLM:
    """Write a quantized checkpoint to `folder`; returns the model of the same numbers in float32."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny_model(3, tied=False, std=0.08, **(shape | {"num_hidden_layers": 1} | changes)).to(torch.bfloat16)
    save(model, folder)
    model.float()
    file = folder / "model.safetensors"
    state, config = load_file(file), json.loads((folder / "config.json").read_text())
    make = {Form.FP8: _fp8, Form.INT8: _int8, Form.AWQ: _awq}[form]
    for name, layer in _layers(model):
        del state[f"{name}.weight"]
        tensors, layer.weight.data = make(layer.weight.data)
        state |= {f"{name}.{end}": tensor.contiguous() for end, tensor in tensors.items()}
    save_file(state, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": _CONFIGS[form]}))
    return model


def _layers(model: Qwen3ForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield f"model.layers.{name}", module


def _fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    blocks = weight.view(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448.0
    numbers = (blocks / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": numbers.view(rows, columns), "weight_scale_inv": scale[:, 0, :, 0]}
    return tensors, (numbers.float() * scale).view(rows, columns)


def _int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.0
    numbers = (weight / scale).round().to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).half().to(torch.bfloat16).float()  # exact in both: engines keep it in their own dtype
    zero = (-low / scale).round().clamp(0, 15)
    numbers = (groups / scale + zero).round().clamp(0, 15)
    tensors = {
        "qweight": _packed(numbers.view(rows, columns).T),
        "qzeros": _packed(zero[..., 0].T),
        "scales": scale[..., 0].T.half(),
    }
    return tensors, ((numbers - zero) * scale).view(rows, columns)


def _packed(numbers: Tensor) -> Tensor:
    found = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int32)
    for place, at in enumerate(_ORDER):
        found |= numbers[:, at::8].to(torch.int32) << (4 * place)
    return found


_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_CONFIGS: dict[Form, dict[str, Any]] = {
    Form.FP8: {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    Form.INT8: {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _WEIGHTS,
                "input_activations": _WEIGHTS | {"strategy": "token", "dynamic": True},
            }
        },
    },
    Form.AWQ: {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
