"""Prompts of the embedded task of long completions, generated on demand."""

from dataclasses import dataclass
from typing import ClassVar

from demos.tasks.long import LongTask
from opd.prompts.generated import GeneratedPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class LongPrompts(GeneratedPrompts):
    """Problems of `demos.tasks.long`; fields as in `GeneratedPrompts`."""

    task: ClassVar[str] = "long"
    make: ClassVar = LongTask().problem
