"""Model and tokenizer of a folder, as transformers loads them."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def plain_model(path: str | Path) -> PreTrainedModel:
    """Causal language model of the folder on the CPU, in the dtype it was saved in."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    assert isinstance(model, PreTrainedModel)
    return model


def plain_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Tokenizer of the folder."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
