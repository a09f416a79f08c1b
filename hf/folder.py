"""A Hugging Face folder, read without its weights: `config.json` and the headers of its safetensors.

Files are foreign: whatever is wrong with one is a sentence that begins with `part`, whose folder it is ("student").
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Any

from opd.errors import ConfigurationError, DataError

HEADS = ("lm_head.weight", "embed_out.weight")
TIED = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a tokenizer and its chat template may consist of; an export takes along those that are there."""
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a folder, as in `Stored(file=Path("m/model.safetensors"), dtype="BF16", shape=(64, 96))`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file; of a dtype that is not known here one for each element."""
        return self.size * _BITS.get(self.dtype, 8) // 8


def is_pointer(first: bytes) -> bool:
    """Whether a file that begins so is a pointer of Git LFS, which stands for one that was not fetched."""
    return first.startswith(b"version https://git-lfs.github.com/")


FETCH = "it is a pointer of Git LFS, and the file itself was not fetched: `git lfs pull` does that"


def read_json(file: Path, part: str) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        DataError: it is no UTF-8, no JSON, nested too deep, or no mapping.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number without end
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        reason = FETCH if file.is_file() and is_pointer(file.read_bytes()[:60]) else reason
        raise DataError(f"{part} has a damaged {file.name} in {str(file.parent)!r} ({reason}); copy it anew") from error
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(
            f"{part} has a damaged {file.name} in {str(file.parent)!r} (it holds {kind} instead of a mapping); copy it "
            "anew"
        )
    return value


def read_config(path: str, part: str) -> dict[str, Any]:
    """`config.json` of the folder `path`.

    Raises:
        ConfigurationError: `path` is no folder.
        DataError: it holds no readable `config.json`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigurationError(_no_folder(path, part))
    adapter, weights = (folder / ADAPTER).is_file(), any((folder / name).exists() for name in (SINGLE, INDEX))
    if adapter and weights and has_config(folder):
        raise DataError(
            f"{part} in {path!r} has an adapter ({ADAPTER}) beside whole weights, and programs differ in which of them "
            "they read; move the adapter elsewhere, or merge it into the weights"
        )
    if has_config(folder) and not adapter:
        return read_json(folder / CONFIG, part)
    if adapter:
        base = read_json(folder / ADAPTER, part).get("base_model_name_or_path")
        raise DataError(
            f"{part} needs whole weights, but {path!r} is a LoRA adapter of {base!r}; merge them first with PEFT: "
            "PeftModel.from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(folder), copy the "
            "tokenizer there, and give that folder"
        )
    raise DataError(f"{part} needs a Hugging Face checkpoint, but {path!r} has no config.json; {instead(folder)}")


def instead(folder: Path) -> str:
    """Remedy for a folder without a model, by its files and those below it."""
    below = sorted({str(found.parent) for depth in _BELOW for found in folder.glob(f"{depth}{CONFIG}")})
    if below:
        return f"give the one that is meant: {', '.join(below[-3:])}"
    if (folder / "manifest.json").is_file() and folder.name.startswith("step_"):
        return f"what it has is a checkpoint of a run; make a model of it: opd export run={folder} output=FOLDER"
    if next(folder.glob("*.gguf"), None):
        return "what it has is GGUF, which is quantized and cannot be read; give the model that it was made from"
    if next(folder.glob("model_world_size_*.pt"), None):
        return "what it has are shards of FSDP; merge them into a model with the program that wrote them"
    if next(folder.glob("*.bin"), None):
        return "save the model with safe_serialization"
    return "correct the path"


_BELOW = ("*/", "*/*/", "*/*/*/")  # as in OUTPUT/checkpoint-500, global_step_100/actor/huggingface


def has_config(path: str | Path) -> bool:
    """Whether `path` is a folder of a model, judged by its `config.json` alone."""
    return (Path(path) / CONFIG).is_file()


def _no_folder(path: str, part: str) -> str:
    what = f"{part} needs a checkpoint folder, but {path!r} is"
    if path.endswith(".gguf"):
        return f"{what} a file of GGUF, which is quantized and cannot be read; give the model that it was made from"
    if Path(path).exists():
        return f"{what} a file; give the folder it lies in"
    return f"{what} none; correct the path, or give a name on the Hugging Face hub (ORG/NAME)"


