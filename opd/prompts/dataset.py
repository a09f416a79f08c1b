"""Prompts from a file of the user's own: JSONL, parquet or a saved `datasets` directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd.errors import ConfigurationError, DataError
from opd.ports import Columns, References, Row, Sources
from opd.prompts.order import draw
from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPrompts:
    """Rows of `path`, `prompts_per_step` a step, each `group_size` times, in a new order every epoch.

    `prompt_column` holds plain text or chat messages; `answer_column` ("" = none) holds what the grader `task`
    compares with, and a larger share than `max_unreadable_answers` that it cannot read is an error. `teacher_column`
    names each row's teacher ("" = `teacher` for all), `teacher_prompt_column` holds what a privileged teacher is shown
    instead of the prompt (e.g. with the solution in it), and `weight_column` how much a row counts (with the weight
    part `PromptWeight`). `suffix` is added to plain prompts (e.g. a newline). A prompt longer than `max_tokens` tokens
    is an error that names the row, unless `skip_long` leaves such rows out.
    """

    path: str
    prompts_per_step: int
    prompt_column: str = "prompt"
    answer_column: str = ""
    teacher_column: str = ""
    teacher_prompt_column: str = ""
    weight_column: str = ""
    task: str = "math"
    suffix: str = ""
    seed: int = 0
    group_size: int = 1
    limit: int = 0
    shuffle: bool = True
    max_tokens: int = 1024
    skip_long: bool = False
    teacher: str = "default"
    max_unreadable_answers: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.max_unreadable_answers <= 1:
            raise ConfigurationError(
                f"prompts.max_unreadable_answers is a share of the rows, from 0 to 1, but got "
                f"{self.max_unreadable_answers}; correct it"
            )
        if self.prompts_per_step < 1 or self.group_size < 1 or self.limit < 0 or self.max_tokens < 1:
            raise ConfigurationError(
                "prompts DatasetPrompts needs prompts_per_step, group_size and max_tokens >= 1 and limit >= 0, "
                f"but got {self}; correct the field that is out of range"
            )

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        rows = self._rows(sources)
        size = min(self.limit or len(rows), len(rows))
        wanted = self.prompts_per_step
        prompts: list[Prompt] = []
        for number in draw(self.seed, size, step * wanted, wanted, self.shuffle):
            prompt = self._prompt(number, rows[number], sources)
            if len(prompt.student_ids) <= self.max_tokens:
                prompts += [prompt] * self.group_size
            elif not self.skip_long:
                raise DataError(
                    f"prompts {self.path}: row {number + 1} has {len(prompt.student_ids)} tokens, but "
                    f"prompts.max_tokens is {self.max_tokens}; raise it or set prompts.skip_long=true"
                )
        if not prompts:
            raise DataError(
                f"prompts {self.path}: every prompt of step {step} is longer than prompts.max_tokens="
                f"{self.max_tokens}; raise it"
            )
        return prompts

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
        answers = [row.answer for row in rows[: self.limit or len(rows)]]
        return [References(path=self.path, task=self.task, answers=answers, allowed=self.max_unreadable_answers)]

    def _rows(self, sources: Sources) -> Sequence[Row]:
        columns = Columns(
            prompt=self.prompt_column,
            answer=self.answer_column,
            teacher=self.teacher_column,
            teacher_prompt=self.teacher_prompt_column,
            weight=self.weight_column,
        )
        return sources.rows(self.path, columns)

    def _prompt(self, number: int, row: Row, sources: Sources) -> Prompt:
        ids = self._ids(number, row.prompt, sources)
        return Prompt(
            id=f"{self.path}/{number}",
            student_ids=ids,
            teacher_ids=self._ids(number, row.teacher_prompt, sources) if row.teacher_prompt else ids,
            teacher=row.teacher or self.teacher,
            task=self.task,
            answer=row.answer,
            weight=row.weight,
        )

    def _ids(self, number: int, said: str | tuple[Mapping[str, str], ...], sources: Sources) -> np.ndarray:
        tokenizer = sources.tokenizer
        ids = tokenizer.encode(said + self.suffix) if isinstance(said, str) else tokenizer.chat(said)
        if len(ids) == 0:
            raise DataError(f"prompts {self.path}: row {number + 1} has an empty prompt; remove the row")
        return np.asarray(ids, dtype=np.int32)
