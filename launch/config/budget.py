"""Amounts at which a run ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from launch.artifacts.spending import Unit
from opd.settings.ranges import In
from opd.settings.validation import settings

Amount = Annotated[float, In(1e-3, 1e30, or_zero=True, because="0: the run ends by its steps alone")]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class StopAfter:
    """Amounts at which a run ends, at the first step that reaches one of them; 0 = no such end.

    `steps` remains the most that a run trains, and what the learning rate's schedule is laid out over.
    """

    # tokens generated and tokens learned, together; 0: no such end
    tokens: Amount = 0.0
    # operations of training; 0: no such end
    flops: Amount = 0.0
    # processor seconds of training; 0: no such end
    cpu_s: Amount = 0.0

    @property
    def amounts(self) -> Mapping[Unit, float]:
        """The amounts that are set."""
        given = {Unit.TOKENS: self.tokens, Unit.FLOPS: self.flops, Unit.CPU_S: self.cpu_s}
        return {unit: amount for unit, amount in given.items() if amount}
