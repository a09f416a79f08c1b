"""Prompts of the embedded noisy task, generated on demand."""

import random
from dataclasses import dataclass
from typing import ClassVar

from demos.tasks.noisy import NoisyTask, Part
from demos.tasks.shop import ShopProblem
from opd.prompts.generated import GeneratedPrompts
from opd.settings.validation import settings


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class NoisyPrompts(GeneratedPrompts):
    """Problems of `demos.tasks.noisy`, graded as those of the shop; other fields as in `GeneratedPrompts`."""

    task: ClassVar[str] = "shop"

    # part of the problems: CLEAN, WRONG or UNSURE, by what the teacher knows of them; left out, all
    part: Part | None = None

    def problem(self, number: int) -> ShopProblem:
        """See `GeneratedPrompts`."""
        return NoisyTask(part=self.part).problem(random.Random(f"noisy/{self.seed}/{number}"))
