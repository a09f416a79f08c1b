"""A Hugging Face model that reads packed sequences: the body without its vocabulary head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from opd.attention import Packing, packed_attention
from opd.errors import ConfigurationError

_NAME = "opd_packed"


def load_packed(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a local folder; its body takes `packing=` and reads every packed sequence for itself."""
    AttentionInterface.register(_NAME, _attend)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=_NAME, local_files_only=True, trust_remote_code=False
    )
    assert isinstance(model, PreTrainedModel)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigurationError(
            f"the teacher needs a plain output matrix, but {type(model).__name__} has {head}; choose a model whose "
            "lm_head is a linear layer without bias"
        )
    return model.to(device).eval().requires_grad_(False)


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Last hidden states `[N, H]` of `N` packed tokens, after the final norm."""
    body = model.base_model(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, packing=Packing.of(cu_seqlens)
    )
    return body.last_hidden_state[0]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,  # what other kernels want
) -> tuple[Tensor, None]:
    """transformers' attention signature, which passes no mask to an implementation it does not know."""
    assert attention_mask is None
    longest = max(group.longest for group in packing.classes)
    if sliding_window is not None and longest > sliding_window:
        raise ConfigurationError(
            f"the teacher attends to a window of {sliding_window} tokens, but a sequence has {longest}; shorten the "
            "prompts or max_tokens, or choose a model with full attention"
        )
    return packed_attention(query, key, value, packing, scaling), None
