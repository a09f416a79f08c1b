"""Templates around a prompt as token ids: contexts in which a teacher reads a trajectory."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Int32

from opd.errors import ConfigurationError
from opd.ports import Context
from opd.types import Prompt
from opd.types.prompt_rows import PromptText
from opd.types.prompt_templates import filled

Ids = Int32[np.ndarray, " Q"]


class NoRoomError(ConfigurationError):
    """A context that is too long without what may be shortened."""


def shortened(
    template: str, prompt: Prompt, values: Mapping[str, str], name: str, longest: int, context: Context
) -> Ids:
    """Ids of `template` around a prompt, with as much of the beginning of `values[name]` as leaves `longest` tokens.

    Raises `NoRoomError` where the rest is too long by itself.
    """
    whole = {"answer": prompt.answer, **values}
    text = whole[name]

    def ids(kept: int) -> Ids:
        return encoded(template, prompt, {**whole, name: text[:kept]}, context)

    if len(all_of_it := ids(len(text))) <= longest:
        return all_of_it
    if (least := len(ids(0))) > longest:
        raise NoRoomError(
            f"the context of prompt {prompt.id!r} for its teacher has {least} tokens without its {name}, but at most "
            f"{longest} are allowed; raise method.rollout.shown.longest"
        )
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if len(ids(middle)) <= longest else (fits, middle)
    return ids(fits)


def encoded(template: str, prompt: Prompt, values: Mapping[str, str], context: Context) -> Ids:
    """Ids of `template` around a prompt, as the student's tokenizer reads them; conversations keep their turns.

    `{prompt}` is what the student reads. A prompt whose text is not known is decoded.
    """
    source = prompt.source or PromptText(text=context.tokenizer.decode(prompt.student_ids), where=prompt.id)
    try:
        text = filled(template, source.text, values)
    except ValueError as error:
        raise ConfigurationError(
            f"prompt {prompt.id!r} cannot be shown to its teacher in a template: {error}; choose prompts "
            "that end with text"
        ) from error
    (ids,) = context.tokenizer.encode_all([replace(source, text=text)])
    return np.asarray(ids, dtype=np.int32)
