"""Prompts of the embedded peak task, generated on demand."""

from dataclasses import dataclass
from typing import ClassVar

from demos.tasks.peak import PeakTask
from opd.prompts.generated import GeneratedPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakPrompts(GeneratedPrompts):
    """Problems of `demos.tasks.peak`; fields as in `GeneratedPrompts`."""

    task: ClassVar[str] = "peak"
    make: ClassVar = PeakTask().problem
