"""One maker of tiny random models for all tests that need a real one, and what a plain forward of it says."""

import shutil
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.ports import ScoreRequest

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "shop" / "teacher"
VOCABULARY = 160
EOS = 2


def tiny_model(
    seed: int = 0, *, tied: bool = True, positions: int = 96, std: float = 0.25, **changes: Any
) -> Qwen3ForCausalLM:
    """A random Qwen3 with opinions: `std` of its weights makes next-token distributions that are far from flat.

    Its shape is the smallest that vLLM's CPU kernels take; `changes` are fields of `Qwen3Config`.
    """
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**(shape | changes))).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=std)
    return model


def save(model: Qwen3ForCausalLM, folder: Path) -> Path:
    """`model` as a checkpoint with a tokenizer."""
    model.save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


def logprobs(model: Qwen3ForCausalLM, ids: np.ndarray) -> torch.Tensor:
    """Full logprobs `[len(ids), V]` of the next token at every position, from one unpadded forward."""
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()[None]).logits[0].float().log_softmax(-1)


def completion_logprobs(model: Qwen3ForCausalLM, request: ScoreRequest) -> torch.Tensor:
    """Full logprobs `[T, V]` where the tokens of `request` are predicted."""
    ids = np.concatenate([request.context_ids, request.token_ids])
    return logprobs(model, ids)[len(request.context_ids) - 1 : -1]


def impatient(config: Any, name: str = "deadline_s", seconds: float = 0.05) -> Any:
    """A copy that waits no longer than `seconds`, although no setting may be so short."""
    hurried = copy(config)
    object.__setattr__(hurried, name, seconds)
    return hurried
