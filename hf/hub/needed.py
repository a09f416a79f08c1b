"""Files of a model repository that are needed: configuration, tokenizer, safetensors, no pickles and no code. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from hf.folder import CONFIG, INDEX, SINGLE, TOKENIZER_FILES
from opd.errors import DataError

_SMALL = (
    CONFIG,
    "generation_config.json",
    *TOKENIZER_FILES,
    "adapter_config.json",  # so that an adapter is recognized as one
    INDEX,
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def small_files(files: Iterable[str]) -> list[str]:
    """Configuration and tokenizer, and the index of the weights."""
    present = set(files)
    return [name for name in _SMALL if name in present and (name != INDEX or SINGLE not in present)]


def weight_files(files: Iterable[str], index: Mapping[str, object] | None, part: str) -> list[str]:
    """The safetensors of a model: the single file, or the shards that its `index` names.

    `part` begins the sentence, e.g. "student.path 'ORG/NAME'".

    Raises:
        DataError: there are none, or a shard is missing.
    """
    present = set(files)
    if SINGLE in present:
        return [SINGLE]
    shards = index.get("weight_map") if index is not None else None
    if not isinstance(shards, Mapping) or not shards:
        raise DataError(f"{part} needs safetensors, but {_instead(sorted(present))}")
    named = sorted(str(shard) for shard in set(shards.values()))
    missing = next((shard for shard in named if shard not in present or "/" in shard), None)
    if missing is not None:
        raise DataError(f"{part} has an {INDEX} that names {missing!r}, which is not there; name another revision")
    return named


def _instead(present: Sequence[str]) -> str:
    if "adapter_config.json" in present:
        return (
            "the repository is a LoRA adapter; merge it into its base model with PEFT (merge_and_unload, "
            "save_pretrained) and give that folder"
        )
    pickles = [name for name in present if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"the repository has only {pickles[0]!r}, of a kind that is never opened; choose another model or "
            "revision, or save it anew with safe_serialization"
        )
    return "the repository has none; choose another model or revision"
