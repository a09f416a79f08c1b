"""Conversations around the prompts of a file: what is put before them, and how a chat template writes them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from opd.errors import DataError
from opd.ports import Sources
from opd.settings.ranges import Line, Template
from opd.settings.validation import settings
from opd.types.prompt_rows import Columns, Messages, PromptText, Row

_FIRST = ("system", "developer")  # roles that stand before a conversation


class ChatTemplate(Enum):
    """Chat template that writes the messages which a teacher reads."""

    STUDENT = "STUDENT"
    OWN = "OWN"


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Conversations:
    """Conversations that a source makes of its prompts.

    `chat` makes a plain prompt a user's message. `system` stands before every conversation, and a record that begins
    with a system message of its own is an error. `template_kwargs` are keywords of the chat template
    (`enable_thinking`). `few_shot` is a file of solved examples, which stand as turns before the question. The teacher
    reads the same, unless `teacher_system` says another system prompt ("" = none), `teacher_few_shot` other examples
    ("" = none), `teacher_template_kwargs` other values of keywords (those it does not name are the student's), or
    `teacher_chat_template` that its own template writes what it reads.
    """

    # ask a plain prompt as a user's message, through the chat template
    chat: bool = False
    # text behind every plain prompt, e.g. a newline
    suffix: str = ""
    # system prompt before every conversation
    system: Template = ""
    # keywords of the chat template, e.g. prompts.template_kwargs.enable_thinking=false
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # file of solved examples that stand as turns before the question
    few_shot: Line = ""
    # system prompt that the teacher reads instead; null: the same
    teacher_system: Template | None = None
    # file of examples that the teacher is shown instead; null: the same
    teacher_few_shot: Line | None = None
    # keywords of the chat template whose values are others for the teacher
    teacher_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # STUDENT: what teachers read is written by the student's chat template; OWN: by their own
    teacher_chat_template: ChatTemplate = ChatTemplate.STUDENT

    @property
    def teacher_keywords(self) -> Mapping[str, Any]:
        """Keywords of the chat template for what the teacher reads."""
        return {**self.template_kwargs, **self.teacher_template_kwargs}

    @property
    def system_of_teacher(self) -> str:
        """System prompt that the teacher reads."""
        return self.system if self.teacher_system is None else self.teacher_system

    @property
    def examples_of_teacher(self) -> str:
        """Few-shot file of what the teacher reads."""
        return self.few_shot if self.teacher_few_shot is None else self.teacher_few_shot

    @property
    def teacher_asked_otherwise(self) -> bool:
        """Whether a teacher may read other tokens than the student, whatever the records say."""
        return (
            self.system_of_teacher != self.system
            or self.examples_of_teacher != self.few_shot
            or self.teacher_keywords != self.template_kwargs
            or self.teacher_chat_template is ChatTemplate.OWN
        )

    def for_student(self, text: str | Messages, row: Row, where: str, sources: Sources) -> PromptText:
        """A prompt as the student is to read it."""
        asked = self._asked(text, self.system, self.few_shot, where, sources)
        keywords = {} if isinstance(asked, str) else self.template_kwargs
        return PromptText(text=asked, tools=row.tools, keywords=keywords, where=where)

    def for_teacher(self, text: str | Messages, row: Row, where: str, sources: Sources) -> PromptText:
        """A prompt as the teacher is to read it."""
        asked = self._asked(text, self.system_of_teacher, self.examples_of_teacher, where, sources)
        keywords = {} if isinstance(asked, str) else self.teacher_keywords
        return PromptText(text=asked, tools=row.tools, keywords=keywords, where=where)

    def few_shot_files(self, place: str) -> Mapping[str, str]:
        """Paths of the few-shot files, by the setting that names each."""
        named = {"few_shot": self.few_shot, "teacher_few_shot": self.teacher_few_shot}
        return {f"{place}.{name}": path for name, path in named.items() if path}

    def _asked(self, text: str | Messages, system: str, few_shot: str, where: str, sources: Sources) -> str | Messages:
        """The whole conversation; plain text where nothing makes it one."""
        if isinstance(text, str) and not self.chat:
            self._refuse_plain(where, sources.place)
            return text
        messages = ({"role": "user", "content": text},) if isinstance(text, str) else text
        own = messages[0]["role"] in _FIRST
        if system and own:
            raise DataError(
                f"{where} begins with a {messages[0]['role']} message, and {sources.place}.system would put another "
                "before it; clear that setting or remove the message"
            )
        head = ({"role": "system", "content": system},) if system else messages[:own]
        examples = sources.examples(few_shot, self.columns_of_examples(sources.place), self.suffix) if few_shot else ()
        return (*head, *examples, *messages[own:])

    def columns_of_examples(self, place: str) -> Columns:
        """Columns of a few-shot file whose records are prompts with answers."""
        return Columns(prompt="prompt", answer="answer", place=place)

    def _refuse_plain(self, where: str, place: str) -> None:
        """Refuse a plain prompt where a setting waits for a conversation."""
        given = {
            "system": self.system,
            "template_kwargs": self.template_kwargs,
            "few_shot": self.few_shot,
            "teacher_system": self.teacher_system,
            "teacher_few_shot": self.teacher_few_shot,
            "teacher_template_kwargs": self.teacher_template_kwargs,
            "teacher_chat_template": self.teacher_chat_template is ChatTemplate.OWN,
        }
        if found := [name for name, value in given.items() if value]:
            raise DataError(
                f"{where} is plain text, which no chat template writes, so {place}.{found[0]} has nothing to act on; "
                f"set {place}.chat=true to ask it as a user's message, or clear {place}.{found[0]}"
            )


def conversations_of(place: str, source: object) -> Iterator[tuple[str, Conversations]]:
    """The source, or those of a mixture, that make conversations, each with the place of its settings."""
    inner = getattr(source, "sources", None)
    if isinstance(source, Conversations):
        yield place, source
    elif isinstance(inner, Mapping):
        for name, one in inner.items():
            yield from conversations_of(f"{place}.sources.{name}", one)
