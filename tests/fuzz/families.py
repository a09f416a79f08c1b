"""Random models of many families, each a folder of two layers (four where layers differ), made without a network."""

from collections.abc import Mapping
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import TOKENIZER

VOCABULARY = 160
POSITIONS = 256
WINDOW = 16

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_HEADS = {"num_key_value_heads": 2}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
_EXPERTS |= {"norm_topk_prob": True}
_GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen3 (tied)": ("qwen3", _BASE | {"head_dim": 32, "tie_word_embeddings": True}),
    "Qwen3, 151,936 rows": ("qwen3", _BASE | {"head_dim": 32, "vocab_size": 151_936, "tie_word_embeddings": True}),
    "Qwen2.5": ("qwen2", _BASE),
    "Qwen2.5 + YaRN": ("qwen2", _BASE | {"rope_parameters": _YARN}),
    "Qwen2 + window": ("qwen2", _BASE | _MIXED | {"use_sliding_window": True}),
    "Llama-3": ("llama", _BASE | {"rope_parameters": _LLAMA3}),
    "Llama-3.2 (tied)": ("llama", _BASE | {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "Mistral (window)": ("mistral", _BASE | {"head_dim": 32, "sliding_window": WINDOW}),
    "OLMo-2": ("olmo2", _BASE),
    "OLMo-3": ("olmo3", _BASE | _MIXED),
    "Gemma-1": ("gemma", _BASE | {"head_dim": 32, "tie_word_embeddings": True}),
    "Gemma-2": ("gemma2", _BASE | _MIXED | {"head_dim": 32, "attn_logit_softcapping": 5.0}),
    "Gemma-2, head not capped": (
        "gemma2",
        _BASE
        | _MIXED
        | {"head_dim": 32, "attn_logit_softcapping": 5.0, "final_logit_softcapping": None, "tie_word_embeddings": True},
    ),
    "Gemma-3": ("gemma3_text", _BASE | _MIXED | {"head_dim": 32}),
    "Phi-2": ("phi", _BASE | _HEADS),
    "Phi-3": ("phi3", _BASE | _HEADS | {"sliding_window": WINDOW}),
    "OPT": ("opt", _BASE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", _BASE | {"num_hidden_layers": 4}),
    "StarCoder2": ("starcoder2", _BASE | {"sliding_window": WINDOW, "tie_word_embeddings": True}),
    "GPT-2": ("gpt2", _GPT | _ENDS),
    "GPT-NeoX": ("gpt_neox", _BASE | _HEADS),
    "GPT-J": ("gptj", _GPT | _ENDS | {"rotary_dim": 16}),
    "StableLM": ("stablelm", _BASE | _HEADS),
    "Nemotron": ("nemotron", _BASE | {"head_dim": 32}),
    "GLM-4": ("glm4", _BASE | {"head_dim": 32}),
    "ERNIE-4.5": ("ernie4_5", _BASE | {"head_dim": 32}),
    "Granite": ("granite", _BASE | {"logits_scaling": 8.0}),
    "Cohere": ("cohere", _BASE | {"tie_word_embeddings": True}),
    "Cohere-2": ("cohere2", _BASE | _MIXED | {"head_dim": 32, "tie_word_embeddings": True}),
    "EXAONE-4": ("exaone4", _BASE | _MIXED | {"head_dim": 32}),
    "Apertus": ("apertus", _BASE),
    "Arcee": ("arcee", _BASE),
    "HunYuan": ("hunyuan_v1_dense", _BASE | {"head_dim": 32}),
    "SeedOSS": ("seed_oss", _BASE | {"head_dim": 32}),
    "Falcon": (
        "falcon",
        _BASE | {"new_decoder_architecture": False, "multi_query": True, "alibi": False, "tie_word_embeddings": True},
    ),
    "BLOOM": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 2} | _ENDS),
    "MPT": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": POSITIONS}),
    "Mixtral": ("mixtral", _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen3-MoE": ("qwen3_moe", _BASE | _EXPERTS | {"head_dim": 32}),
    "Qwen2-MoE": (
        "qwen2_moe",
        _BASE | _EXPERTS | {"head_dim": 32, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    ),
    "GLM-4-MoE": (
        "glm4_moe",
        _BASE | {"head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "ERNIE-4.5-MoE": (
        "ernie4_5_moe",
        _BASE | {"head_dim": 32, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}
        | {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    ),
    "FlexOLMo": ("flex_olmo", _BASE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite-MoE": ("granitemoe", _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 8.0}),
    "HunYuan-MoE": (
        "hunyuan_v1_moe",
        _BASE | {"head_dim": 32, "num_experts": 4, "moe_topk": 2},
    ),
    "OLMoE": ("olmoe", _BASE | _HEADS | {"num_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3": (
        "deepseek_v3",
        _BASE
        | _HEADS
        | _MLA
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"moe_intermediate_size": 48, "n_shared_experts": 1},
    ),
    "gpt-oss": (
        "gpt_oss",
        _BASE | _MIXED | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Llama-4": (
        "llama4_text",
        _BASE | {"head_dim": 32, "num_local_experts": 2, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 96},
    ),
    "Qwen3-Next": ("qwen3_next", _BASE | _GDN | _EXPERTS | {"head_dim": 32, "shared_expert_intermediate_size": 48}),
    "Qwen3.5": ("qwen3_5_text", _BASE | _GDN | {"head_dim": 32}),
    "Falcon-H1": (
        "falcon_h1",
        _BASE | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
    "Jamba": (
        "jamba",
        _BASE | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8}
        | {"num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "Mamba": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8} | _ENDS),
    "Mamba-2": (
        "mamba2",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
        | {"num_heads": 4, "head_dim": 32, "n_groups": 1} | _ENDS,
    ),
    "LFM2": ("lfm2", _BASE | {"layer_types": ["conv", "full_attention"]}),
    "RWKV": ("rwkv", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2} | _ENDS),
}  # fmt: skip


def make(family: str, folder: Path, seed: int = 0, sharpness: float = 4.0) -> PreTrainedModel:
    """A random model of `family`, saved in `folder` with a tokenizer.

    Queries and keys are larger than they are at birth by `sharpness` each, so that windows, caps and sinks matter.
    """
    kind, fields = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 2)[-2] if name.count(".") > 1 else name
        if parameter.ndim == 2 and any(word in last for word in ("q_", "k_", "qkv", "query", "c_attn")):
            parameter.data.mul_(sharpness)
        if "correction_bias" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    for file in TOKENIZER.glob("*token*.json"):
        copy(file, folder)
    return model.eval()
