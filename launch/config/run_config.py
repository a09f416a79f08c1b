"""From a composed configuration to typed objects; beside `launch.config.compose` the only place that knows OmegaConf.

`run_config` is the only way to a run, and no node leaves it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.config import StudentConfig
from launch.artifacts.redaction import check_logins, remember
from launch.config.compose import compose, first_line
from launch.config.keys import check_names
from launch.config.settings import ClusterConfig, EvaluationConfig, HardwareConfig
from launch.config.task_parts import BY_TASK, environments_of, graders_of, named_by_hand
from launch.config.tracker import TrackerConfig
from launch.config.typed import AllowedPackages, built, construct
from learner.config import LearnerConfig
from opd.errors import ConfigurationError
from opd.loop.staleness import StalenessSchedule, WeightUpdate
from opd.method.method import Method, check_prompts
from opd.objectives.truncated import TruncatedRatio
from opd.ports import PromptSource
from opd.settings.ranges import Bytes, Count, Every, In, Line, Names, RunName, Seed, Steps, Tokens
from opd.settings.validation import fields_of, fit, settings
from teacher_service.config import TeacherConfig

DEFAULT = "default"  # the teacher of prompts that name none


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class RunConfig:
    """A whole run, typed; `text` is the resolved YAML it came from, and `overrides` made that, as they were given.

    `teachers` has them by name: `default` is the group `teacher`, the others stand under `teachers` in the YAML
    (`teachers.NAME.path=...`). Their order numbers the output matrices (`HiddenScores.head`). `graders` and
    `environments` are parts by the name that `prompts.task` has (`launch.config.task_parts`).
    """

    run_name: RunName
    output_dir: Names
    seed: Seed
    steps: Steps
    max_tokens: Tokens
    max_staleness: Annotated[int, In(0, 1_000_000, because="0: strictly on-policy")]
    max_ratio: Annotated[float, In(1, 1e6, or_zero=True, because="0 leaves importance ratios as they are")]
    weight_update: WeightUpdate
    deterministic: bool
    max_buffer_bytes: Bytes
    checkpoint_every: Every
    checkpoint_minutes: Annotated[float, In(0, 7 * 24 * 60.0, because="0 saves by steps only")]
    checkpoint_keep: Count
    checkpoint_keep_every: Every
    grace_s: Annotated[float, In(0, 24 * 3600.0)]
    resume: Line
    doctor: bool
    doctor_everything: bool
    trace: bool
    dry_run: bool
    notes: Sequence[str]
    method: Method
    prompts: PromptSource
    graders: Mapping[str, object]
    environments: Mapping[str, object]
    student: StudentConfig
    teachers: Mapping[str, TeacherConfig]
    learner: LearnerConfig
    evaluation: EvaluationConfig
    cluster: ClusterConfig
    hardware: HardwareConfig
    tracker: TrackerConfig
    text: str = field(repr=False)
    overrides: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        _ = self.pipeline
        check_prompts(self.method, self.prompts)

    @property
    def pipeline(self) -> StalenessSchedule:
        """How far collecting runs ahead. Raises `ConfigurationError` where that makes no sense."""
        return StalenessSchedule(
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

_BUILT = {*_SECTIONS, *BY_TASK, "teachers", "notes", "method", "prompts", "evaluation", "text", "overrides"}
_PLAIN = [f.name for f in dataclasses.fields(RunConfig) if f.name not in _BUILT]


def _resolved(node: DictConfig) -> tuple[dict[str, Any], str]:
    """A configuration as plain values, and as text."""
    try:
        OmegaConf.resolve(node)
        missing = sorted(OmegaConf.missing_keys(node))
        values, text = OmegaConf.to_container(node), OmegaConf.to_yaml(node)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigurationError(f"the configuration cannot be resolved: {first_line(error)}") from error
    remember(values)
    check_logins(values)
    if missing:
        raise ConfigurationError(f"{missing[0]} is not set; add {missing[0]}=... to the command")
    return cast(dict[str, Any], values), text


def teacher_config(overrides: Sequence[str]) -> TeacherConfig:
    """The teacher that `overrides` describe, without the rest of a run."""
    node = compose(overrides)
    values, _ = _resolved(OmegaConf.create({"teacher": node.teacher}))
    return construct(TeacherConfig, values["teacher"], "teacher")


def run_config(overrides: Sequence[str]) -> RunConfig:
    """The typed run that `overrides` describe. No `DictConfig` leaves this function."""
    node = compose(overrides)
    check_names(node, overrides)
    values, text = _resolved(node)
    _refuse_nothing(overrides, values)
    hints = fields_of(RunConfig)
    allowed = fit(AllowedPackages, values.get("allow_targets"), "allow_targets", [])
    by_name = [*allowed, *named_by_hand(overrides)]
    plain = {name: fit(hints[name], values.get(name), name) for name in _PLAIN}
    sections = {name: construct(cls, values.get(name), name) for name, cls in _SECTIONS.items()}
    notes = fit(hints["notes"], values.get("notes"), "notes", [])
    return RunConfig(
        **plain,
        **sections,
        teachers=_teachers(values),
        notes=[" ".join(note.split()) for note in notes],
        method=_truncated(construct(Method, values.get("method"), "method", allowed), plain["max_ratio"]),
        prompts=built(hints["prompts"], values.get("prompts"), "prompts", allowed),
        graders=graders_of(values.get("graders"), by_name),
        environments=environments_of(values.get("environments"), by_name),
        evaluation=construct(EvaluationConfig, values.get("evaluation"), "evaluation", allowed),
        text=text,
        overrides=tuple(overrides),
    )


def _refuse_nothing(overrides: Sequence[str], values: Mapping[str, Any]) -> None:
    """An empty mapping is merged into what is there and changes nothing, which is never what was meant."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        here: Any = values
        for name in key.split("."):
            here = here.get(name) if isinstance(here, Mapping) else None
        if value.replace(" ", "") == "{}" and here:
            raise ConfigurationError(
                f"{override} changes nothing, because mappings are merged ({key} has {', '.join(map(str, here))}); "
                f"name its fields ({key}.NAME=...), or take it away with ~{key}"
            )


def _truncated(method: Method, max_ratio: float) -> Method:
    if max_ratio == 0:
        return method
    return replace(method, objective=TruncatedRatio(of=method.objective, max_ratio=max_ratio))


def _teachers(values: Mapping[str, Any]) -> dict[str, TeacherConfig]:
    """All teachers by name, the default first; each is checked against `TeacherConfig`."""
    more = fit(Mapping[str, Any], values.get("teachers") or {}, "teachers", {})
    for name in more:
        if name == DEFAULT or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigurationError(
                f"teachers.{name}: a further teacher needs a name of small letters, digits and _ other than "
                f"{DEFAULT!r} (which is the group `teacher`); rename it"
            )
    teachers = {DEFAULT: construct(TeacherConfig, values.get("teacher"), "teacher")}
    return teachers | {name: construct(TeacherConfig, more[name], f"teachers.{name}") for name in more}
