"""Measure by which the best checkpoint of a run is chosen, as the setting `checkpoint_best` names it."""

from dataclasses import dataclass

from launch.artifacts.evaluation_point import MAIN, EvaluationPoint
from launch.config.settings import EvaluationConfig, EvaluationSet
from opd.errors import ConfigurationError

_LOWER = ("reverse_kl", "truncation_rate")  # measures of which less is better


@dataclass(frozen=True, slots=True, kw_only=True)
class BestBy:
    """Measure of one evaluation set by which checkpoints are ranked."""

    set: str
    measure: str

    @classmethod
    def of(cls, text: str) -> "BestBy | None":
        """From `checkpoint_best`: `SET/MEASURE`, or `MEASURE` of `evaluation.prompts`; None for ""."""
        name, _, measure = text.rpartition("/")
        return cls(set=name, measure=measure) if text else None

    def __str__(self) -> str:
        return f"{self.set}/{self.measure}" if self.set else self.measure

    def score(self, point: EvaluationPoint) -> float | None:
        """Score of an evaluation, more is better; None where this measure is not in it."""
        value = point.measure(self.measure) if point.set == self.set else None
        return value if value is None or self.measure not in _LOWER else -value


def check_best(text: str, config: EvaluationConfig) -> None:
    """Refuse a measure that not every evaluation of its set has: checkpoints could not be compared by it."""
    by = BestBy.of(text)
    if by is None:
        return
    sets = config.by_name
    if by.set not in sets:
        names = ", ".join(f"{name}/{by.measure}" if name else by.measure for name in sets)
        raise ConfigurationError(
            f"checkpoint_best={by} names an evaluation set that the run has not; write SET/MEASURE, here {names}"
        )
    have = steady_measures(sets[by.set])
    if by.measure not in have:
        which = f"the set {by.set}" if by.set != MAIN else "evaluation.prompts"
        raise ConfigurationError(
            f"checkpoint_best={by} is no measure that every evaluation on {which} has; these have {', '.join(have)}"
        )


def steady_measures(of: EvaluationSet) -> list[str]:
    """Measures that all evaluations on a set have, at the ends of a run and between them, and that mean the same."""
    ends, between = of.count(between=False), of.count(between=True)
    found = ["greedy"] if of.greedy else []
    found.append("mean_at_k")
    found += [f"mean_at_{ends}"] if ends == between else []
    passes = [k for k in of.pass_at if k <= between] or ([ends] if ends == between else [])
    found += [f"pass_at_{k}" for k in passes] + [f"maj_at_{k}" for k in of.maj_at if k <= between]
    return [*found, *(["reverse_kl"] if of.reverse_kl_prompts else []), "truncation_rate"]
