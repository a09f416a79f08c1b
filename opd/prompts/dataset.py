"""Prompts from files of the user's own."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np

from opd.errors import ConfigurationError, DataError
from opd.ports import References, Sources, Tokenizer
from opd.prompts.conversations import ChatTemplate, Conversations
from opd.prompts.order import draw
from opd.settings.ranges import Fraction, GroupSize, In, Line, Names, PromptsPerStep, Seed, Template, Tokens
from opd.settings.validation import settings
from opd.types import Prompt
from opd.types.prompt_rows import Columns, Messages, PromptText, Row
from opd.types.prompt_templates import filled

AT_ONCE = 1024  # rows that are encoded together


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class DatasetPrompts(Conversations):
    """Rows of `path`, `prompts_per_step` a step, each `group_size` times, in a new order every epoch.

    `prompt_column` holds plain text or chat messages; `answer_column` ("" = none) holds what the grader `task`
    compares with, and a larger share than `max_unreadable_answers` that it cannot read is an error. `tools_column`
    holds descriptions of tools for the chat template, and `drop_last_answer` cuts the assistant's turn off a
    conversation that ends with one (otherwise an error). `teacher_column` names each row's teacher ("" = `teacher` for
    all), `teacher_prompt_column` holds what a privileged teacher is shown instead of the prompt (e.g. with the solution
    in it). With `teacher_template` that prompt is written instead: `{prompt}` is the student's (of messages what the
    last one says), `{answer}` the reference answer, `{context}` the text in `teacher_prompt_column`. `weight_column`
    holds how much a row counts (with the weight part `PromptWeight`). `map` makes another record of each, and `filter`
    says which of these stay; the plan counts them. With `stream` rows stay in their files, and a plan reads all of
    them, but tokenizes the first 1,024 alone. A dot in a column's name leads into an object.
    `suffix` is added to plain prompts (e.g. a newline). How prompts are asked is said by `Conversations`. A prompt
    longer than `max_tokens` tokens is an error that names the row, unless `skip_long` leaves such rows out.
    """

    # file of prompts: JSON lines, JSON, CSV, parquet (also compressed), a folder, or a saved dataset
    path: Names
    # prompts of a step, each group_size times
    prompts_per_step: PromptsPerStep
    # column of the prompt: text, or a list of chat messages
    prompt_column: Names = "prompt"
    # column of the reference answer; empty: nothing is graded
    answer_column: Line = ""
    # column that names each row's teacher; empty: the same for all
    teacher_column: Line = ""
    # column that a privileged teacher is shown instead of the prompt
    teacher_prompt_column: Line = ""
    # what a privileged teacher reads: a text with {prompt}, {answer}, {context} (teacher_prompt_column) in it
    teacher_template: Template = ""
    # column of how much a row counts (with the part PromptWeight)
    weight_column: Line = ""
    # column of tool descriptions for the chat template
    tools_column: Line = ""
    drop_last_answer: bool = False
    # function module:function that makes another record of each
    map: Line = ""
    # records that stay: an expression such as 'len(prompt) < 2000', or module:function
    filter: Line = ""
    # leave rows in their files (JSON lines), which may be larger than memory
    stream: bool = False
    # grader or environment of the prompts: math, or a name of your own (docs/grading.md)
    task: Names = "math"
    # of the order in which rows come
    seed: Seed = 0
    # completions of each prompt in a step
    group_size: GroupSize = 1
    # rows that are used; 0 is all of them
    limit: Annotated[int, In(0, 1_000_000_000, because="0: all rows")] = 0
    # a new order in every epoch
    shuffle: bool = True
    # longest prompt; a longer one is refused, or left out with skip_long
    max_tokens: Tokens = 1024
    # leave prompts out that are too long
    skip_long: bool = False
    # teacher of rows that name none
    teacher: Names = "default"
    max_unreadable_answers: Fraction = 0.01
    folder: str = field(default="", repr=False)  # where the files are, if `path` names a data set on a hub

    def __post_init__(self) -> None:
        if self.stream and self.teacher_column:
            raise ConfigurationError(
                "prompts.stream=true leaves rows in their files, so that a teacher whom one of them names is found too "
                "late; clear prompts.teacher_column and mix one source per teacher (MixedPrompts)"
            )
        for name, column in (
            ("prompt", "prompt_column"),
            ("answer", "answer_column"),
            ("context", "teacher_prompt_column"),
        ):
            named = f"{{{name}}}" in self.teacher_template
            if self.teacher_template and (not named if name == "prompt" else named and not getattr(self, column)):
                raise ConfigurationError(
                    f"prompts.teacher_template needs {{prompt}} in it, and a column for whatever else it names, but "
                    f"{{{name}}} is missing or has none; add it, or set prompts.{column}"
                )

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        prompts = self.between(step * self.prompts_per_step, self.prompts_per_step, sources)
        if not prompts:
            raise DataError(
                f"prompts {self.path}: every prompt of step {step} is longer than {sources.place}.max_tokens="
                f"{self.max_tokens}; raise it"
            )
        return prompts

    def between(self, start: int, count: int, sources: Sources) -> Sequence[Prompt]:
        """See `opd.ports.Windowed`."""
        rows = self._rows(sources)
        numbers = self._numbers(start, count, len(rows))
        different = list(dict.fromkeys(numbers))
        made = dict(zip(different, self._prompts(different, rows, sources), strict=True))
        return [p for n in numbers if (p := made[n]) is not None for _ in range(self.group_size)]

    def rows(self, sources: Sources) -> int:
        """See `opd.ports.Listed`."""
        return 0 if self.stream else self._size(len(self._rows(sources)))

    def every(self, sources: Sources, step: int | None) -> Iterator[tuple[Row, Prompt]]:
        """All rows that may come (see `opd.ports.Listed`)."""
        if step is not None:
            yield from self.every_between(step * self.prompts_per_step, self.prompts_per_step, sources)
        else:
            yield from self._listed(range(self._shown(len(self._rows(sources)))), sources)

    def every_between(self, start: int, count: int, sources: Sources) -> Iterator[tuple[Row, Prompt]]:
        """See `opd.ports.Windowed`."""
        numbers = self._numbers(start, count, len(self._rows(sources)))
        yield from self._listed(list(dict.fromkeys(numbers)), sources)

    def ids_between(self, start: int, count: int, sources: Sources) -> Collection[str]:
        """See `opd.ports.Windowed`."""
        return [self._name(number) for number in self._numbers(start, count, len(self._rows(sources)))]

    def starved(self, kept: Collection[str], steps: int, sources: Sources) -> int | None:
        """See `opd.ports.Listed`."""
        n = self.prompts_per_step
        for step in range(steps):
            if not any(name in kept for name in self.ids_between(step * n, n, sources)):
                return step
        return None

    def _listed(self, numbers: Sequence[int], sources: Sources) -> Iterator[tuple[Row, Prompt]]:
        rows = self._rows(sources)
        for first in range(0, len(numbers), AT_ONCE):
            some = numbers[first : first + AT_ONCE]
            for number, prompt in zip(some, self._prompts(some, rows, sources), strict=True):
                if prompt is not None:
                    yield rows[number], prompt

    def files(self, place: str) -> Mapping[str, str]:
        """See `opd.ports.Listed`."""
        return {f"{place}.path": self.folder or self.path, **self.few_shot_files(place)}

    def columns_of_examples(self, place: str) -> Columns:
        """See `Conversations`: few-shot records have the columns of the prompts."""
        return Columns(prompt=self.prompt_column, answer=self.answer_column or "answer", place=place)

    def found_at(self, place: str, folders: Mapping[str, tuple[str, str]]) -> "DatasetPrompts":
        """See `opd.ports.Elsewhere`. Prompts keep the name of the data set, wherever its files are."""
        path, folder = folders.get(f"{place}.path", (self.path, self.folder))
        return replace(self, path=path, folder=folder)

    def routes(self, sources: Sources) -> frozenset[str]:
        """All teachers that a row names (see `opd.ports.Routed`)."""
        if not self.teacher_column:
            return frozenset([self.teacher])
        return frozenset(row.teacher for row in self._rows(sources))

    def references(self, sources: Sources) -> Sequence[References]:
        """The answers of all rows that can come (see `opd.ports.Answered`)."""
        if not self.answer_column:
            return []
        rows = self._rows(sources)
        answers = [
            (row.where or f"{self.path} row {number}", row.answer)
            for number, row in enumerate(rows[: self._shown(len(rows))], start=1)
        ]
        allowed = self.max_unreadable_answers
        return [References(place=sources.place, task=self.task, answers=answers, allowed=allowed)]

    def _rows(self, sources: Sources) -> Sequence[Row]:
        return sources.rows(self.folder or self.path, self.columns(sources.place))

    def columns(self, place: str) -> Columns:
        """Columns that rows are read from; `place` is the part of the settings that an error names."""
        return Columns(
            prompt=self.prompt_column,
            answer=self.answer_column,
            teacher=self.teacher_column,
            teacher_prompt=self.teacher_prompt_column,
            weight=self.weight_column,
            tools=self.tools_column,
            drop_last_answer=self.drop_last_answer,
            map=self.map,
            filter=self.filter,
            stream=self.stream,
            place=place,
        )

    def _size(self, rows: int) -> int:
        return min(self.limit or rows, rows)

    def _shown(self, rows: int) -> int:
        """Number of rows that a plan looks at: all, or so many that stand for them."""
        return min(self._size(rows), AT_ONCE) if self.stream else self._size(rows)

    def _numbers(self, start: int, count: int, rows: int) -> list[int]:
        return draw(self.seed, self._size(rows), start, count, self.shuffle) if count else []

    def _name(self, number: int) -> str:
        return f"{self.path}/{number}"

    def _prompts(self, numbers: Sequence[int], rows: Sequence[Row], sources: Sources) -> list[Prompt | None]:
        """Prompt of each row, or None where it is too long and may be left out."""
        written = [
            self.for_student(self._with_suffix(rows[n].prompt), rows[n], self._where(n, rows[n]), sources)
            for n in numbers
        ]
        mine = self._encode(written, sources.tokenizer)
        its = self._for_teachers(numbers, rows, sources)
        return [
            self._prompt(number, rows[number], text, ids, its.get(number, ids), sources.place)
            for number, text, ids in zip(numbers, written, mine, strict=True)
        ]

    def _for_teachers(self, numbers: Sequence[int], rows: Sequence[Row], sources: Sources) -> Mapping[int, np.ndarray]:
        """Ids of each row that its teacher reads otherwise than the student."""
        texts: dict[str, dict[int, PromptText]] = {}  # by the teacher whose template writes; "": the student's
        for n in numbers:
            row, where = rows[n], self._where(n, rows[n])
            if not (row.teacher_prompt or self.teacher_template or self.teacher_asked_otherwise):
                continue
            text = self._with_suffix(self._teacher_prompt(n, row))
            own = self.teacher_chat_template is ChatTemplate.OWN
            name = sources.teacher_of_task.get(self.task) or row.teacher or self.teacher
            texts.setdefault(name if own else "", {})[n] = self.for_teacher(text, row, where, sources)
        # A name that the run has no teacher for is refused where all names are known.
        return {
            n: ids
            for name, of in texts.items()
            for n, ids in zip(
                of, self._encode([*of.values()], sources.teachers.get(name, sources.tokenizer)), strict=True
            )
        }

    def _teacher_prompt(self, number: int, row: Row) -> str | Messages:
        """The row's own prompt for the teacher, the template's, or the student's."""
        if not self.teacher_template:
            return row.teacher_prompt or row.prompt
        values, where = {"answer": row.answer, "context": row.teacher_prompt}, self._where(number, row)
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        for name in values:
            if f"{{{name}}}" in self.teacher_template and not texts.get(name):
                raise DataError(
                    f"prompts {where} has no text for {{{name}}}, which prompts.teacher_template names; remove the "
                    "row or correct the template"
                )
        try:
            return filled(self.teacher_template, row.prompt, texts)
        except ValueError as error:
            raise DataError(
                f"prompts {where}: {error}, so prompts.teacher_template has no place; correct the row"
            ) from error

    def _where(self, number: int, row: Row) -> str:
        return row.where or f"{self.path}: row {number + 1}"

    def _with_suffix(self, text: str | Messages) -> str | Messages:
        return text + self.suffix if isinstance(text, str) else text

    def _encode(self, texts: Sequence[PromptText], tokenizer: Tokenizer) -> list[np.ndarray]:
        encoded = [np.asarray(ids, dtype=np.int32) for ids in tokenizer.encode_all(texts)]
        for one, ids in zip(texts, encoded, strict=True):
            if len(ids) == 0:
                raise DataError(f"prompts {one.where} has an empty prompt; remove the row")
        return encoded

    def _prompt(
        self, number: int, row: Row, source: PromptText, ids: np.ndarray, teacher_ids: np.ndarray, place: str
    ) -> Prompt | None:
        if len(ids) > self.max_tokens:
            if self.skip_long:
                return None
            raise DataError(
                f"prompts {self._where(number, row)} has {len(ids)} tokens, but {place}.max_tokens is "
                f"{self.max_tokens}; raise it or set {place}.skip_long=true"
            )
        return Prompt(
            id=self._name(number),
            student_ids=ids,
            teacher_ids=teacher_ids,
            teacher=row.teacher or self.teacher,
            task=self.task,
            answer=row.answer,
            weight=row.weight,
            source=source,
        )
