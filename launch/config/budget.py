"""Units of what a run spends, the amounts that end it, and how they are read from its metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from opd.settings.ranges import In
from opd.settings.validation import settings

Metrics = Mapping[str, float]
Amount = Annotated[float, In(1e-3, 1e30, or_zero=True, because="0: the run ends by its steps alone")]


class Unit(Enum):
    """What a run spends, and what can be counted alike in all runs of a comparison."""

    STEPS = "steps"
    # tokens that the run generated, and those that went through its learner
    TOKENS = "tokens"
    # operations, by `launch.monitors.accounting`
    FLOPS = "flops"
    # processor seconds of training on this machine, evaluations apart
    CPU_S = "cpu_s"


def spending(metrics: Metrics, unit: Unit) -> float:
    """What a run had spent up to the step of this line of metrics.

    Lines of earlier versions lack the tokens; they count as `launch.monitors.accounting.Totals` has them.
    """
    match unit:
        case Unit.STEPS:
            return metrics["step"]
        case Unit.TOKENS:
            completion = metrics["tokens/completion"]
            learned = metrics.get("tokens/learned", metrics.get("tokens/prompt", 0.0) + completion)
            return metrics.get("tokens/generated", completion) + learned
        case Unit.FLOPS:
            return metrics["flops/total"]
        case Unit.CPU_S:
            return metrics["cpu/total_s"]


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
