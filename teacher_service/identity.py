"""Does a teacher speak its student's language? Checkpoints and tokenizers, compared before anything starts."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from opd.errors import ConfigurationError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerIdentity:
    """What two models must share so that token ids and prompts mean the same."""

    path: str
    vocabulary: dict[str, int]
    special_ids: dict[str, int]
    template: str | None

    @property
    def digest(self) -> str:
        """One value for all of it."""
        content = [sorted(self.vocabulary.items()), sorted(self.special_ids.items()), self.template]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_checkpoint(path: str, part: str) -> None:
    """Raise one sentence unless `path` is a folder with a model in safetensors that needs no code of its own."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigurationError(f"{part}: {path!r} is no folder; give a Hugging Face checkpoint folder")
    if not (folder / "config.json").is_file():
        raise DataError(f"{part}: {path} has no config.json, so it is no Hugging Face checkpoint; check the path")
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{part}: {path}/config.json is no JSON ({error.msg}); restore the file") from error
    if "auto_map" in config:
        raise DataError(f"{part}: {path} wants to run code of its own (auto_map), which is never done; convert it")
    if not any(folder.glob("*.safetensors")):
        raise DataError(f"{part}: {path} has no *.safetensors; convert the checkpoint to safetensors")


def tokenizer_identity(path: str) -> TokenizerIdentity:
    """Read a folder's tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} has no tokenizer that loads ({str(error).splitlines()[0]}); restore its files"
        ) from error
    special = {
        name: int(getattr(tokenizer, f"{name}_id"))
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if getattr(tokenizer, f"{name}_id") is not None
    }
    return TokenizerIdentity(
        path=path, vocabulary=dict(tokenizer.get_vocab()), special_ids=special, template=tokenizer.chat_template
    )


def compare(student: TokenizerIdentity, teacher: TokenizerIdentity) -> None:
    """Raise `DataError` with the first difference, if there is one."""
    if student.digest == teacher.digest:
        return
    where = f"student {student.path} and teacher {teacher.path} must share a tokenizer, but"
    fix = "use a teacher of the student's family"
    for token in sorted(student.vocabulary.keys() | teacher.vocabulary.keys()):
        mine, theirs = student.vocabulary.get(token), teacher.vocabulary.get(token)
        if mine != theirs:
            raise DataError(f"{where} token {token!r} is id {mine} for the student and {theirs} for the teacher; {fix}")
    for name in sorted(student.special_ids.keys() | teacher.special_ids.keys()):
        mine, theirs = student.special_ids.get(name), teacher.special_ids.get(name)
        if mine != theirs:
            raise DataError(f"{where} {name} is id {mine} for the student and {theirs} for the teacher; {fix}")
    raise DataError(f"{where} their chat templates differ; give both the student's template")
