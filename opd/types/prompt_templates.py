"""Prompts with more text in them: a template around a prompt, or around the last message of a conversation."""

import re
from collections.abc import Mapping

from opd.types.prompt_rows import Messages


def filled(template: str, prompt: str | Messages, values: Mapping[str, str]) -> str | Messages:
    """`template` with `{prompt}` and every `{name}` of `values` replaced; other braces stay.

    Of a conversation `{prompt}` is what its last message says, and the rest of it stays as it is. What is put in is
    never searched for names again. Raises `ValueError` for a conversation whose last message is no text.
    """
    if isinstance(prompt, str):
        return _filled(template, {**values, "prompt": prompt})
    last = prompt[-1]["content"] if prompt else None
    if not isinstance(last, str):
        raise ValueError("the last message is no text")
    return (*prompt[:-1], {**prompt[-1], "content": _filled(template, {**values, "prompt": last})})


def _filled(template: str, values: Mapping[str, str]) -> str:
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)