def text_config(path: str, part: str) -> dict[str, Any]:
    """`config.json`, with the language model's own part of it laid over the rest."""
    config = read_config(path, part)
    text = config.get("text_config")
    return config | (text if isinstance(text, dict) else {})


def read_headers(path: str, part: str) -> Mapping[str, Stored]:
    """Headers of the folder's weights by name: of `model.safetensors`, or else of the shards its index names.

    Only headers are read, so a file may be larger than memory. No weights at all are an empty mapping.

    Raises:
        DataError: a file is missing, cut, or no safetensors, or the index contradicts it.
    """
    folder = Path(path)
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return _header(folder / SINGLE, part)
    if not (folder / INDEX).exists():
        strays = sorted(folder.glob("*.safetensors"))
        if strays and not (folder / ADAPTER).is_file():
            raise DataError(
                f"{part} needs {SINGLE} or {INDEX}, but {path!r} has only {strays[0].name} of that kind; save the "
                "model anew, or copy the index too"
            )
        return {}
    shards = read_json(folder / INDEX, part).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()) or not shards:
        raise DataError(f"{part} has a damaged {INDEX} in {path!r} (no weight_map of names to files); copy it anew")
    found: dict[str, Stored] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise DataError(f"{part} needs the file {shard!r} that {INDEX} names, but {path!r} has none; copy it anew")
        found |= _header(folder / shard, part)
    absent = sorted(shards.keys() - found.keys()) or sorted(found.keys() - shards.keys())
    if absent:
        raise DataError(
            f"{part} has an {INDEX} in {path!r} that disagrees with its files about {absent[0]!r}; copy the folder anew"
        )
    return found


def output_matrix(stored: Mapping[str, Stored]) -> str | None:
    """Name of the output matrix among a folder's tensors; of a tied one, which is not stored, the embedding's."""
    return next((name for end in (*HEADS, *TIED) for name in sorted(stored) if name.endswith(end)), None)


def input_matrix(stored: Mapping[str, Stored]) -> str | None:
    """Name of the input embeddings among a folder's tensors."""
    return next((name for end in TIED for name in sorted(stored) if name.endswith(end)), None)


def _header(file: Path, part: str) -> dict[str, Stored]:
    """The tensors of one safetensors file: 8 bytes (length), JSON, then the numbers without a gap."""

    def damaged(reason: str) -> DataError:
        return DataError(f"{part} has damaged weights in {str(file)!r} ({reason}); copy the file anew")

    if not file.is_file():
        raise damaged("it is no file" if file.exists() else "it is a link to nothing")
    try:
        with file.open("rb") as handle:
            first, total = handle.read(8), file.stat().st_size
            length = int.from_bytes(first, "little")
            if len(first) == 8 and length <= min(_LONGEST_HEADER, total - 8):
                text = handle.read(length)
            elif is_pointer(first + handle.read(60)):
                raise damaged(FETCH)
            elif first[:2] == b"PK" or first[:1] == b"\x80":
                raise damaged("it is a pickle and no safetensors, and is never opened")
            else:
                raise damaged("it is empty" if not total else "it has no header of safetensors, or is cut off")
        header = json.loads(text.decode("utf-8"))
        tensors = {
            name: (
                Stored(file=file, dtype=str(t["dtype"]), shape=tuple(map(index, t["shape"]))),
                tuple(t["data_offsets"]),
            )
            for name, t in header.items()
            if name != "__metadata__"
        }
        end = 0
        for name, (tensor, (start, stop)) in sorted(tensors.items(), key=lambda item: item[1][1]):
            bits = _BITS.get(tensor.dtype)
            right = bits is None or (stop - start) * 8 == tensor.size * bits
            if start != end or not right or min(tensor.shape, default=0) < 0:
                raise damaged(f"the header contradicts itself about {name!r}")
            end = stop
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"its header is unreadable: {type(error).__name__}") from error
    if 8 + length + end != total:
        raise damaged(f"it has {total} bytes where its header says {8 + length + end}")
    return {name: tensor for name, (tensor, _) in tensors.items()}
