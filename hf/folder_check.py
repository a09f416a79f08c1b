"""Consistency of a model folder: its configuration against the headers of its weights, nothing more.

A model is built without numbers (on the meta device), so what its class wants is compared with what is stored. That
takes a second or so, whatever the size.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf.folder import HEADS, Stored, input_matrix, read_config, read_headers, read_json
from hf.packable import context_length
from hf.single_tensor import same_rows
from hf.weight_names import places
from opd.errors import DataError

_DTYPES = {"float32", "float16", "bfloat16", "float64", "auto"}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Left in old files by versions of transformers that stored what is computed anew.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.(masked_)?bias|position_ids)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A model as transformers would build it, on the meta device, and the tensors in its folder, if it has any.

    `part` begins every sentence, as in "student 'models/small'".
    """

    part: str
    causal: Any
    stored: Mapping[str, Stored]

    @property
    def context(self) -> int | None:
        """Maximum sequence length in tokens, if the configuration has one."""
        return context_length(self.causal.config)


def read_folder(path: str, role: str) -> Folder:
    """Read and compare configuration and headers of `path`; `role` is e.g. "student".

    Raises:
        ConfigurationError: `path` is no folder.
        DataError: a file is damaged, or the configuration and the weights contradict each other.
    """
    part = f"{role} {path!r}"
    raw, stored = read_config(path, role), read_headers(path, role)
    _check_config(raw, stored, part)
    _check_generation(Path(path) / "generation_config.json", part)
    with _sentences(part, "a config.json of which transformers cannot make a model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        causal = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if stored and "quantization_config" not in raw:
        _compare(causal, stored, part)
        _compare_tied(config, stored, part)
    return Folder(part=part, causal=causal, stored=stored)


@contextmanager
def _sentences(part: str, what: str) -> Iterator[None]:
    """Context in which any error of transformers about a file is one sentence, and its warnings are not printed."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # of any type: each model's class reads its own configuration
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise DataError(f"{part} has {what} ({reason}); correct it, or copy it anew") from error
    finally:
        logging.set_verbosity(level)


def _check_config(raw: Mapping[str, Any], stored: Mapping[str, Stored], part: str) -> None:
    """Refuse a configuration that transformers would accept silently, or fail on only after hours."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise DataError(
            f"{part} has a config.json with model_type={kind!r}, which is no causal language model that this "
            "transformers knows; correct it, or choose another model"
        )
    text = raw.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise DataError(f"{part} has a config.json with text_config={text!r}, which is no mapping; copy it anew")
    config = {**raw, **(text or {})}
    for name in ("dtype", "torch_dtype"):
        dtype = config.get(name)
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            raise DataError(
                f"{part} has a config.json with {name}={dtype!r}, which is no dtype of weights; set one of "
                f"{', '.join(sorted(_DTYPES))}"
            )
    _check_ids(config, "config.json", part)
    layers = next((config[name] for name in _LAYERS if name in config), 0)
    if stored and isinstance(layers, int) and layers > len(stored):
        raise DataError(
            f"{part} has a config.json with {layers} layers, but only {len(stored)} tensors; copy the folder anew"
        )


def _check_ids(raw: Mapping[str, Any], file: str, part: str) -> None:
    """Refuse special tokens that are no ids; the end of text may have several."""
    for name in _SPECIAL:
        given = raw.get(name)
        ids = given if isinstance(given, list) else [given] if given is not None else []
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise DataError(f"{part} has a {file} with {name}={given!r}, which is no token id; correct it")


def _check_generation(file: Path, part: str) -> None:
    if file.exists():
        _check_ids(read_json(file, part), file.name, part)
        with _sentences(part, "a generation_config.json that transformers cannot read"):
            GenerationConfig.from_pretrained(str(file.parent), local_files_only=True)


def _compare(causal: Any, stored: Mapping[str, Stored], part: str) -> None:
    """Compare names and shapes: every parameter is stored, and no stored tensor would be left out."""
    wanted, kind = causal.state_dict(), type(causal).__name__
    remedy = "config.json and weights are not of one model, so copy the folder anew"
    loaded = places(causal, stored)
    for name, (place, converted) in loaded.items():
        if place not in wanted:
            ignored = [*(causal._keys_to_ignore_on_load_unexpected or []), _COMPUTED]
            if not any(re.search(pattern, name) for pattern in ignored):
                raise DataError(f"{part} stores {name!r}, for which its {kind} has no place; {remedy}")
        elif not converted and tuple(wanted[place].shape) != stored[name].shape:
            raise DataError(
                f"{part} stores {name!r} with the shape {list(stored[name].shape)}, but its {kind} wants "
                f"{list(wanted[place].shape)}; {remedy}"
            )
    there = {place for place, _ in loaded.values()}
    tied = set(causal.all_tied_weights_keys) | set(causal.all_tied_weights_keys.values())
    optional = [*(causal._keys_to_ignore_on_load_missing or []), _COMPUTED]
    for name in wanted:
        twin = name in tied and there & tied
        if name not in there and not twin and not any(re.search(pattern, name) for pattern in optional):
            raise DataError(f"{part} stores no {name!r}, which its {kind} needs; {remedy}")
    _compare_fused(wanted, loaded, stored, part, remedy)


def _compare_tied(config: Any, stored: Mapping[str, Stored], part: str) -> None:
    """Refuse an output matrix of its own beside a configuration that ties it: some programs read it, others do not."""
    head = next((name for name in stored if name.endswith(HEADS)), None)
    embedding = input_matrix(stored)
    tied = config.get_text_config().tie_word_embeddings
    if not tied or head is None or embedding is None or stored[head].shape != stored[embedding].shape:
        return
    if stored[head].dtype == stored[embedding].dtype and same_rows(head, embedding, stored):
        return
    raise DataError(
        f"{part} stores {head!r} with other numbers than {embedding!r}, but its config.json has "
        "tie_word_embeddings=true, with which transformers reads that matrix and vLLM does not; set it to false"
    )


def _compare_fused(
    wanted: Mapping[str, Any],
    loaded: Mapping[str, tuple[str, bool]],
    stored: Mapping[str, Stored],
    part: str,
    remedy: str,
) -> None:
    """Check that tensors fused on loading have as many numbers as their result."""
    sizes: dict[str, int] = {}
    for name, (place, converted) in loaded.items():
        if converted and place in wanted:
            sizes[place] = sizes.get(place, 0) + stored[name].size
    for place, size in sizes.items():
        if size != wanted[place].numel():
            raise DataError(f"{part} stores {size} numbers for {place!r}, which has {wanted[place].numel()}; {remedy}")
