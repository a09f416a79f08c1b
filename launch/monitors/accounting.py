"""Costs of training: tokens, floating-point operations and processor seconds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import psutil

from opd.loop.train import StepRecord
from opd.observability.roofline import FORWARD, TRAIN
from opd.types import NO_VERSION, BlendedScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Model sizes, and the models that read or write every token.

    With `Ns` and `Nt` parameters, a token (of prompt or completion) costs `8 Ns + 2 Nt` in on-policy distillation
    (student writes and learns, teacher reads), `8 Ns` in GRPO (no teacher) and `6 Ns + 2 Nt` in SFT on teacher text
    (teacher writes, student learns); `2 Ns` more where token weights declare readings, and `2 Nt` more where the
    teacher took part in a blend. Attention over long contexts, shared prefixes and probes of an update are not counted
    (`opd.observability.roofline` counts the first two, and needs the models' shapes for it). `teacher_writes`: what the
    student did not write, a teacher did (otherwise it comes from a data set); what a scorer lets a teacher write is not
    counted. `by_teacher` has the sizes of several teachers by name.
    Example: `Costs(student_params=310_000, teacher_params=620_000, teacher_writes=False,
    teacher_reads=True)`.
    """

    student_params: int
    teacher_params: int
    teacher_writes: bool
    teacher_reads: bool
    by_teacher: Mapping[str, int] = field(default_factory=dict)

    def of(self, trajectories: Sequence[Trajectory]) -> "Costs":
        """These costs for one step: `Nt` becomes the mean over its tokens, each with its prompt's teacher."""
        tokens = [len(t.prompt.teacher_ids) + len(t) for t in trajectories]
        if not self.by_teacher or not sum(tokens):
            return self
        spent = sum(n * self.by_teacher[t.prompt.teacher] for n, t in zip(tokens, trajectories, strict=True))
        return replace(self, teacher_params=round(spent / sum(tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Tokens of one step: `prompt` and `completion` as they were trained on, `generated` = completion tokens that a
    model of this run generated (not those of a data set), `student` = those of both in text that the student
    generated, `scored` = all the teacher read (its own context included), `learned` = all that went through the
    learner, `trained` = those with a loss, `read` = all that went through the student before, to be weighed,
    `blended` = those of `student` that a teacher computed beside it.
    """

    prompt: int
    completion: int
    generated: int
    student: int
    scored: int
    learned: int
    trained: int
    read: int = 0
    blended: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Cumulative costs of a run. Example: `Totals(completion=346_000, flops=1.8e12)`."""

    prompt: int = 0
    completion: int = 0
    scored: int = 0
    trained: int = 0
    generated: int = 0
    learned: int = 0
    flops: float = 0.0

    def plus(self, tokens: StepTokens, costs: Costs) -> "Totals":
        """The totals after one more step."""
        return Totals(
            prompt=self.prompt + tokens.prompt,
            completion=self.completion + tokens.completion,
            scored=self.scored + tokens.scored,
            trained=self.trained + tokens.trained,
            generated=self.generated + tokens.generated,
            learned=self.learned + tokens.learned,
            flops=self.flops + step_flops(tokens, costs),
        )

    def as_metrics(self) -> dict[str, float]:
        """The totals under their names in the metrics file."""
        return {
            "tokens/prompt": self.prompt,
            "tokens/completion": self.completion,
            "tokens/scored": self.scored,
            "tokens/trained": self.trained,
            "tokens/generated": self.generated,
            "tokens/learned": self.learned,
            "flops/total": self.flops,
        }

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float]) -> "Totals":
        """Totals of the last kept line of metrics, from which a resumed run continues.

        A run of before these were counted has generated its completions, and learned them with their prompts.
        """
        both = metrics["tokens/prompt"] + metrics["tokens/completion"]
        return cls(
            prompt=int(metrics["tokens/prompt"]),
            completion=int(metrics["tokens/completion"]),
            scored=int(metrics["tokens/scored"]),
            trained=int(metrics["tokens/trained"]),
            generated=int(metrics.get("tokens/generated", metrics["tokens/completion"])),
            learned=int(metrics.get("tokens/learned", both)),
            flops=metrics["flops/total"],
        )


def step_tokens(record: StepRecord, costs: Costs) -> StepTokens:
    """Token counts of a step."""
    trajectories = [item.trajectory for item in record.scored]
    completion = sum(len(t) for t in trajectories)
    read = sum(len(t.prompt.teacher_ids) for t in trajectories) + completion
    own = [t for t in trajectories if (t.versions != NO_VERSION).any()]
    return StepTokens(
        prompt=sum(len(t.prompt.student_ids) for t in trajectories),
        completion=completion,
        generated=completion if costs.teacher_writes else sum(map(len, own)),
        student=sum(len(t.prompt.student_ids) + len(t) for t in own),
        scored=read if costs.teacher_reads else 0,
        learned=record.report.tokens,
        trained=record.report.trained_tokens,
        read=record.read_tokens,
        blended=sum(len(t.prompt.student_ids) + len(t) for t in own if isinstance(t.behavior, BlendedScores)),
    )


def step_flops(tokens: StepTokens, costs: Costs) -> float:
    """Operations of one step: 2N per token and forward pass, 6N per trained token."""
    by_teacher = (tokens.prompt + tokens.completion - tokens.student) * costs.teacher_writes
    return float(
        FORWARD * (costs.student_params * tokens.student + costs.teacher_params * by_teacher)
        + FORWARD * (costs.teacher_params * (tokens.scored + tokens.blended) + costs.student_params * tokens.read)
        + TRAIN * costs.student_params * tokens.learned
    )


def process_tree_cpu_seconds() -> float:
    """User and system seconds of this process and all its descendants on this machine.

    A descendant that has ended is counted by the parent that waited for it. Processes on other nodes of a
    cluster are not seen.
    """
    here = psutil.Process()
    total = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # ended since it was listed; its parent counts it from now on
            continue
        # Only Linux tells what the children that were waited for had used.
        reaped = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        total += times.user + times.system + reaped
    return total


class TrainingCpu:
    """Processor seconds of training: start-up, evaluation and export apart."""

    def __init__(self) -> None:
        self._apart = process_tree_cpu_seconds()

    def __call__(self) -> float:
        return process_tree_cpu_seconds() - self._apart

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Context whose processor seconds are not counted."""
        before = process_tree_cpu_seconds()
        try:
            yield
        finally:
            self._apart += process_tree_cpu_seconds() - before
