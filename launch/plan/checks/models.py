"""Sizes of a model folder, read without its weights."""

from hf.folder import output_matrix, read_headers, text_config
from hf.quantized import parameters, quantization

_WIDTHS = ("hidden_size", "n_embd", "d_model")


def parameter_count(path: str) -> int:
    """Parameters in a folder's safetensors (tied ones once)."""
    part = f"the model {path!r}"
    stored = read_headers(path, part)
    return sum(parameters(stored, quantization(text_config(path, part), part)).values()) if stored else 0


def vocabulary_rows(path: str) -> int:
    """Rows of the output matrix, padding included."""
    return int(text_config(path, f"the model {path!r}").get("vocab_size") or 0)


def hidden_width(path: str) -> int:
    """Columns of the output matrix."""
    stored = read_headers(path, f"the model {path!r}")
    name, config = output_matrix(stored), text_config(path, f"the model {path!r}")
    return stored[name].shape[-1] if name else int(next((config[key] for key in _WIDTHS if config.get(key)), 0))
