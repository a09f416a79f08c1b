"""Models of published shapes as files of a hub: configuration, tokenizer, template, and weights that are headers alone.

A plan looks at nothing else. The tokenizer is no published one: a token per byte, the special tokens of Qwen3 (and the
words that methods name), and, where it is to have its published size, as many tokens more that no text needs.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hub_stand_in import Files, Hollow

TEMPLATE = Path(__file__).parent / "unit" / "inputs" / "chat" / "qwen3.jinja"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
PLAIN = 151_643  # tokens of Qwen3 below its special ones
WORDS = ("think",)
SAVED = {"dtype": "bfloat16", "transformers_version": "4.51.0"}


def qwen3(width: int, layers: int, heads: int, inner: int, *, tied: bool, **more: Any) -> dict[str, Any]:
    """Configuration of a Qwen3 with 8 key-value heads of width 128, e.g. `qwen3(1024, 28, 16, 3072, tied=True)`."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": inner, "tie_word_embeddings": tied}
    rest = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936}
    rest |= {"max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, **SAVED}
    return rest | shape | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | more


def qwen2(width: int, layers: int, heads: int, kv: int, inner: int, *, rows: int, tied: bool = False) -> dict[str, Any]:
    """Configuration of a Qwen2.5, e.g. `qwen2(3584, 28, 28, 4, 18944, rows=152_064)`."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"num_key_value_heads": kv, "intermediate_size": inner, "tie_word_embeddings": tied, "vocab_size": rows}
    rest = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32_768}
    return rest | shape | {"rms_norm_eps": 1e-6, **SAVED}


def qwen3_moe(width: int, layers: int, heads: int, kv: int, *, experts: int, inner: int) -> dict[str, Any]:
    """Configuration of a Qwen3 with experts, e.g. `qwen3_moe(2048, 48, 32, 4, experts=128, inner=768)`."""
    of_experts = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": inner}
    of_experts |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    kind = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": kv}
    return qwen3(width, layers, heads, 6144, tied=False, **kind, **of_experts, max_position_embeddings=262_144)


def gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    """Configuration of a GPT-2, e.g. `gpt2(1600, 48, 25)`."""
    shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": 50_257}
    return shape | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **SAVED}


@cache
def tokenizer(size: int = 0) -> Mapping[str, bytes]:
    """Files of the tokenizer; `size` tokens, or as few as there can be (0)."""
    tokens = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens |= {word: len(tokens) + i for i, word in enumerate(WORDS)}
    fill = max(0, PLAIN - len(tokens)) if size else 0
    tokens |= {f"{{{i}}}": len(tokens) + i for i in range(fill)}
    missing = size - len(tokens) - len(SPECIAL) if size else 0
    special = [*SPECIAL[:3], *(f"<|reserved_{i}|>" for i in range(missing)), *SPECIAL[3:]]
    added = [
        {"id": len(tokens) + i, "content": text, "special": "think" not in text}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate(special)
    ]
    level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": tokens, "merges": [], "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    whole |= {"pre_tokenizer": {"type": "ByteLevel", **level}, "post_processor": None, "model": model}
    whole |= {"decoder": {"type": "ByteLevel", **level}}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return {
        "tokenizer.json": json.dumps(whole).encode(),
        "tokenizer_config.json": json.dumps(about).encode(),
        "chat_template.jinja": TEMPLATE.read_bytes(),
    }


def ends(files: Mapping[str, bytes]) -> Sequence[int]:
    """Ids of the end of a turn and of a text, the former first."""
    added = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    return added["<|im_end|>"], added["<|endoftext|>"]


def hollow(config: Mapping[str, Any], vocabulary: int = 0) -> Files:
    """Files of a model of this configuration without numbers; its tokenizer has `vocabulary` tokens (0: few)."""
    words = dict(tokenizer(vocabulary))
    turn, text = ends(words)
    whole = {**config, "eos_token_id": turn, "bos_token_id": text}
    generation = {"eos_token_id": [turn, text], "pad_token_id": text}
    return words | {
        "config.json": json.dumps(whole).encode(),
        "generation_config.json": json.dumps(generation).encode(),
        "model.safetensors": Hollow.of(_shapes(json.dumps(whole, sort_keys=True))),
    }


@cache
def _shapes(config: str) -> Mapping[str, Sequence[int]]:
    """Names and shapes of the parameters that transformers gives a model of this configuration."""
    fields = json.loads(config)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    found = dict[str, Sequence[int]]()
    for name, parameter in made.named_parameters():
        found |= _stored(name, tuple(parameter.shape))
    return found


def _stored(name: str, shape: Sequence[int]) -> Mapping[str, Sequence[int]]:
    """What a checkpoint has in place of a parameter: of fused experts the matrices of each."""
    before, experts, last = name.partition(".experts.")
    if not experts or len(shape) != 3:
        return {name: shape}
    number, rows, columns = shape
    halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[last]
    one = (rows // len(halves), columns)
    return {f"{before}.experts.{i}.{half}.weight": one for i in range(number) for half in halves}
