"""Model and tokenizer of a folder, as transformers loads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


@contextmanager
def _without_progress() -> Iterator[None]:
    """Leave out the bar of loading, which a notebook keeps as lines above the answer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def plain_model(path: str | Path) -> PreTrainedModel:
    """Causal language model of the folder on the CPU, in the dtype it was saved in."""
    with _without_progress():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    assert isinstance(model, PreTrainedModel)
    return model


def plain_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Tokenizer of the folder."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
