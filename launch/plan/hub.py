"""Names on the hub that stand in a run's settings: fetched by the driver before anything is planned or started.

Everything below reads folders; the names, with the exact commits, are kept for the plan, the run directory and the
command that repeats the run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hf.hub.cache import Snapshot
from hf.hub.client import snapshot
from hf.hub.data import fetch_data
from hf.hub.failures import get_token
from hf.hub.ids import HubId, Kind, hub_id
from hf.hub.models import Fetched, Weights, fetch_model
from launch.artifacts.evaluation_point import MAIN
from launch.artifacts.redaction import remember
from launch.artifacts.run_directory import write_json
from launch.config.run_config import RunConfig, teacher_key
from launch.config.settings import EvaluationConfig, place_of
from launch.inputs.prompt_paths import COMPRESSED, ENDINGS, endings
from launch.plan.checks.devices import writers_here
from launch.plan.fetching import Progress
from opd.errors import ConfigurationError, DataError
from opd.ports import Elsewhere, LastHidden, Listed
from teacher_service.config import REMOTE, TeacherConfig

RECORD = "hub.json"  # of a run directory: what its names were


@dataclass(frozen=True, slots=True, kw_only=True)
class HubInput:
    """A setting whose value is a name on the hub: as it was `asked` for, and as it is `pinned` to a commit.

    Example: `HubInput(setting="student.path", asked="Qwen/Qwen3-0.6B", pinned="Qwen/Qwen3-0.6B@c1899de2...")`.
    """

    setting: str
    asked: str
    pinned: str
    size: int = 0
    headers: bool = False
    offline: bool = False

    def __str__(self) -> str:
        how = ", headers alone" if self.headers else ", from the cache" if self.offline else ""
        return f"{self.pinned} ({self.size / 1e6:.1f} MB{how})"


def sized(inputs: Sequence[HubInput], setting: str, params: int) -> str:
    """A model for a report: its exact name, if it has one on the hub, and its size."""
    name = next((f"{one.pinned}, " for one in inputs if one.setting == setting), "")
    return f"{name}{params / 1e6:.2f}M parameters"


def localized(config: RunConfig) -> tuple[RunConfig, tuple[HubInput, ...]]:
    """`config` with a folder in the place of every name on the hub, and what those names were.

    A run that goes on, or lies beside others of one comparison, takes the commits that were recorded there.

    Raises:
        ConfigurationError: a name is wrong, not open to this user, or another commit than this run began with.
        OpdError: fetching failed.
    """
    names = dict(_names(config))
    if not names:
        return config, ()
    hide_token()
    recorded = _recorded(config)
    pinned = {key: _as_recorded(key, name, recorded) for key, name in names.items()}
    got = {key: _fetched(key, name, _weights(config, key)) for key, name in pinned.items()}
    for key, one in got.items():
        _check_recorded(key, names[key], one, recorded)
    inputs = tuple(
        HubInput(
            setting=key,
            asked=str(names[key]),
            pinned=str(one.name),
            size=one.size,
            headers=one.headers,
            offline=one.offline,
        )
        for key, one in got.items()
    )
    return _placed(config, got, inputs), inputs


def local_model(key: str, text: str, weights: Weights = Weights.WHOLE) -> tuple[str, str]:
    """A folder for the value of the setting `key`, and its exact name on the hub; a path stays, without a name."""
    name = hub_id(Kind.MODEL, text)
    if name is None:
        return text, ""
    hide_token()
    got = _fetched(key, name, weights)
    return str(got.folder), str(got.name)


def local_teacher(config: TeacherConfig) -> tuple[TeacherConfig, str]:
    """A teacher that is served here, with its weights here, and its exact name on the hub."""
    folder, name = local_model("teacher.path", config.path)
    return replace(config, path=folder), name or config.path


def hide_token() -> None:
    """A token that `hf auth login` stored is in no variable, so that nothing else would know it for a secret."""
    if token := get_token():
        remember({"hf_token": token})


# --- which settings are names ---------------------------------------------------------------------------------------


def _names(config: RunConfig) -> Iterator[tuple[str, HubId]]:
    models = {"student.path": config.student.path} | {model_key(n): t.path for n, t in config.teachers.items()}
    files = {}
    for place, source in (("prompts", config.prompts), *config.evaluation.sources.items()):
        files |= source.files(place) if isinstance(source, Listed) and isinstance(source, Elsewhere) else {}
    # a file's name that does not exist here is a mistyped path, and no data set of that name
    files = {key: text for key, text in files.items() if endings(Path(text))[0] not in ENDINGS}
    for kind, texts in ((Kind.MODEL, models), (Kind.DATA, files)):
        for key, text in texts.items():
            if (name := hub_id(kind, text)) is not None:
                yield key, name


def model_key(teacher: str) -> str:
    """Setting with the path of a teacher."""
    return f"{teacher_key(teacher)}.path"


def _weights(config: RunConfig, key: str) -> Weights:
    """Part of a model's weights that is read here."""
    for name, teacher in config.teachers.items():
        elsewhere = teacher.backend in REMOTE and LastHidden not in config.method.requires
        if key == model_key(name) and elsewhere and name not in writers_here(config):
            return Weights.NONE
    return Weights.HEADERS if config.dry_run and not config.resume else Weights.WHOLE


@cache
def _snapshot(name: HubId, key: str) -> Snapshot:
    """Cached, so that all runs of one command see the same commit of a branch that moves meanwhile."""
    return snapshot(name, key)


