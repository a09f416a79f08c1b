"""Prompts from a file of the user's own: JSONL, parquet or a saved `datasets` directory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd.errors import ConfigurationError, DataError
from opd.ports import Row, Sources
from opd.prompts.order import draw
from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPrompts:
    """Rows of `path`, `prompts_per_step` a step, each `group_size` times, in a new order every epoch.

    `prompt_column` holds plain text or chat messages; `answer_column` ("" = none) holds what the grader `task`
    compares with. `suffix` is added to plain prompts (e.g. a newline). A prompt longer than `max_tokens` tokens is
    an error that names the row, unless `skip_long` leaves such rows out.
    """

    path: str
    prompts_per_step: int
    prompt_column: str = "prompt"
    answer_column: str = ""
    task: str = "math"
    suffix: str = ""
    seed: int = 0
    group_size: int = 1
    limit: int = 0
    shuffle: bool = True
    max_tokens: int = 1024
    skip_long: bool = False
    teacher: str = "default"

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.group_size < 1 or self.limit < 0 or self.max_tokens < 1:
            raise ConfigurationError(
                "prompts DatasetPrompts needs prompts_per_step, group_size and max_tokens >= 1 and limit >= 0, "
                f"but got {self}; correct the field that is out of range"
            )

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        rows = sources.rows(self.path, self.prompt_column, self.answer_column)
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

    def _prompt(self, number: int, row: Row, sources: Sources) -> Prompt:
        tokenizer = sources.tokenizer
        said = row.prompt
        ids = tokenizer.encode(said + self.suffix) if isinstance(said, str) else tokenizer.chat(said)
        if len(ids) == 0:
            raise DataError(f"prompts {self.path}: row {number + 1} has an empty prompt; remove the row")
        ids = np.asarray(ids, dtype=np.int32)
        return Prompt(
            id=f"{self.path}/{number}",
            student_ids=ids,
            teacher_ids=ids,
            teacher=self.teacher,
            task=self.task,
            answer=row.answer,
        )
