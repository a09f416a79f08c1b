"""Sizes of a model that decide about memory, read from its `config.json` and the headers of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from hf.folder import read_headers, text_config
from hf.quantized import Quantization, parameters, quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder: `width` is the hidden size, `inner` that of a dense MLP, 0 experts are none.

    `largest` counts the parameters of the largest tensor, `normed` says whether queries and keys have norms of their
    own. `quantized` are the bytes of quantized weights, 0 for plain ones, and `form` says how they are quantized.
    `sparse` of the `layers` have experts, of which each token visits `chosen`, each `expert` wide.
    """

    parameters: int
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    largest: int = 0
    normed: bool = False
    quantized: int = 0
    form: Quantization | None = None
    experts: int = 0
    chosen: int = 0
    expert: int = 0
    sparse: int = 0

    def weights(self, width: int) -> int:
        """Bytes of all weights, plain ones at `width` bytes each."""
        return self.quantized or width * self.parameters

    @property
    def query(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Columns of all key heads, which are also those of the values."""
        return self.kv_heads * self.head_dim


def shape_of(config: Mapping[str, Any], parameters: int, largest: int = 0, *, normed: bool = False) -> ModelShape:
    """Shape of a language model by its configuration; what a family calls otherwise and is not known here is 0."""

    def known(*names: str) -> int:
        return next((int(config[name]) for name in names if config.get(name)), 0)

    width, heads = known("hidden_size", "n_embd", "d_model"), known("num_attention_heads", "n_head")
    layers, experts = known("num_hidden_layers", "n_layer"), known("num_experts", "num_local_experts")
    dense = len(config.get("mlp_only_layers") or ())
    return ModelShape(
        parameters=parameters,
        layers=layers,
        width=width,
        inner=known("intermediate_size", "n_inner", "ffn_dim") or 4 * width,
        heads=heads,
        kv_heads=known("num_key_value_heads") or heads,
        head_dim=known("head_dim") or (width // heads if heads else 0),
        vocabulary=known("vocab_size"),
        largest=largest,
        normed=normed,
        experts=experts,
        chosen=known("num_experts_per_tok") if experts else 0,
        expert=known("moe_intermediate_size", "intermediate_size") if experts else 0,
        sparse=layers - dense if experts else 0,
    )


def uneven(model: ModelShape, number: int) -> str:
    """Part of a model that cannot be divided among `number` devices as vLLM does it, as text; "" if all can.

    Blocks of quantized weights that have a scale in common stay whole.
    """
    kv, each_mlp = model.kv_heads, model.expert or model.inner
    for what, count in {"attention heads": model.heads, "columns of its MLPs": each_mlp}.items():
        if count % number:
            return f"{count} {what}"
    if kv % number and number % kv:
        return f"{kv} key-value heads"
    if model.form is None or number == 1:
        return ""
    parts = {"columns of its queries": model.query // number, "columns of its MLPs": each_mlp // number}
    if model.form.square:
        parts["columns of its keys"] = model.head_dim * max(kv // number, 1)
    wrong = next((what for what, count in parts.items() if count % model.form.block), "")
    return f"scales of blocks of {model.form.block} {wrong}" if wrong else ""


@lru_cache(maxsize=16)  # a plan asks several times, and a comparison plans the same folder for every arm
def read_shape(path: str) -> ModelShape:
    """Shape of the model in the folder `path`; its parameters are those of its safetensors, tied ones once."""
    part = f"the model {path!r}"
    config, stored = text_config(path, part), read_headers(path, part)
    quantized = quantization(config, part)
    sizes = parameters(stored, quantized)
    normed = any(name.endswith(("q_norm.weight", "q_layernorm.weight")) for name in sizes)
    shape = shape_of(config, sum(sizes.values()), max(sizes.values(), default=0), normed=normed)
    held = sum(tensor.nbytes for tensor in stored.values()) if quantized else 0
    return replace(shape, quantized=held, form=quantized)
