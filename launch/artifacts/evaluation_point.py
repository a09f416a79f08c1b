"""Results of one evaluation, as a value that is tracked, stored and drawn."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from launch.artifacts.untrusted_files import record
from opd.errors import ConfigurationError, DataError
from opd.evaluation.estimates import Estimate

NOT_MEASURED = "not measured"
MAIN = ""  # name of the set that `evaluation.prompts` is
LOW, HIGH = "_low", "_high"  # end the names of the ends of an interval in a tracker
_FIELDS = ("greedy", "mean_at_k", "pass_at_k", "reverse_kl", "length_mean", "truncation_rate")
_SAMPLER = ("step", "temperature", "top_p", "max_tokens", "problems")  # the same in every evaluation of a set


class EvaluatedModel(Enum):
    """The model whose answers were graded."""

    STUDENT = "student"
    TEACHER = "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPoint:
    """Results on held-out prompts after `step` steps of training; None = not measured.

    Accuracies are over the prompts that have a reference answer, and None where none has.

    `greedy` is the share solved at temperature 0, `mean_at_k` the mean share solved over `k` samples at temperature 1
    (the same quantity for every `k`, less noisy for a larger one), `pass_at_k` the share solved by at least one of
    them. `reverse_kl` is in nats per token of the student's own answers, `length_mean` in tokens. `seconds` is what
    the evaluation took. `tokens` (completion tokens), `generated` (those that the run's models generated), `learned`
    (tokens that went through the learner), `flops` and `cpu_s` are what *training* had spent so far: the axes of a
    comparison. `greedy_by_task` and `mean_at_k_by_task` are empty where all prompts are of one task.

    `set` names the evaluation set, "" is that of `evaluation.prompts`. Its samples have `temperature` and `top_p`, and
    up to `max_tokens` tokens (0: an older run, which did not say). `problems` counts the prompts that have an answer.
    `estimates` has every share with its interval, by its full name: `greedy`, `mean_at_4`, `pass_at_4`, `maj_at_4`.

    Example: `EvaluationPoint(step=40, greedy=0.87, mean_at_k=0.78, pass_at_k=0.93, k=4, reverse_kl=0.031,
    length_mean=48.7, truncation_rate=0.01, seconds=2.1, tokens=138_000, flops=7.2e11, cpu_s=16.4)`.
    """

    step: int
    greedy: float | None
    mean_at_k: float | None
    pass_at_k: float | None
    k: int
    reverse_kl: float | None
    length_mean: float | None
    truncation_rate: float | None
    seconds: float
    tokens: int
    flops: float
    cpu_s: float
    generated: int = 0
    learned: int = 0
    examinee: EvaluatedModel = EvaluatedModel.STUDENT
    greedy_by_task: Mapping[str, float] = field(default_factory=dict)
    mean_at_k_by_task: Mapping[str, float] = field(default_factory=dict)
    set: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 0
    problems: int = 0
    estimates: Mapping[str, Estimate] = field(default_factory=dict)

    def measure(self, name: str) -> float | None:
        """A measure by its name: one of the estimates, or a field such as `reverse_kl`; None = not measured.

        Raises `ConfigurationError` where no evaluation has a measure of that name.
        """
        if name in self.estimates:
            return self.estimates[name].value
        if name in _FIELDS:
            return getattr(self, name)
        if re.fullmatch(r"(mean|pass|maj)_at_[1-9]\d*", name):
            return None
        raise ConfigurationError(
            f"an evaluation has no measure {name!r}; it has {', '.join(_FIELDS)}, and mean_at_N, pass_at_N, maj_at_N"
        )

    def tracked(self) -> dict[str, float]:
        """Numbers for a tracker by their names: of a named set `SET/maj_at_4`, with the ends of intervals apart."""
        values = {n: float(v) for n, v in self.as_json().items() if isinstance(v, int | float) and n not in _SAMPLER}
        if not self.set:
            by_task = {"greedy_by_task": self.greedy_by_task, "mean_at_k_by_task": self.mean_at_k_by_task}
            return values | {f"{name}.{task}": v for name, of in by_task.items() for task, v in of.items()}
        kept = {n: v for n, v in values.items() if n in (*_FIELDS[3:], "seconds")}
        for name, estimate in self.estimates.items():
            kept |= {name: estimate.value, f"{name}{LOW}": estimate.low, f"{name}{HIGH}": estimate.high}
        return {f"{self.set}/{name}": value for name, value in kept.items()}

    def as_json(self) -> dict[str, Any]:
        """The point as a plain mapping; values that were not measured (None, NaN) are null."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["examinee"] = self.examinee.value
        values["estimates"] = {name: [e.value, e.low, e.high] for name, e in self.estimates.items()}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "an evaluation") -> "EvaluationPoint":
        """Inverse of `as_json`. Raises `DataError` for anything else."""
        if _has_estimates(values):
            values = {**values, "estimates": _estimates(values["estimates"], where)}
        return record(cls, values, where, "remove it, or write the report with the version that wrote it")


def _has_estimates(values: Any) -> bool:
    return isinstance(values, Mapping) and "estimates" in values


def _estimates(given: Any, where: str) -> dict[str, Estimate]:
    """Estimates by name, from lists of a value and the ends of its interval."""
    found: dict[str, Estimate] = {}
    for name, numbers in given.items() if isinstance(given, Mapping) else [("", given)]:
        if not (isinstance(numbers, list) and len(numbers) == 3 and all(type(n) in (int, float) for n in numbers)):
            raise DataError(
                f"{where} has no value and interval as estimate {str(name)[:60]!r}; remove it, or write the report "
                "with the version that wrote it"
            )
        found[str(name)] = Estimate(value=float(numbers[0]), low=float(numbers[1]), high=float(numbers[2]))
    return found
