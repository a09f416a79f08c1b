"""A run's checkpoints as values: names, order, how long they live, and what a resumed run may change. Pure."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from launch.artifacts.moved import todays, todays_setting
from launch.artifacts.redaction import redacted
from opd.errors import ConfigurationError, DataError

FORMAT = "opd run checkpoint 1"
MANIFEST, STATE, LEARNER = "manifest.json", "state.json", "learner"
LATEST = "latest"

HARMLESS = (
    # What a run is called, where it runs, how long, and what is recorded of it.
    *("run_name", "output_dir", "resume", "steps", "notes*", "dry_run", "doctor", "grace_s", "checkpoint_*"),
    *("evaluation.*", "cluster.*", "tracker.*", "trace", "hardware.*", "max_buffer_bytes"),
    # How many processes, how much memory, how long they may take: the same numbers come out.
    *("student.replicas", "student.deadline_s", "student.kv_cache_bytes", "student.gpu_memory_utilization"),
    *("student.max_num_seqs", "student.max_model_len", "student.tensor_parallel", "student.enforce_eager"),
    *("learner.ranks", "learner.zero_stage", "learner.tokens_per_microbatch", "learner.head_chunk"),
    *("learner.gradient_checkpointing", "learner.sentinel_tolerance", "learner.deadline_s", "learner.overlap_k"),
    *(
        "learner.publish_chunk_bytes",
        "learner.transport",
        "learner.max_skipped_steps",
        "learner.deterministic",
        "learner.loss_kernel",
        "learner.device",
        "student.device",
    ),
    # Where a teacher stands; that it is the same one, its fingerprint says.
    *(f"teachers.*.{name}" for name in ("path", "backend", "device", "replicas", "max_batch_tokens", "head_chunk")),
    *(f"teachers.*.{name}" for name in ("max_k", "deadline_s", "max_model_len", "kv_cache_bytes", "url", "model")),
    *(f"teachers.*.{name}" for name in ("gpu_memory_utilization", "fingerprint", "connect_s", "read_s", "retries")),
    *(f"teachers.*.{name}" for name in ("backoff_s", "max_consecutive_failures")),
)
"""Settings that a resumed run may change; every other one decides what is trained."""

GRADERS: Mapping[str, Any] = {
    "graders.shop": "launch.inputs.graders.ShopGrader",
    "graders.peak": "launch.inputs.graders.PeakGrader",
    "graders.math": "launch.inputs.graders.MathGrader",
    "graders.math.deadline_s": 5.0,
}
"""What every run had before graders were settings."""

_NAME = re.compile(r"step_(\d+)")
_STRAY = re.compile(r"\.(step_\d+)\.(partial|old)")


def name_of(step: int) -> str:
    """The folder of a checkpoint. Example: `step_40`."""
    return f"step_{step}"


def newest_first(names: Iterable[str]) -> list[int]:
    """Steps of those names that are checkpoints; leftovers of a crash and strangers are none."""
    return sorted((int(found[1]) for name in names if (found := _NAME.fullmatch(name))), reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """What a crash left in the folder: `remove` these, and rename these `back` (name now, name then)."""

    remove: Sequence[str]
    back: Sequence[tuple[str, str]]


def leftovers(names: Iterable[str]) -> Leftovers:
    """A `.partial` was never a checkpoint. An `.old` is a whole one that was about to be replaced: if the new one did
    not get its name, the old one gets it back."""
    present = set(names)
    strays = {name: found for name in sorted(present) if (found := _STRAY.fullmatch(name))}
    back = [(name, found[1]) for name, found in strays.items() if found[2] == "old" and found[1] not in present]
    return Leftovers(remove=[name for name in strays if name not in dict(back)], back=back)


def expired(steps: Iterable[int], keep: int, keep_every: int) -> list[int]:
    """Steps whose checkpoints go: all but the newest `keep` and the multiples of `keep_every` (0: no such)."""
    newest = sorted(steps, reverse=True)
    return [step for step in newest[keep:] if not (keep_every and step % keep_every == 0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """What a run knows after `step` beside the weights.

    `ledger` is what `Ledger.to_json` wrote, `totals` the last line of metrics that a `Meter` goes on from,
    `wall_s` the seconds up to here, `teachers` the digests of what it reads (teachers' weights by their names,
    other inputs by their settings), `config` the resolved settings as `described` gives them, `followers` the files of
    teachers that follow the student, by name.
    """

    run_name: str
    step: int
    ledger: str
    totals: Mapping[str, float]
    wall_s: float
    teachers: Mapping[str, str]
    config: Mapping[str, Any]
    followers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A plain mapping."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DriverState":
        """The inverse of `as_json`. Raises `DataError` if it is something else."""
        try:
            state = cls(**values)
        except TypeError as error:
            raise DataError(
                f"{STATE} is of another version of this program ({error}); take another checkpoint"
            ) from error
        wrong = [name for name, fits in state._fit().items() if not fits]
        if wrong:
            raise DataError(f"{STATE} has a {wrong[0]} of another kind than a run writes; take another checkpoint")
        return state

    def _fit(self) -> dict[str, bool]:
        """Is each field of the type that it is declared to be?"""
        return {
            "run_name": isinstance(self.run_name, str),
            "step": type(self.step) is int and self.step >= 0,
            "ledger": isinstance(self.ledger, str),
            "totals": _maps(self.totals, int | float) and all(map(_finite, self.totals.values())),
            "wall_s": isinstance(self.wall_s, int | float) and _finite(self.wall_s) and self.wall_s >= 0,
            "teachers": _maps(self.teachers, str),
            "config": _maps(self.config, object),
            "followers": _maps(self.followers, str),
        }


def _finite(value: float) -> bool:
    return -1e300 < value < 1e300  # whole numbers may be too large for a float


def _maps(value: Any, kind: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def described(value: Any, where: str = "") -> dict[str, Any]:
    """A configuration object with all its defaults as dotted names and plain values, secrets replaced.

    Example: `described(LearnerConfig(), "learner")["learner.dtype"] == "BFLOAT16"`.
    """
    flat: dict[str, Any] = {}
    _describe(redacted(_plain(value)), where, flat)
    return flat


def _plain(value: Any) -> Any:
    """Dataclasses become mappings that also name their class."""
    match value:
        case Enum():
            return value.name
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init and f.repr}
        return {"": f"{type(value).__module__}.{type(value).__qualname__}"} | own
    return repr(value)


def _describe(value: Any, where: str, flat: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _describe(item, f"{where}.{key}".strip("."), flat)
    elif isinstance(value, list):
        flat[f"{where}.length".strip(".")] = len(value)
        for i, item in enumerate(value):
            _describe(item, f"{where}.{i}".strip("."), flat)
    else:
        flat[where] = value


def in_todays_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `described` settings of a checkpoint by the names of today: settings, classes, and an old schedule's shape.

    What had no `learner.decay_steps` fell through the warm-up: LINEAR was WARMUP_TIMES_LINEAR, CONSTANT the same with
    a floor of 1. The old COSINE has no name. What had no `graders` had those of the program.
    """
    config = {todays_setting(name): todays(v) if isinstance(v, str) else v for name, v in config.items()}
    if not any(name.startswith("graders.") for name in config):
        config = {**config, **GRADERS}
    if "learner.decay_steps" in config or "learner.schedule" not in config:
        return config
    flat = {"learner.final_lr_fraction": 1.0} if config["learner.schedule"] == "CONSTANT" else {}
    old = {"CONSTANT": "WARMUP_TIMES_LINEAR", "LINEAR": "WARMUP_TIMES_LINEAR", "COSINE": "an older COSINE"}
    name = old.get(config["learner.schedule"], config["learner.schedule"])
    return {**config, "learner.schedule": name, "learner.decay_steps": 0, **flat}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that is not what it was; None = it was, or is, not there."""

    name: str
    before: Any
    now: Any

    @property
    def harmless(self) -> bool:
        """The same training comes out."""
        return any(fnmatchcase(self.name, pattern) for pattern in HARMLESS)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs between two `described` configurations."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        Change(name=name, before=before.get(name), now=now.get(name))
        for name in names
        if before.get(name) != now.get(name)
    ]


def check_changes(place: str, found: Sequence[Change]) -> None:
    """Refuse to go on with settings that would train something else."""
    wrong = [change for change in found if not change.harmless]
    if wrong:
        first, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigurationError(
            f"the checkpoint {place} was made with {first.name}={first.before}, but this run has "
            f"{first.name}={first.now}{more}, which would train something else; set it back, or start a new run from "
            "the export"
        )


def check_inputs(place: str, before: Mapping[str, str], now: Mapping[str, str], found: Sequence[Change]) -> None:
    """Refuse another teacher, student or prompt file: what each is, its digest says ("" = it is not here), and not
    its path. Held-out prompts may be exchanged on purpose, by another path (see `HARMLESS`).
    """
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if "." not in name:
            raise ConfigurationError(
                f"the checkpoint {place} was made with teacher {name!r} of fingerprint {was or 'none'}, but this run's "
                f"has {is_now or 'none'}; give the teacher that taught until then, or start a new run from the export"
            )
        exchanged = any(change.name == name and change.harmless for change in found)
        if was and is_now and not exchanged:  # an older checkpoint knows none, and then the path must be the same
            raise ConfigurationError(
                f"the checkpoint {place} was made with another content of {name} (digest {was}) than this run's "
                f"({is_now}), which would train or measure something else; give what was read until then, or start a "
                "new run from the export"
            )


def check_steps(place: str, step: int, steps: int) -> None:
    """Refuse a run that would end before it begins."""
    if steps < step:
        raise ConfigurationError(
            f"the checkpoint {place} is of step {step}, but steps={steps}; raise steps, or resume from an earlier one"
        )
