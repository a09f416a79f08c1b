"""The roofline of a run: what its steps take at least on its hardware (`opd.observability.roofline`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf.folder import has_config, text_config
from launch.config.run_config import DEFAULT
from launch.monitors.accounting import Costs
from launch.plan.checks.models import parameter_count
from launch.plan.plan import Plan
from opd.loop.train import StepRecord
from opd.method.needs import named
from opd.observability import roofline
from opd.observability.roofline import Decoding, Floors, Hardware, Lengths, ModelShape, UpdateCost
from opd.observability.spans import Stage
from opd.observability.utilization import DeviceCounts
from opd.ports import LastHidden, Role
from opd.settings.devices import Dtype
from opd.types import Trajectory


def staffing(plan: Plan) -> DeviceCounts:
    """The actors of a run by role; several teachers count together."""
    config = plan.config
    actors = {
        Stage.ROLLOUT: config.student.replicas,
        Stage.TEACHER: sum(teacher.replicas for teacher in config.teachers.values()),
        Stage.LEARNER: config.learner.ranks,
    }
    return DeviceCounts(actors=actors, ahead=config.max_staleness)


def model_shape(path: str) -> ModelShape | None:
    """The shape of a Hugging Face folder's decoder; None without weights here, or if it does not say its shape."""
    params = parameter_count(path)
    if not has_config(path) or not params:
        return None
    settings = text_config(path, f"the model {path!r}")
    wanted = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    if not all(settings.get(name) for name in wanted):
        return None
    layers, width, vocabulary, heads = (int(settings[name]) for name in wanted)
    looked_up = 0 if settings.get("tie_word_embeddings", True) else width * vocabulary
    return ModelShape(
        params=params - looked_up,
        layers=layers,
        width=width,
        vocabulary=vocabulary,
        heads=heads,
        kv_heads=int(settings.get("num_key_value_heads") or heads),
        head_dim=int(settings.get("head_dim") or width // heads),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimit:
    """The least seconds of a step with these lengths: `roofline.Floors.overlapped`.

    `members` of an ensemble read everything; otherwise each teacher of `teachers` reads the prompts that name it, on
    its own `replicas`.
    """

    hardware: Hardware
    writer: ModelShape
    engines: int
    student: ModelShape
    teachers: Mapping[str, ModelShape]
    replicas: Mapping[str, int]
    members: tuple[str, ...]
    sends_hidden: bool
    group: int
    decoding: Decoding
    training: UpdateCost

    def __call__(self, record: StepRecord) -> float:
        """Seconds; 0 for a step without a trajectory."""
        written = [item.trajectory for item in record.scored]
        return self.floors(written, record.published.nbytes).overlapped if written else 0.0

    def floors(self, written: Sequence[Trajectory], published: int) -> Floors:
        """The floors of a step that wrote these trajectories and published so many bytes."""
        lengths = self._lengths(written, lambda t: len(t.prompt.student_ids))
        return Floors(
            rollout=roofline.rollout(self.writer, lengths, self.hardware, self.decoding, self.engines).seconds,
            teacher=max((self._teacher(name, written) for name in self.teachers), default=0.0),
            learner=roofline.learner(self.student, lengths, self.hardware, self.training),
            push=roofline.push(float(published), self.hardware, self.engines),
        )

    def _teacher(self, name: str, written: Sequence[Trajectory]) -> float:
        reads = [t for t in written if name in self.members or (not self.members and t.prompt.teacher == name)]
        if not reads:
            return 0.0
        lengths = self._lengths(reads, lambda t: len(t.prompt.teacher_ids))
        actors = self.replicas[name]
        return roofline.teacher(self.teachers[name], lengths, self.hardware, actors, sends_hidden=self.sends_hidden)

    def _lengths(self, written: Sequence[Trajectory], prompt: Callable[[Trajectory], int]) -> Lengths:
        return Lengths(
            prompt=np.array([prompt(t) for t in written], dtype=np.int64),
            response=np.array([len(t) for t in written], dtype=np.int64),
            group=self.group,
        )


def step_limit(plan: Plan, costs: Costs) -> StepLimit | None:
    """The run's limit per step; None where the hardware or a model's shape is not known."""
    config, requires = plan.config, plan.config.method.requires
    student = model_shape(config.student.path)
    shapes = {name: model_shape(teacher.path) for name, teacher in config.teachers.items()}
    teachers = {name: shape for name, shape in shapes.items() if shape is not None}
    hardware = config.hardware.hardware()
    wanted = len(shapes) if costs.teacher_reads or costs.teacher_writes else 0
    if hardware is None or student is None or len(teachers) < wanted:
        return None
    sends_hidden = LastHidden in requires
    width = 4.0 if config.learner.dtype is Dtype.FLOAT32 else 2.0
    return StepLimit(
        hardware=hardware,
        writer=teachers[DEFAULT] if costs.teacher_writes else student,
        engines=1 if costs.teacher_writes else config.student.replicas,
        student=student,
        teachers=teachers if costs.teacher_reads else {},
        replicas={name: teacher.replicas for name, teacher in config.teachers.items()},
        members=tuple(sorted(named(config.method, Role.READER))),
        sends_hidden=sends_hidden,
        group=config.prompts.group_size,
        decoding=Decoding(slots=config.student.max_num_seqs, weight_bytes=width, cache_bytes=width),
        training=UpdateCost(
            ranks=config.learner.ranks,
            stage=config.learner.stage,
            recompute=config.learner.checkpointed,
            number_bytes=width,
            teacher_head=max(shape.head_params for shape in teachers.values()) if sends_hidden else 0,
        ),
    )
