"""Rows of prompt files, and their parsed parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Messages = tuple[Mapping[str, Any], ...]
"""A conversation as chat templates take it: role, content, and whatever else its template knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt as text: plain, or chat messages with the tools and the keywords that a chat template is given.

    `where` is the place that an error names. Example: `PromptText(text="1+1=", where="train.jsonl line 7")`.
    """

    text: str | Messages
    tools: Messages = ()
    keywords: Mapping[str, Any] = field(default_factory=dict, hash=False)
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a prompt file: a prompt is plain text or chat messages.

    What has no column is "" (`teacher_prompt`: the teacher's own prompt; `teacher`: the default), empty (`tools`) or 1
    (`weight`). `where` is the file and the line, for errors.
    """

    prompt: str | Messages
    answer: str
    teacher: str = ""
    teacher_prompt: str | Messages = ""
    weight: float = 1.0
    tools: Messages = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Columns of a prompt file for the parts of a `Row` ("" = absent), and how they are read.

    A dot leads into an object (`reward_model.ground_truth`). `drop_last_answer` cuts an assistant's turn off the end of
    a conversation. `map` is a function (`module:function`) that makes another record of each, `filter` a function or an
    expression that says which of these stay. `stream` leaves rows in their files. `place` is the part of the settings
    that an error names.
    """

    prompt: str
    answer: str = ""
    teacher: str = ""
    teacher_prompt: str = ""
    weight: str = ""
    tools: str = ""
    drop_last_answer: bool = False
    map: str = ""
    filter: str = ""
    stream: bool = False
    place: str = field(default="prompts", compare=False)
