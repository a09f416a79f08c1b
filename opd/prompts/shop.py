"""Prompts of the embedded shop task, generated on demand."""

from dataclasses import dataclass
from typing import ClassVar

from opd.prompts.generated import GeneratedPrompts
from opd.tasks.shop import ShopTask


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopPrompts(GeneratedPrompts):
    """Problems of `opd.tasks.shop`; fields as in `GeneratedPrompts`."""

    task: ClassVar[str] = "shop"
    make: ClassVar = ShopTask().problem
