"""The Hugging Face tokenizer behind `opd.ports.Tokenizer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from opd.errors import ConfigurationError, DataError


class HuggingFaceTokenizer:
    """Text to ids with the template the checkpoint brings along."""

    def __init__(self, path: str) -> None:
        if not Path(path).is_dir():
            raise ConfigurationError(f"student.path {path!r} is no folder; give a Hugging Face checkpoint folder")
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"the tokenizer in {path!r} has no end-of-text token; completions could never end")
        self.eos_id = int(self._tokenizer.eos_token_id)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a plain prompt, with the special tokens the tokenizer itself adds, int32 `[P]`."""
        return np.asarray(self._tokenizer(text)["input_ids"], dtype=np.int32)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """Ids of a conversation up to where the assistant writes, int32 `[P]`."""
        if not self._tokenizer.chat_template:
            raise DataError(
                "the prompts are chat messages, but the student's tokenizer has no chat template; use plain text "
                "prompts or a checkpoint with a template"
            )
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
