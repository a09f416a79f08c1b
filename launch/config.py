"""From a composed configuration to typed objects; beside `launch.compose` the only place that knows OmegaConf.

`build` turns nodes into objects. A node's dataclass is
its schema: every field can be overridden whether or not a YAML file mentions it, an unknown key or a wrong type is
refused by name, and `_target_` may only point below `opd.` and packages the user lists.
"""

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.config import StudentConfig
from launch.compose import compose, first_line
from launch.keys import check_names, nearest
from launch.settings import ClusterConfig, EvaluationConfig, HardwareConfig
from launch.tracking import TrackerConfig
from learner.config import LearnerConfig
from opd.errors import ConfigurationError
from opd.method import Method, check_prompts
from opd.objectives.truncated import TruncatedRatio
from opd.pipeline import Pipeline, WeightUpdate
from opd.ports import PromptSource
from teacher_service.config import TeacherConfig

DEFAULT = "default"  # the teacher of prompts that name none


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run, typed; `text` is the resolved YAML it came from.

    `teachers` has them by name: `default` is the group `teacher`, the others stand under `teachers` in the YAML
    (`teachers.NAME.path=...`). Their order numbers the output matrices (`HiddenScores.head`).
    """

    run_name: str
    output_dir: str
    seed: int
    steps: int
    max_tokens: int
    max_staleness: int
    max_ratio: float
    weight_update: WeightUpdate
    deterministic: bool
    max_buffer_bytes: int
    checkpoint_every: int
    checkpoint_keep: int
    checkpoint_keep_every: int
    grace_s: float
    resume: str
    doctor: bool
    doctor_everything: bool
    trace: bool
    dry_run: bool
    notes: Sequence[str]
    method: Method
    prompts: PromptSource
    student: StudentConfig
    teachers: Mapping[str, TeacherConfig]
    learner: LearnerConfig
    evaluation: EvaluationConfig
    cluster: ClusterConfig
    hardware: HardwareConfig
    tracker: TrackerConfig
    text: str = field(repr=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigurationError(
                f"steps is {self.steps}, but a run needs at least 1; set steps=1 or more (opd eval only measures)"
            )
        if self.checkpoint_every < 0:
            raise ConfigurationError(
                f"checkpoint_every must be >= 0, got {self.checkpoint_every}; use 0 for only the last checkpoint"
            )
        _ = self.pipeline
        if self.checkpoint_keep < 1 or self.checkpoint_keep_every < 0 or self.grace_s < 0:
            raise ConfigurationError(
                "checkpoint_keep must be >= 1, checkpoint_keep_every and grace_s >= 0, got "
                f"{self.checkpoint_keep}, {self.checkpoint_keep_every} and {self.grace_s}; correct the one out of range"
            )
        check_prompts(self.method, self.prompts)

    @property
    def pipeline(self) -> Pipeline:
        """How far collecting runs ahead. Raises `ConfigurationError` where that makes no sense."""
        return Pipeline(
            max_staleness=self.max_staleness,
            update=self.weight_update,
            deterministic=self.deterministic,
            max_buffer_bytes=self.max_buffer_bytes,
            barrier_every=self.checkpoint_every,
            teacher_follows=any(teacher.mixup for teacher in self.teachers.values()),
        )

    @property
    def teacher(self) -> TeacherConfig:
        """The teacher of prompts that name none."""
        return self.teachers[DEFAULT]


_SECTIONS: Mapping[str, type] = {
    "student": StudentConfig,
    "learner": LearnerConfig,
    "cluster": ClusterConfig,
    "hardware": HardwareConfig,
    "tracker": TrackerConfig,
}

_BUILT = {*_SECTIONS, "teachers", "notes", "method", "prompts", "evaluation", "text"}
_PLAIN = [f.name for f in dataclasses.fields(RunConfig) if f.name not in _BUILT]


def build(node: Any, where: str, allowed: Sequence[str] = ()) -> Any:
    """An object from a node with `_target_`, checked against the class it names; plain nodes become values."""
    if isinstance(node, DictConfig) and "_target_" in node:
        cls = _target(str(node["_target_"]), where, ("opd.", *allowed))
        values = {str(k): v for k, v in node.items() if k != "_target_"}
        return _construct(cls, values, where, allowed)
    if isinstance(node, DictConfig):
        return {str(k): build(v, f"{where}.{k}", allowed) for k, v in node.items()}
    if isinstance(node, ListConfig):
        return [build(v, f"{where}[{i}]", allowed) for i, v in enumerate(node)]
    return node


def _target(target: str, where: str, allowed: Sequence[str]) -> type:
    if not target.startswith(tuple(allowed)):
        raise ConfigurationError(
            f"{where}._target_ is {target!r}, but only parts below {', '.join(allowed)} are built; add its package "
            "to allow_targets if you trust it"
        )
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{where}._target_ {target!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigurationError(f"{where}._target_ {target!r} is no dataclass; parts are frozen dataclasses")
    return cls


def _construct(cls: type, values: Mapping[str, Any], where: str, allowed: Sequence[str] = ()) -> Any:
    """`cls(**values)` after checking names and, for plain fields, types."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in values:
        if name not in fields:
            raise ConfigurationError(f"{where}.{name}: {cls.__name__} has no such field; {nearest(name, list(fields))}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        kind = fields[name].type
        plain = isinstance(value, DictConfig) and "_target_" not in value
        if plain and isinstance(kind, type) and dataclasses.is_dataclass(kind):
            built[name] = _construct(kind, dict(value.items()), f"{where}.{name}", allowed)
        elif isinstance(value, DictConfig | ListConfig):
            built[name] = build(value, f"{where}.{name}", allowed)
        else:
            built[name] = _typed(fields[name], value, f"{where}.{name}")
    missing = [
        n
        for n, f in fields.items()
        if n not in built and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigurationError(f"{where}.{missing[0]} is not set and has no default; set {where}.{missing[0]}=...")
    return cls(**built)


def _typed(spec: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """The value as the field's type, by OmegaConf's own conversion (enums by name, ints to floats)."""
    if spec.type not in (int, float, bool, str) and not (isinstance(spec.type, type) and issubclass(spec.type, Enum)):
        return value
    if isinstance(spec.type, type) and issubclass(spec.type, Enum) and isinstance(value, str):
        value = value.upper()
    schema = dataclasses.make_dataclass("Schema", [("value", cast(type, spec.type))])
    try:
        return OmegaConf.merge(OmegaConf.structured(schema), {"value": value}).value
    except OmegaConfBaseException as error:
        options = f", one of {[m.name for m in spec.type]}" if issubclass(cast(type, spec.type), Enum) else ""
        raise ConfigurationError(
            f"{where} needs {cast(type, spec.type).__name__}{options}, but got {value!r}; correct the value"
        ) from error


def teacher_config(overrides: Sequence[str]) -> TeacherConfig:
    """The teacher that `overrides` describe, without the rest of a run."""
    node = compose(overrides).teacher
    try:
        OmegaConf.resolve(node)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the teacher cannot be resolved: {first_line(error)}") from error
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigurationError(f"teacher.{missing[0]} is not set; add teacher.{missing[0]}=... to the command")
    return _construct(TeacherConfig, dict(node.items()), "teacher")


def run_config(overrides: Sequence[str]) -> RunConfig:
    """The typed run that `overrides` describe. No `DictConfig` leaves this function."""
    node = compose(overrides)
    check_names(node, overrides)
    try:
        OmegaConf.resolve(node)
        missing = sorted(OmegaConf.missing_keys(node))
        text = OmegaConf.to_yaml(node)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the configuration cannot be resolved: {first_line(error)}") from error
    if missing:
        raise ConfigurationError(f"{missing[0]} is not set; add {missing[0]}=... to the command")
    allowed = [str(p) for p in node.allow_targets]
    plain_types = RunConfig.__dataclass_fields__
    plain = {k: _typed(plain_types[k], node[k], k) for k in _PLAIN}
    sections = {name: _construct(cls, dict(node[name].items()), name) for name, cls in _SECTIONS.items()}
    return RunConfig(
        **plain,
        **sections,
        teachers=_teachers(node),
        notes=[" ".join(str(n).split()) for n in node.notes],
        method=_truncated(_construct(Method, dict(node.method.items()), "method", allowed), plain["max_ratio"]),
        prompts=build(node.prompts, "prompts", allowed),
        evaluation=_construct(EvaluationConfig, dict(node.evaluation.items()), "evaluation", allowed),
        text=text,
    )


def _truncated(method: Method, max_ratio: float) -> Method:
    if max_ratio == 0:
        return method
    return replace(method, objective=TruncatedRatio(of=method.objective, max_ratio=max_ratio))


def _teachers(node: DictConfig) -> dict[str, TeacherConfig]:
    """All teachers by name, the default first; each is checked against `TeacherConfig`."""
    more = {str(name): value for name, value in (node.teachers or {}).items()}
    for name, value in more.items():
        if name == DEFAULT or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigurationError(
                f"teachers.{name}: a further teacher needs a name of small letters, digits and _ other than "
                f"{DEFAULT!r} (which is the group `teacher`); rename it"
            )
        if not isinstance(value, DictConfig):
            raise ConfigurationError(
                f"teachers.{name} needs fields such as path, got {value!r}; set teachers.{name}.path"
            )
    nodes = {DEFAULT: node.teacher} | more
    where = {name: "teacher" if name == DEFAULT else f"teachers.{name}" for name in nodes}
    return {name: _construct(TeacherConfig, dict(n.items()), where[name]) for name, n in nodes.items()}
