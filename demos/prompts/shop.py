"""Prompts of the embedded shop task, generated on demand."""

from dataclasses import dataclass
from typing import ClassVar

from demos.tasks.shop import ShopTask
from opd.prompts.generated import GeneratedPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopPrompts(GeneratedPrompts):
    """Problems of `demos.tasks.shop`; fields as in `GeneratedPrompts`."""

    task: ClassVar[str] = "shop"
    make: ClassVar = ShopTask().problem
