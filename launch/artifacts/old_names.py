"""Old dotted paths and setting names in configurations and checkpoints, and their current names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opd.errors import ConfigurationError

MODULES = {
    "opd.divergences.": "opd.method.promises.",
    "opd.packing.": "opd.loss.packing.",
    "opd.pipeline.": "opd.loop.staleness.",
    "opd.prompts.peak.": "demos.prompts.peak.",
    "opd.prompts.shop.": "demos.prompts.shop.",
    "opd.weights.length.": "opd.token_weights.length.",
    "opd.weights.special.": "opd.token_weights.special_tokens.",
    "opd.weights.teachers.": "opd.token_weights.teachers.",
    "launch.config.": "launch.config.run_config.",
    "launch.settings.": "launch.config.settings.",
    "launch.tracking.": "launch.config.tracker.",
}
"""Module of a class before -> now; both end in a dot."""

CLASSES = {
    "opd.loop.staleness.Pipeline": "opd.loop.staleness.StalenessSchedule",
    "opd.objectives.shaped.Clip": "opd.method.shapes.Clip",
    "opd.objectives.shaped.ProximalTeacher": "opd.method.shapes.ProximalTeacher",
    "opd.objectives.shaped.SignLog": "opd.method.shapes.SignLog",
    "opd.scorers.teacher.WrittenTokens": "opd.scorers.teacher.SampledTokens",
}
"""Class before, in the module of today -> now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class General:
    """General class that stands for a special one of before, with the fields that make it so, as in a YAML.

    `defaults` are of fields that may be set beside an old name: what they were there when left out.
    """

    path: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _divergence(path: str, kl: str, **fields: str) -> General:
    return General(path=path, fields={"of": {"_target_": f"opd.objectives.vocabulary.{kl}"}, **fields})


_TOPK, _SUPPORT = "opd.objectives.topk.TopKDivergence", "opd.objectives.support.SupportDivergence"
_SAMPLED = "opd.objectives.estimators.SampledDivergence"
SPECIAL: Mapping[str, General] = {
    "opd.objectives.topk.HeadTailReverseKL": _divergence("opd.objectives.topk.HeadTailDivergence", "FullReverseKL"),
    "opd.objectives.topk.TailBucketReverseKL": _divergence(_TOPK, "FullReverseKL", outside="BUCKET"),
    "opd.objectives.topk.TailBucketForwardKL": _divergence(_TOPK, "FullForwardKL", outside="BUCKET"),
    "opd.objectives.topk.RenormalizedReverseKL": _divergence(_TOPK, "FullReverseKL", outside="RENORMALIZED"),
    "opd.objectives.topk.RenormalizedForwardKL": _divergence(_TOPK, "FullForwardKL", outside="RENORMALIZED"),
    "opd.objectives.topk.StopGradientReverseKL": _divergence(_TOPK, "FullReverseKL", outside="NOTHING"),
    "opd.objectives.support.SupportReverseKL": General(
        path=_SUPPORT,
        fields=_divergence(_SUPPORT, "FullReverseKL").fields,
        defaults={"outside": "RENORMALIZED"},
    ),
    "opd.objectives.estimators.BaselinedReverseKL": _divergence(_SAMPLED, "FullReverseKL", baseline="VOCABULARY"),
    "opd.objectives.estimators.TopKBaselinedReverseKL": _divergence(_SAMPLED, "FullReverseKL", baseline="TOPK"),
}
"""Special class before -> now."""

SETTINGS = {
    "journal_bytes": "replay_log_bytes",
    "strikes": "max_consecutive_failures",
}
"""Last part of a setting's dotted name before -> now."""


def todays(path: str) -> str:
    """Current dotted path of a class. Example: `opd.weights.special.SkipFirst`."""
    now = renamed(path)
    return SPECIAL[now].path if now in SPECIAL else now


def renamed(path: str) -> str:
    """Current dotted path of a class that has moved; of a special one it is that of before."""
    module, dot, name = path.rpartition(".")
    moved = MODULES.get(module + dot, module + dot) + name
    return CLASSES.get(moved, moved)


def todays_part(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`values` of a part (`_target_` and fields), with the fields that its `_target_` of before stood for.

    Raises:
        ConfigurationError: a field says the opposite of the old name.
    """
    target = values["_target_"]
    special = SPECIAL.get(renamed(target)) if isinstance(target, str) else None
    if special is None:
        return values
    for name, value in special.fields.items():
        if name in values and values[name] != value:
            raise ConfigurationError(
                f"{where}._target_ {target!r} is {special.path} with {_shown(special.fields)} now, but {where}.{name} "
                f"is {_shown(values[name])}; name {special.path} and set its fields"
            )
    return {**special.defaults, **values, **special.fields, "_target_": special.path}


def _shown(value: Any) -> str:
    """A value on one line, as in YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shown(inner)}" for name, inner in value.items()) + "}"
    return str(value)


def todays_parts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same for the `described` settings of a checkpoint, where a part's name has the path of its class."""
    found = dict(config)
    for name, value in config.items():
        special = SPECIAL.get(value) if isinstance(value, str) else None
        if special is not None:
            found |= {name: special.path, **dict(_flat(special.fields, name))}
            found |= {key: v for key, v in _flat(special.defaults, name) if key not in config}
    return found


def _flat(fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        yield f"{where}.{name}", value["_target_"] if isinstance(value, Mapping) else value


def todays_setting(name: str) -> str:
    """Current dotted name of a setting. Example: `cluster.journal_bytes` is `cluster.replay_log_bytes`."""
    place, dot, last = name.rpartition(".")
    return place + dot + SETTINGS.get(last, last)
