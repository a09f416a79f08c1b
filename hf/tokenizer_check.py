"""Comparison of the tokenizers of two checkpoints, and validity of a checkpoint folder, before anything starts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoTokenizer

from hf.folder import FETCH, instead, is_pointer, read_config, read_headers, read_json, text_config
from opd.errors import DataError

SPECIAL = ("bos", "eos", "pad", "unk")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TOKENIZER_ENDINGS = (".json", ".model", ".txt", ".jinja")
_OF_THE_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerIdentity:
    """Identity of a tokenizer: everything that must agree between student and teacher.

    `digest` covers all tokens with their ids, added ones too; `size` counts them; `rows` is what the model's
    output has (often padded, so it may differ between sizes of one family); `special` maps roles to ids.
    Example: `TokenizerIdentity(path="teacher", digest="3f..", size=192, rows=192, special={"bos": 1, "eos":
    2, "pad": 0, "unk": 183}, template="")`.
    """

    path: str
    digest: str
    size: int
    rows: int
    special: Mapping[str, int | None]
    template: str
    tokens: Mapping[str, int] = field(repr=False)


def tokenizer_identity(path: str) -> TokenizerIdentity:
    """Tokenizer identity of the checkpoint in `path`. Raises `DataError` if there is none."""
    part = f"the tokenizer in {path!r}"
    rows = text_config(path, part).get("vocab_size", 0)
    if not isinstance(rows, int) or rows < 0:
        raise DataError(f"{part} belongs to a config.json with vocab_size={rows!r}, which is no number; copy it anew")
    tokenizer = load_tokenizer(path)
    tokens, digest = _vocabulary(_key(path))
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return TokenizerIdentity(
        path=path,
        digest=digest,
        size=len(tokens),
        rows=rows,
        special={role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL},
        template=_digest(text) if text else "",
        tokens=tokens,
    )


def load_tokenizer(path: str) -> Any:
    """The tokenizer in `path`; one object for all folders with the same files. Raises `DataError` if there is none."""
    if not any((Path(path) / name).is_file() for name in _VOCABULARIES):
        # transformers would make an empty tokenizer of the model's kind and say nothing
        raise DataError(
            f"the checkpoint {path!r} needs a tokenizer, but has none of {', '.join(_VOCABULARIES)}; copy its files"
        )
    return _loaded(_key(path))


def tokenizer_digest(path: str) -> str:
    """xxh3-128 (hex) over the files that define the tokenizer in `path`, its chat template too."""
    return _key(path).digest


@dataclass(frozen=True, slots=True)
class _Key:
    """Cache key: a tokenizer by the content of its files, whatever their folder."""

    digest: str
    path: str = field(compare=False)


def _key(path: str) -> _Key:
    hasher = xxhash.xxh3_128()
    for file in sorted(Path(path).iterdir()):
        if file.is_file() and (file.suffix in _TOKENIZER_ENDINGS and file.name not in _OF_THE_MODEL):
            content = file.read_bytes()
            hasher.update(f"{file.name}:{len(content)};".encode())
            hasher.update(content)
    hasher.update(str(read_config(path, f"the tokenizer in {path!r}").get("model_type")).encode())
    return _Key(hasher.hexdigest(), path)


@lru_cache(maxsize=8)  # reading a vocabulary of 150,000 tokens takes seconds
def _loaded(key: _Key) -> Any:
    part = f"the tokenizer in {key.path!r}"
    for file in sorted(Path(key.path).glob("*token*_*.json")):
        read_json(file, part)
    for file in sorted(Path(key.path).glob("*token*")):
        if file.is_file() and is_pointer(file.open("rb").read(60)):
            raise DataError(f"{part} lacks its {file.name}: {FETCH}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(key.path, local_files_only=True, trust_remote_code=False)
        tokenizer.get_vocab()
    except Exception as error:  # foreign files, read by two libraries: any type of error may come out
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{part} does not load ({reason}); copy its files anew") from error
    return tokenizer


@lru_cache(maxsize=8)
def _vocabulary(key: _Key) -> tuple[Mapping[str, int], str]:
    tokens: dict[str, int] = _loaded(key).get_vocab()
    return tokens, _digest(json.dumps(sorted(tokens.items(), key=lambda item: (item[1], item[0]))))


def check_same_tokens(student: TokenizerIdentity, teacher: TokenizerIdentity) -> None:
    """Raise `DataError` that names the first difference. Padding of the output (`rows`) is ignored, and of chat
    templates only the student's is used (see `launch.plan.checks.prompts`).
    """
    subject = f"student {student.path!r} and teacher {teacher.path!r} need the same tokenizer, but"
    remedy = "; choose a teacher of the student's family"
    if student.digest != teacher.digest:
        raise DataError(f"{subject} {_first_difference(student.tokens, teacher.tokens)}{remedy}")
    for role in SPECIAL:
        ours, theirs = student.special[role], teacher.special[role]
        if ours != theirs:
            raise DataError(
                f"{subject} the {role} token is {ours} for the student and {theirs} for the teacher{remedy}, or "
                "copy one tokenizer_config.json to the other"
            )


def check_checkpoint(path: str, part: str) -> None:
    """Raise a sentence unless `path` is a folder with safetensors and a model without code of its own.

    `part` is whose path it is, e.g. `"teacher"`. No folder: `ConfigurationError`, otherwise `DataError`.
    """
    config = read_config(path, part)
    if "auto_map" in config:
        raise DataError(
            f"{part} in {path!r} brings its own Python code (auto_map in config.json), which is never run; "
            "choose a model that transformers supports itself"
        )
    if "model_type" not in config:
        raise DataError(f"{part} in {path!r} has a config.json without model_type; it is no language model")
    if not read_headers(path, part):
        raise DataError(f"{part} needs safetensors, but {path!r} has none; {instead(Path(path))}")


def _first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    by_id = [{i: token for token, i in tokens.items()} for tokens in (ours, theirs)]
    for i in sorted(by_id[0].keys() | by_id[1].keys()):
        mine, other = by_id[0].get(i), by_id[1].get(i)
        if mine != other:
            return f"id {i} is {mine!r} for the student and {other!r} for the teacher"
    return "one token has two ids"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
