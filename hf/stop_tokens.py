"""End-of-text token ids: those in each file of a checkpoint, and the union of all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf.folder import CONFIG, has_config, read_json
from opd.errors import ConfigurationError, DataError

GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """End ids of a checkpoint: `by_file` maps a file to the ids it names; files that name none are left out.

    Example: `Ends(by_file={"config.json": (2,), "generation_config.json": (2, 0)}).ids` is `(0, 2)`.
    """

    by_file: Mapping[str, tuple[int, ...]]

    @property
    def ids(self) -> tuple[int, ...]:
        """Every id that one of the files names."""
        return tuple(sorted({i for ids in self.by_file.values() for i in ids}))

    @property
    def disagree(self) -> bool:
        """Whether a file lacks an id that another names: the one that generation obeys, or any if it names none."""
        named = {frozenset(ids) for ids in self.by_file.values()}
        return len(named) > 1 and set(self.by_file.get(GENERATION, ())) != set(self.ids)


def read_ends(path: str, part: str = "student") -> Ends:
    """End ids in the files of `path`.

    Raises:
        ConfigurationError: the folder is no checkpoint.
        DataError: no file names an id, or one names what is no id of the model's vocabulary.
    """
    folder = Path(path)
    if not has_config(folder):
        raise ConfigurationError(
            f"{part}.path needs a Hugging Face checkpoint folder, but {path!r} has no config.json; correct it"
        )
    model = _read(folder / CONFIG, part)
    text = model.get("text_config") or {}
    rows = int((model | text)["vocab_size"])
    named = {
        CONFIG: [*_listed(model.get("eos_token_id")), *_listed(text.get("eos_token_id"))],
        GENERATION: _listed(_read(folder / GENERATION, part).get("eos_token_id")),
        _TOKENIZER: _of_tokenizer(folder, part),
    }
    for file, ids in named.items():
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < rows:
                raise DataError(
                    f"{folder / file} ends texts with token {i!r}, but the model has the ids 0 to {rows - 1}; correct "
                    "its eos_token_id"
                )
    if not any(named.values()):
        raise DataError(
            f"the {part} checkpoint {path!r} names no end-of-text token (eos_token_id in {GENERATION} or config.json, "
            f"eos_token in {_TOKENIZER}), so its completions could never end; add it"
        )
    return Ends(by_file={file: tuple(dict.fromkeys(ids)) for file, ids in named.items() if ids})


def _of_tokenizer(folder: Path, part: str) -> list[Any]:
    """The id of `eos_token`, from the lists of added tokens (short) or the vocabulary."""
    config, tokens = _read(folder / _TOKENIZER, part), _read(folder / "special_tokens_map.json", part)
    token = config.get("eos_token") or tokens.get("eos_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    if not token:
        return []
    for i, added in (config.get("added_tokens_decoder") or {}).items():
        if added.get("content") == token:
            return [int(i)]
    whole = _read(folder / "tokenizer.json", part)
    for added in whole.get("added_tokens") or ():
        if added.get("content") == token:
            return [added.get("id")]
    vocabulary = (whole.get("model") or {}).get("vocab") or _read(folder / "vocab.json", part)
    return _listed(vocabulary.get(token)) if isinstance(vocabulary, Mapping) else []


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def read_generation(path: str, part: str = "student") -> Mapping[str, Any]:
    """Contents of a checkpoint's generation_config.json, empty without one; refused as `read_ends` refuses it."""
    return _read(Path(path) / GENERATION, part)


def _read(file: Path, part: str) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    return read_json(file, part) if file.is_file() else {}