def forget() -> None:
    """Clear all snapshots that this process remembers."""
    _snapshot.cache_clear()


def _fetched(key: str, name: HubId, weights: Weights) -> Fetched:
    known = _snapshot(name, key)
    with Progress() as progress:
        if name.kind is Kind.MODEL:
            return fetch_model(known, weights, progress.announce)
        return fetch_data(known, [*ENDINGS, *COMPRESSED], progress.announce)


def _placed(config: RunConfig, got: Mapping[str, Fetched], inputs: Sequence[HubInput]) -> RunConfig:
    """`config` that reads the folders; its text and its overrides have the exact names."""
    folders = {key: str(one.folder) for key, one in got.items()}
    data = {key: (str(got[key].name), folders[key]) for key in got if got[key].name.kind is Kind.DATA}
    text = yaml.safe_load(config.text)
    for one in inputs:
        _set(text, one.setting, one.pinned)
    keys = {one.setting for one in inputs}
    kept = [o for o in config.overrides if o.partition("=")[0].lstrip("+") not in keys]
    teachers = {n: replace(t, path=folders.get(model_key(n), t.path)) for n, t in config.teachers.items()}
    return replace(
        config,
        student=replace(config.student, path=folders.get("student.path", config.student.path)),
        teachers=teachers,
        prompts=_moved(config.prompts, "prompts", data),
        evaluation=_moved_sets(config.evaluation, data),
        text=yaml.safe_dump(text, sort_keys=False, allow_unicode=True),
        overrides=(*kept, *(f"{one.setting}={one.pinned}" for one in inputs)),
    )


def _moved(source: Any, place: str, data: Mapping[str, tuple[str, str]]) -> Any:
    return source.found_at(place, data) if isinstance(source, Elsewhere) else source


def _moved_sets(config: EvaluationConfig, data: Mapping[str, tuple[str, str]]) -> EvaluationConfig:
    sets = {name: replace(one, prompts=_moved(one.prompts, place_of(name), data)) for name, one in config.sets.items()}
    return replace(config, prompts=_moved(config.prompts, place_of(MAIN), data), sets=sets)


def _set(values: Any, key: str, value: str) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values[name]
    values[last] = value


# --- what was recorded ----------------------------------------------------------------------------------------------


def record(folder: Path, inputs: Sequence[HubInput]) -> None:
    """Store in a run directory which names its settings had, for runs that go on from it."""
    if inputs:
        write_json(folder / RECORD, {one.setting: {"asked": one.asked, "pinned": one.pinned} for one in inputs})


def recorded_in(folder: Path) -> Mapping[str, HubInput]:
    """Inputs that `record` stored in `folder`, by setting; none where no name was on the hub.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {
            str(key): HubInput(setting=str(key), asked=str(one["asked"]), pinned=str(one["pinned"]))
            for key, one in values.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}); put it back, or start a new run") from error


def _recorded(config: RunConfig) -> Mapping[str, HubInput]:
    """Commits of the run that is gone on with, or of the comparison or staged run that this one belongs to."""
    whole = Path(config.output_dir)
    of_checkpoint = list(Path(config.resume).parents)[1:2]  # RUN/checkpoints/step_40
    places = [whole, *([whole / config.run_name] if config.run_name else []), *of_checkpoint]
    return {key: one for place in places for key, one in recorded_in(place).items()}


def _as_recorded(key: str, name: HubId, recorded: Mapping[str, HubInput]) -> HubId:
    """The name at the recorded commit, where the same was requested as then, or no revision."""
    before = recorded.get(key)
    if before is None:
        return name
    pinned, asked = _parsed(name.kind, before.pinned), _parsed(name.kind, before.asked)
    unsaid = not name.revision and (name.same_content(pinned) or name.same_content(asked))
    return pinned if unsaid or name == asked else name


def _check_recorded(key: str, asked: HubId, got: Fetched, recorded: Mapping[str, HubInput]) -> None:
    before = recorded.get(key)
    if before is None:
        return
    pinned = _parsed(asked.kind, before.pinned)
    if pinned.same_content(got.name) and pinned.revision != got.name.revision:
        raise ConfigurationError(
            f"{key}={asked} is commit {got.name.revision}, but the run was begun with {before.pinned}; write that, or "
            "start a new run"
        )


def _parsed(kind: Kind, text: str) -> HubId:
    """A recorded name, whether or not a folder of that name has been made since."""
    base, _, revision = text.partition("@")
    repo, _, rest = base.partition(":")
    config, _, split = rest.partition(":")
    return HubId(kind=kind, repo=repo, config=config, split=split, revision=revision)


def remarks(config: RunConfig, inputs: Sequence[HubInput]) -> list[str]:
    """Sentences of the plan: what the cache answered, and what other nodes of a cluster do not see."""
    notes = [
        f"note: {one.setting} is what the cache knows as {one.asked}; the hub was not asked"
        for one in inputs
        if one.offline
    ]
    if config.cluster.address == "local":
        return notes
    paths = {"student.path": config.student.path} | {model_key(n): t.path for n, t in config.teachers.items()}
    named = ", ".join(key for key in paths)
    home = "; HF_HOME on a shared file system puts the cache there" if inputs else ""
    return [
        *notes,
        f"note: actors on other nodes of the cluster read {named} under the same paths as this driver ("
        f"{', '.join(dict.fromkeys(map(str, paths.values())))}), which they find only on a shared file system, or "
        f"where the same folders were copied to every node{home}",
    ]
