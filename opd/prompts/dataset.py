"""Prompts from files of the user's own."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np

from opd.errors import ConfigurationError, DataError
from opd.ports import References, Sources
from opd.prompts.order import draw
from opd.settings.ranges import Fraction, GroupSize, In, Line, Names, PromptsPerStep, Seed, Template, Tokens
from opd.settings.validation import settings
from opd.types import Prompt
from opd.types.prompt_rows import Columns, Messages, PromptText, Row
from opd.types.prompt_templates import filled

AT_ONCE = 1024  # rows that are encoded together


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class DatasetPrompts:
    """Rows of `path`, `prompts_per_step` a step, each `group_size` times, in a new order every epoch.

    `prompt_column` holds plain text or chat messages; `answer_column` ("" = none) holds what the grader `task`
    compares with, and a larger share than `max_unreadable_answers` that it cannot read is an error. `tools_column`
    holds descriptions of tools for the chat template, and `drop_last_answer` cuts the assistant's turn off a
    conversation that ends with one (otherwise an error). `teacher_column` names each row's teacher ("" = `teacher` for
    all), `teacher_prompt_column` holds what a privileged teacher is shown instead of the prompt (e.g. with the solution
    in it). With `teacher_template` that prompt is written instead: `{prompt}` is the student's (of messages what the
    last one says), `{answer}` the reference answer, `{context}` the text in `teacher_prompt_column`. `weight_column`
    holds how much a row counts (with the weight part `PromptWeight`). A dot in a column's name leads into an object.
    `suffix` is added to plain prompts (e.g. a newline). A prompt longer than `max_tokens` tokens is an error that names
    the row, unless `skip_long` leaves such rows out.
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
    # grader or environment of the prompts: math, or a name of your own (docs/grading.md)
    task: Names = "math"
    # text behind every plain prompt, e.g. a newline
    suffix: str = ""
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
        rows = self._rows(sources)
        numbers = self._numbers(step, len(rows))
        different = list(dict.fromkeys(numbers))
        made = dict(zip(different, self._prompts(different, rows, sources), strict=True))
        prompts = [p for n in numbers if (p := made[n]) is not None for _ in range(self.group_size)]
        if not prompts:
            raise DataError(
                f"prompts {self.path}: every prompt of step {step} is longer than {sources.place}.max_tokens="
                f"{self.max_tokens}; raise it"
            )
        return prompts

    def rows(self, sources: Sources) -> int:
        """See `opd.ports.Listed`."""
        return self._size(len(self._rows(sources)))

    def every(self, sources: Sources, step: int | None) -> Iterator[tuple[Row, Prompt]]:
        """All rows that may come (see `opd.ports.Listed`)."""
        rows = self._rows(sources)
        numbers = range(self._size(len(rows))) if step is None else list(dict.fromkeys(self._numbers(step, len(rows))))
        for first in range(0, len(numbers), AT_ONCE):
            some = numbers[first : first + AT_ONCE]
            for number, prompt in zip(some, self._prompts(some, rows, sources), strict=True):
                if prompt is not None:
                    yield rows[number], prompt

    def starved(self, kept: Collection[str], steps: int, sources: Sources) -> int | None:
        """See `opd.ports.Listed`."""
        rows = len(self._rows(sources))
        for step in range(steps):
            if not any(self._name(number) in kept for number in self._numbers(step, rows)):
                return step
        return None

    def files(self, place: str) -> Mapping[str, str]:
        """See `opd.ports.Listed`."""
        return {f"{place}.path": self.folder or self.path}

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
            for number, row in enumerate(rows[: self._size(len(rows))], start=1)
        ]
        allowed = self.max_unreadable_answers
        return [References(place=sources.place, task=self.task, answers=answers, allowed=allowed)]

    def _rows(self, sources: Sources) -> Sequence[Row]:
        columns = Columns(
            prompt=self.prompt_column,
            answer=self.answer_column,
            teacher=self.teacher_column,
            teacher_prompt=self.teacher_prompt_column,
            weight=self.weight_column,
            tools=self.tools_column,
            drop_last_answer=self.drop_last_answer,
            place=sources.place,
        )
        return sources.rows(self.folder or self.path, columns)

    def _size(self, rows: int) -> int:
        return min(self.limit or rows, rows)

    def _numbers(self, step: int, rows: int) -> list[int]:
        return draw(self.seed, self._size(rows), step * self.prompts_per_step, self.prompts_per_step, self.shuffle)

    def _name(self, number: int) -> str:
        return f"{self.path}/{number}"

    def _prompts(self, numbers: Sequence[int], rows: Sequence[Row], sources: Sources) -> list[Prompt | None]:
        """Prompt of each row, or None where it is too long and may be left out."""
        written = [self._prompt_text(n, rows[n], rows[n].prompt) for n in numbers]
        mine = self._encode(written, sources)
        privileged = [n for n in numbers if rows[n].teacher_prompt or self.teacher_template]
        texts = [self._prompt_text(n, rows[n], self._teacher_prompt(n, rows[n])) for n in privileged]
        its = dict(zip(privileged, self._encode(texts, sources), strict=True))
        return [
            self._prompt(number, rows[number], text, ids, its.get(number, ids), sources.place)
            for number, text, ids in zip(numbers, written, mine, strict=True)
        ]

    def _teacher_prompt(self, number: int, row: Row) -> str | Messages:
        """The row's own prompt for the teacher, or the template's."""
        if not self.teacher_template:
            return row.teacher_prompt
        values, where = (
            {"answer": row.answer, "context": row.teacher_prompt},
            row.where or f"{self.path}: row {number + 1}",
        )
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

    def _prompt_text(self, number: int, row: Row, text: str | Messages) -> PromptText:
        where = row.where or f"{self.path}: row {number + 1}"
        return PromptText(text=text + self.suffix if isinstance(text, str) else text, tools=row.tools, where=where)

    def _encode(self, texts: Sequence[PromptText], sources: Sources) -> list[np.ndarray]:
        encoded = [np.asarray(ids, dtype=np.int32) for ids in sources.tokenizer.encode_all(texts)]
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
            where = row.where or f"{self.path}: row {number + 1}"
            raise DataError(
                f"prompts {where} has {len(ids)} tokens, but {place}.max_tokens is {self.max_tokens}; raise it or set "
                f"{place}.skip_long=true"
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
