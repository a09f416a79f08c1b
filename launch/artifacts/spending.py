"""Units of what a run spends, and how they are read from its metrics."""

from collections.abc import Mapping
from enum import Enum

Metrics = Mapping[str, float]


class Unit(Enum):
    """Unit of what a run spends, counted alike in all runs of a comparison."""

    STEPS = "steps"
    # tokens that the run generated, and those that went through its learner
    TOKENS = "tokens"
    # operations, by `launch.monitors.accounting`
    FLOPS = "flops"
    # processor seconds of training on this machine, evaluations apart
    CPU_S = "cpu_s"


def spending(metrics: Metrics, unit: Unit) -> float:
    """Amount that a run had spent up to the step of this line of metrics.

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
