"""Stages of one run, each from the student that the one before left: what a YAML and a command say about them.

`stages` in an experiment's YAML has each stage's overrides by its name, in order; `stages.NAME.KEY=VALUE` on the
command line sets one setting of one stage, and without `stages` in a YAML its names are the stages.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from omegaconf import DictConfig, OmegaConf

from launch.config.composition.keys import nearest
from opd.errors import ConfigurationError
from opd.settings.ranges import Length, Line, RunName
from opd.settings.validation import fit

_SETTING = re.compile(r"\+*stages\.([^.=]+)\.(.+)", re.DOTALL)
OF_THE_RUN = ("run_name", "output_dir", "resume", "dry_run", "stages", "comparison")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: its place in the run, counted from 1, its name, and its own overrides.

    Example: `Stage(number=1, name="cold_start", overrides=("method=cold_start", "steps=40"))`, folder `1-cold_start`.
    """

    number: int
    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of its directory inside the run's."""
        return f"{self.number}-{self.name}"


def without_stages(overrides: Sequence[str]) -> list[str]:
    """The overrides that all stages share: all but `stages.NAME.KEY=VALUE`."""
    return [override for override in overrides if not _SETTING.fullmatch(override)]


def stages_of(node: DictConfig, overrides: Sequence[str]) -> tuple[Stage, ...]:
    """The stages that a composed configuration and the command's overrides describe; none for a run of one piece.

    Raises:
        ConfigurationError: a name or a list of overrides is wrong, or a setting is given twice for one stage.
    """
    given = OmegaConf.to_container(node.stages, resolve=False) if node.get("stages") is not None else {}
    listed = fit(Mapping[str, Annotated[Sequence[Line], Length(1)]], given, "stages")
    asked = _asked(overrides)
    if not listed and not asked:
        return ()
    if "comparison" in node:
        raise ConfigurationError("a run is a comparison or has stages, but both were given; leave one of the two out")
    for name in [*listed, *asked]:
        fit(RunName, name, "the name of a stage")
        if listed and name not in listed:
            raise ConfigurationError(f"there is no stage {name!r}; {nearest(name, list(listed))}".rstrip())
    shared = {override_key(override) for override in without_stages(overrides)}
    return tuple(
        Stage(number=number, name=name, overrides=_own(name, listed.get(name, ()), asked.get(name, ()), shared))
        for number, name in enumerate(listed or asked, start=1)
    )


def _asked(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of the command line by the stage that they are of."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        if match := _SETTING.fullmatch(override):
            found.setdefault(match[1], []).append(match[2])
    return found


def _own(name: str, listed: Sequence[str], asked: Sequence[str], shared: set[str]) -> tuple[str, ...]:
    """A stage's overrides, of which those that the command line has win over those of the YAML."""
    replaced = {override_key(override) for override in asked}
    kept = [override for override in listed if override_key(override) not in replaced]
    for override in [*kept, *asked]:
        if (key := override_key(override)) in (*OF_THE_RUN, "experiment", "conf"):
            raise ConfigurationError(f"stage {name} sets {key}, which is the whole run's; leave it out of the stage")
        if "=" not in override:
            raise ConfigurationError(f"stage {name} has {override!r}, which is no KEY=VALUE; correct it")
    if twice := next((override for override in kept if override_key(override) in shared), None):
        key = override_key(twice)
        raise ConfigurationError(
            f"{key}=... was given for all stages, but stage {name} has {twice} of its own; write "
            f"stages.{name}.{key}=..."
        )
    return (*kept, *asked)


def override_key(override: str) -> str:
    """The setting that an override names. Example: that of `++learner.lr=1e-3` is `learner.lr`."""
    return override.lstrip("+~").partition("=")[0]
