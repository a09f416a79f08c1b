"""Results of one evaluation, as a value that is tracked, stored and drawn."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from launch.artifacts.untrusted_files import record

NOT_MEASURED = "not measured"


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

    def as_json(self) -> dict[str, Any]:
        """The point as a plain mapping; values that were not measured (None, NaN) are null."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["examinee"] = self.examinee.value
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "an evaluation") -> "EvaluationPoint":
        """Inverse of `as_json`. Raises `DataError` for anything else."""
        return record(cls, values, where, "remove it, or write the report with the version that wrote it")
