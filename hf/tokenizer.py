"""The Hugging Face tokenizer behind `opd.ports.Tokenizer`."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from hf.chat_template import opening, rendered, why_no_system
from hf.template_keywords import keywords
from hf.tokenizer_check import load_tokenizer
from opd.errors import ConfigurationError, DataError
from opd.types.prompt_rows import PromptText


class HuggingFaceTokenizer:
    """Tokenizer with the chat template of its checkpoint."""

    def __init__(self, path: str, part: str = "student") -> None:
        """Read the tokenizer in `path`; `part` is whose it is, in error messages."""
        if not Path(path).is_dir():
            raise ConfigurationError(f"{part}.path {path!r} is no folder; give a Hugging Face checkpoint folder")
        self._tokenizer: Any = load_tokenizer(path)
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"the tokenizer in {path!r} has no end-of-text token; completions could never end")
        self.path, self.part = path, part
        self.eos_id = int(self._tokenizer.eos_token_id)
        self._ends_prompts = self._tokenizer("a")["input_ids"][-1:] == [self.eos_id]
        self.unknown_id: int | None = self._tokenizer.unk_token_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceTokenizer) and other._tokenizer is self._tokenizer

    def __hash__(self) -> int:
        return id(self._tokenizer)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a plain prompt, with the special tokens the tokenizer itself adds, int32 `[P]`."""
        return np.asarray(self._single_start(self._tokenizer(text)["input_ids"]), dtype=np.int32)

    def encode_all(self, prompts: Sequence[PromptText]) -> list[np.ndarray]:
        """Ids of each prompt, int32 `[P]`; a template's text is encoded as it is."""
        plain = [i for i, prompt in enumerate(prompts) if isinstance(prompt.text, str)]
        chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt.text, str)]
        encoded = self._batch([str(prompts[i].text) for i in plain], special=True)
        encoded += self._batch([self._chat(prompts[i]) for i in chats], special=False)
        made = dict(zip([*plain, *chats], encoded, strict=True))
        if plain and self._ends_prompts:
            raise DataError(
                f"the tokenizer in {self.path!r} puts its end-of-text token behind every prompt, so that nothing "
                "would follow; set add_eos_token to false in its tokenizer_config.json"
            )
        for i in plain:
            made[i] = self._single_start(made[i])
        return [np.asarray(made[i], dtype=np.int32) for i in range(len(prompts))]

    def decode(self, ids: np.ndarray) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def visible(self, ids: np.ndarray) -> str:
        """Text with special tokens, on one line."""
        text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    def special_texts(self) -> "re.Pattern[str] | None":
        """Pattern of the special tokens that would be recognized in a text; None without any."""
        tokens = sorted(map(str, self._tokenizer.all_special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None

    @property
    def dated(self) -> bool:
        """Whether the chat template writes today's date, which changes every prompt tomorrow."""
        return "strftime_now" in str(self._tokenizer.chat_template or "")

    def _batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []

    def _single_start(self, ids: list[int]) -> list[int]:
        """Ids without the first of two `<bos>`: a prompt that begins with one gets no second."""
        bos = self._tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _chat(self, prompt: PromptText) -> str:
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{prompt.where}: the prompts are chat messages, but the {self.part}'s tokenizer has no chat template; "
                "use plain text prompts or a checkpoint with a template"
            )
        assert not isinstance(prompt.text, str)
        return rendered(partial(self._render, prompt.keywords), prompt.text, prompt.tools, prompt.where)

    def _render(
        self,
        given: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        prompt: bool = True,
    ) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, add_generation_prompt=prompt, tokenize=False, **given
        )

    @property
    def converses(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.chat_template)

    def template_keywords(self) -> frozenset[str]:
        """Keywords that the chat template reads. Raises `DataError` if it is no template."""
        template = self._tokenizer.chat_template
        texts = template.values() if isinstance(template, Mapping) else [template] if template else []
        try:
            found = frozenset[str]().union(*map(keywords, texts))
        except TemplateError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"the chat template of {self.part} {self.path!r} is no template ({reason}); copy it anew"
            ) from error
        return found - self._tokenizer.special_tokens_map.keys()

    def why_no_system(self, given: Mapping[str, Any]) -> str:
        """Reason why the chat template cannot take a system message; "" if it can."""
        return why_no_system(partial(self._render, given))

    def opening(self) -> str:
        """Text that the chat template writes before an answer and leaves out where a prompt ends; "" for none."""
        return opening(partial(self._render, {}, prompt=False), partial(self._render, {})) if self.converses else ""

    def token(self, i: int) -> str:
        """The token with this id, as the vocabulary spells it."""
        return str(self._tokenizer.convert_ids_to_tokens(i))

    def turn_end(self) -> int | None:
        """The special token that the chat template puts behind an assistant's message; None if there is none."""
        if not self._tokenizer.chat_template:
            return None
        reply = "ok"
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, ValueError):  # a template that wants other messages: nothing is known
            return None
        after = self._tokenizer(text.rpartition(reply)[2].lstrip(), add_special_tokens=False)["input_ids"]
        return int(after[0]) if after and after[0] in self._special() else None

    def _special(self) -> set[int]:
        added = self._tokenizer.added_tokens_decoder
        return {*self._tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
