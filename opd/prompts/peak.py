"""Prompts of the embedded peak task, generated on demand."""

from dataclasses import dataclass
from typing import ClassVar

from opd.prompts.generated import GeneratedPrompts
from opd.tasks.peak import PeakTask


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakPrompts(GeneratedPrompts):
    """Problems of `opd.tasks.peak`; fields as in `GeneratedPrompts`."""

    task: ClassVar[str] = "peak"
    make: ClassVar = PeakTask().problem
