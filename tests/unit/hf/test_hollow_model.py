"""A model before its weights are read is what `from_pretrained` makes, but for memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf.folder import read_headers
from hf.hollow_model import hollow_causal, sources
from tests.fuzz.families import make

# Rotary tables of three kinds, tied and untied, Conv1D, names that are renamed, and fused experts.
FAMILIES = ["Qwen3 (tied)", "Llama-3", "Gemma-3", "GPT-2", "Qwen2.5 + YaRN", "Mixtral", "Qwen3-MoE"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hollow_model_filled_is_the_whole_one(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Parameters, names, buffers (which no file has), configuration; no random number is drawn."""
    make(family, tmp_path)
    state = torch.random.get_rng_state()
    hollow = hollow_causal(str(tmp_path), dtype, torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    found = sources(hollow, read_headers(str(tmp_path), "a test"), "a test")
    own, expected = dict(hollow.named_parameters()), dict(whole.named_parameters())
    assert list(own) == list(expected) and set(found) == set(own.values())
    for name, parameter in own.items():
        assert parameter.untyped_storage().nbytes() == dtype.itemsize, "one number in memory"
        assert parameter.requires_grad == expected[name].requires_grad and parameter.dtype == dtype
        assert torch.equal(found[parameter].read(parameter), expected[name]), name
    buffers = dict(hollow.named_buffers())
    assert list(buffers) == [name for name, _ in whole.named_buffers()]
    for name, buffer in whole.named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
    assert str(hollow.config) == str(whole.config) and hollow.generation_config == whole.generation_config
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (hollow, whole)]
    assert tied[0] == tied[1]
