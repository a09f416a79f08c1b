"""From a composed configuration to typed objects; with `launch.config.composition.compose` all that knows OmegaConf.

`run_config` is the only way to a run, and no node leaves it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.config import StudentConfig
from launch.artifacts.redaction import check_logins, remember
from launch.artifacts.run_directory import decided
from launch.config.best_by import check_best
from launch.config.budget import StopAfter
from launch.config.composition.compose import compose, first_line
from launch.config.composition.keys import check_names
from launch.config.row_functions import check_row_functions
from launch.config.settings import ClusterConfig, EvaluationConfig, HardwareConfig
from launch.config.shipped_files import shipped
from launch.config.task_parts import BY_TASK, environments_of, graders_of, named_by_hand
from launch.config.tracker import TrackerConfig
from launch.config.typed import AllowedPackages, built, construct
from learner.config import LearnerConfig
from opd.errors import ConfigurationError
from opd.loop.staleness import StalenessSchedule, WeightUpdate
from opd.method.method import Method, check_prompts
from opd.objectives.truncated import TruncatedRatio
from opd.ports import PromptSource
from opd.settings.ranges import HARMLESS, Bytes, Count, Every, In, Line, Names, RunName, Seed, Steps, Tokens
from opd.settings.validation import default_of, fields_of, fit, parts_of, settings
from teacher_service.config import TeacherConfig

DEFAULT = "default"  # the teacher of prompts that name none


def teacher_key(name: str) -> str:
    """Dotted key of the settings of teacher `name`. Example: `teachers.judge`."""
    return "teacher" if name == DEFAULT else f"teachers.{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class RunConfig:
    """A whole run, typed; `text` is the resolved YAML it came from, `overrides` the ones that led to it, as given.

    `teachers` has them by name: `default` is the group `teacher`, the others stand under `teachers` in the YAML
    (`teachers.NAME.path=...`). Their order numbers the output matrices (`HiddenScores.head`). `graders` and
    `environments` are parts by the name that `prompts.task` has (`launch.config.task_parts`).
    """

    run_name: Annotated[RunName, HARMLESS]
    output_dir: Annotated[Names, HARMLESS]
    seed: Seed
    steps: Annotated[Steps, HARMLESS]
    stop_after: Annotated[StopAfter, HARMLESS]
    max_tokens: Tokens
    max_staleness: Annotated[int, In(0, 1_000_000, because="0: strictly on-policy")]
    max_ratio: Annotated[float, In(1, 1e6, or_zero=True, because="0 leaves importance ratios as they are")]
    weight_update: WeightUpdate
    deterministic: bool
    max_buffer_bytes: Annotated[Bytes, HARMLESS]
    checkpoint_every: Annotated[Every, HARMLESS]
    checkpoint_minutes: Annotated[float, In(0, 7 * 24 * 60.0, because="0 saves by steps only"), HARMLESS]
    checkpoint_keep: Annotated[Count, HARMLESS]
    checkpoint_keep_every: Annotated[Every, HARMLESS]
    checkpoint_best: Annotated[Line, HARMLESS]
    grace_s: Annotated[float, In(0, 24 * 3600.0), HARMLESS]
    resume: Annotated[Line, HARMLESS]
    resume_changes: Annotated[Sequence[Names], HARMLESS]
    doctor: Annotated[bool, HARMLESS]
    doctor_everything: bool
    trace: Annotated[bool, HARMLESS]
    dry_run: Annotated[bool, HARMLESS]
    notes: Annotated[Sequence[str], HARMLESS] = ()
    method: Method
    prompts: PromptSource
    graders: Mapping[str, object]
    environments: Mapping[str, object]
    student: StudentConfig
    teachers: Mapping[str, TeacherConfig]
    learner: LearnerConfig
    evaluation: Annotated[EvaluationConfig, HARMLESS]
    cluster: Annotated[ClusterConfig, HARMLESS]
    hardware: Annotated[HardwareConfig, HARMLESS]
    tracker: Annotated[TrackerConfig, HARMLESS]
    text: str = field(repr=False)
    overrides: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        _ = self.staleness_schedule
        check_prompts(self.method, self.prompts)
        check_best(self.checkpoint_best, self.evaluation)

    @property
    def staleness_schedule(self) -> StalenessSchedule:
        """Staleness schedule of the run. Raises `ConfigurationError` where it makes no sense."""
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
    if values.get("stages"):
        raise ConfigurationError(
            f"these are the settings of a run with stages ({', '.join(values['stages'])}), which opd train alone runs; "
            "add stages=null for those that all of them share, or name the stage's own settings beside it"
        )
    allowed = fit(AllowedPackages, values.get("allow_targets"), "allow_targets", [])
    check_row_functions({"prompts": values.get("prompts"), "evaluation": values.get("evaluation")}, allowed, overrides)
    given, by_name = _settings(values, allowed), [*allowed, *named_by_hand(overrides)]
    return RunConfig(
        **given
        | {
            "teachers": _teachers(values),
            "notes": [" ".join(note.split()) for note in given["notes"]],
            "resume": decided(given["resume"], given["output_dir"], given["run_name"]),
            "method": _truncated(given["method"], given["max_ratio"]),
            "graders": graders_of(values.get("graders"), by_name),
            "environments": environments_of(values.get("environments"), by_name),
        },
        text=text,
        overrides=tuple(overrides),
    )


_BY_NAME = {"teachers", *BY_TASK}


def _settings(values: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """The fields of `RunConfig` that stand in the YAML under their own names: plain values first, then groups, parts.

    What is built by name does not (one teacher is under `teacher`), and what is not shown says where the run came from.
    """
    hints = fields_of(RunConfig)
    own = {f.name: default_of(f) for f in dataclasses.fields(RunConfig) if f.repr and f.name not in _BY_NAME}
    own = {name: (_shipped().get(name) or one) if one is dataclasses.MISSING else one for name, one in own.items()}
    kinds = {name: parts_of(hints[name])[0] for name in own}
    groups = {name: cls for name, cls in kinds.items() if isinstance(cls, type) and dataclasses.is_dataclass(cls)}
    parts = [name for name, kind in kinds.items() if getattr(kind, "_is_protocol", False)]
    plain = [name for name in own if name not in groups and name not in parts]
    return {
        **{name: fit(hints[name], values.get(name), name, own[name]) for name in plain},
        **{name: construct(cls, values.get(name), name, allowed) for name, cls in groups.items()},
        **{name: built(hints[name], values.get(name), name, allowed) for name in parts},
    }


@cache
def _shipped() -> Mapping[str, Any]:
    """The values in `conf/config.yaml`, which an error proposes."""
    return yaml.safe_load((shipped("conf") / "config.yaml").read_text(encoding="utf-8"))


def _refuse_nothing(overrides: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse an empty mapping: it would be merged into the existing one and change nothing."""
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
    """The method with the importance ratios of all its terms bounded; refuses a method in which no term has any."""
    if max_ratio == 0:
        return method
    terms = {
        name: replace(term, objective=TruncatedRatio(of=term.objective, max_ratio=max_ratio))
        for name, term in method.terms.items()
        if getattr(term.objective, "on_policy", False)
    }
    if terms and not getattr(method.objective, "on_policy", False):
        return replace(method, terms={**method.terms, **terms})
    main = TruncatedRatio(of=method.objective, max_ratio=max_ratio)
    return replace(method, objective=main, terms={**method.terms, **terms})


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


def single_settings(node: DictConfig, *names: str) -> dict[str, Any]:
    """Values of some settings of a composed configuration, checked, before a whole run is made of it."""
    hints = fields_of(RunConfig)
    return {name: fit(hints[name], node[name], name) for name in names}
