"""Standing of a run of a sweep: new, stopped, at work in another process, or finished with the same settings."""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.redaction import redacted
from launch.artifacts.run_directory import LATEST, RunDirectory
from launch.artifacts.run_lock import is_over
from launch.artifacts.summary import Outcome, RunSummary
from launch.artifacts.untrusted_files import read_yaml
from launch.artifacts.user_yaml import dotted
from launch.checkpoint.changes import Change, changes
from launch.checkpoint.resume import resumption
from launch.config.run_config import RunConfig
from opd.errors import ConfigurationError


class Standing(Enum):
    """Stage that a run has reached."""

    NEW = "new"
    STOPPED = "goes on"
    ELSEWHERE = "another process is at it"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Standing of a run, and the step that it goes on after (all its steps, if it has finished)."""

    standing: Standing
    step: int = 0

    @property
    def open(self) -> bool:
        """There is something left to train, and no other process is at it."""
        return self.standing in (Standing.NEW, Standing.STOPPED)

    def __str__(self) -> str:
        after = f" after step {self.step}" if self.standing is Standing.STOPPED and self.step else ""
        return f"{self.standing.value}{after}"


def standing(path: Path, config: RunConfig) -> Progress:
    """Standing of the run in `path`.

    Raises:
        ConfigurationError: it has finished with another evaluation.
    """
    if not path.exists():
        return Progress(standing=Standing.NEW)
    if not is_over(path):
        return Progress(standing=Standing.ELSEWHERE, step=config.steps)
    if finished_with(path, config):
        return Progress(standing=Standing.FINISHED, step=config.steps)
    steps = CheckpointStore(path / "checkpoints").steps() if (path / "config.yaml").is_file() else []
    return Progress(standing=Standing.STOPPED, step=steps[0] if steps else 0)


def check_goes_on(path: Path, config: RunConfig, console: Console) -> None:
    """Refuse settings with which a run cannot go on from its checkpoint, before any run is started."""
    now = standing(path, config)
    if now.standing is not Standing.STOPPED:
        return
    if now.step:
        resumption(replace(config, resume=LATEST, dry_run=True), console)
    elif _finished(RunDirectory(path)):
        other = _differing(path, config)[0]
        raise ConfigurationError(
            f"it has finished with {other.name}={other.before}, this command has {other.name}={other.now}, and there "
            "is no checkpoint to go on from; set it back, or choose another run_name=..."
        )


def finished_with(path: Path, config: RunConfig) -> bool:
    """Whether the run has finished with these settings, those apart that change neither training nor what is measured.

    Raises:
        ConfigurationError: it has finished with another evaluation, whose figures would stand in one table with others.
    """
    if not _finished(RunDirectory(path)):
        return False
    found = _differing(path, config)
    other = next((change for change in found if change.name.startswith("evaluation.")), None)
    if other is not None:
        raise ConfigurationError(
            f"it has finished with {other.name}={other.before}, but this command has {other.name}={other.now}, so one "
            "table would have both; set it back, or choose another run_name=..."
        )
    return not found


def _finished(directory: RunDirectory) -> bool:
    return directory.summary.exists() and RunSummary.read(directory.summary).outcome is Outcome.FINISHED


def _differing(path: Path, config: RunConfig) -> list[Change]:
    """Settings of a run that are others now, and change what is trained or measured."""
    before = read_yaml(RunDirectory(path).config, "give this sweep another run_name")
    return [c for c in changes(_flat(before), _flat(redacted(yaml.safe_load(config.text)))) if _matters(c)]


_OURS = ("data", "hydra", "allow_targets", "comparison", "stages")  # in the YAML, and no setting of a run


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names that a checkpoint has, where those say which of them are harmless."""
    flat: dict[str, Any] = {}
    for name, value in dotted(values):
        if name.partition(".")[0] in _OURS:
            continue
        known = f"teachers.default.{name.removeprefix('teacher.')}" if name.startswith("teacher.") else name
        flat |= {f"{known}.{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {known: value}
    return flat


def _matters(change: Change) -> bool:
    return not change.harmless or change.name.startswith(("steps", "stop_after.", "evaluation."))
