"""Options that begin with a dash, as users of Hydra and argparse write them, and their equivalent here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.config.composition.compose import leading
from launch.config.shipped_files import groups
from opd.errors import ConfigurationError

_HELP = ("-h", "--help", "--hydra-help")
_LEAD = {
    "--": "what stands behind it is written without it; leave it out",
    "--run": "a command runs by itself; leave it out",
    "-r": "a command runs by itself; leave it out",
    "--shell-completion": "there is no completion; opd train --help WORD searches the settings",
    "-sc": "there is no completion; opd train --help WORD searches the settings",
}
_RENAMED = {"--config-dir": "conf", "-cd": "conf", "--config-path": "conf", "-cp": "conf"} | {
    "--config-name": "experiment",
    "-cn": "experiment",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Parsed flags of a command: `words` to explain (with `helps`), or a request to show the configuration.

    `shows` asks for the configuration, of which `package` names a part, and `resolved` has interpolations replaced;
    `info` for its sources, by the name of a view ("" is all of them). `sweeps` asks for a run of each combination.
    """

    helps: bool = False
    words: Sequence[str] = ()
    shows: bool = False
    package: str = ""
    resolved: bool = False
    info: str | None = None
    sweeps: bool = False
    rest: Sequence[str] = ()


def file_to_write(command: str, given: str) -> Path:
    """The file of a command's `output=FILE`, looked at before the minutes of work that it is to hold.

    Raises:
        ConfigurationError: it cannot be written.
    """
    file = Path(given)
    why = (
        "is a folder" if file.is_dir()
        else "lies in a folder that does not exist" if not file.parent.is_dir()
        else "" if os.access(file if file.exists() else file.parent, os.W_OK)
        else "may not be written"
    )  # fmt: skip
    if why:
        raise ConfigurationError(f"opd {command} writes a file, but output={given} {why}; name another, or make it")
    return file


def read_flags(arguments: Sequence[str], own: Sequence[str] = ()) -> Flags:
    """Separates flags from overrides. Raises `ConfigurationError` with what to write for an unknown flag.

    `own` are the arguments of the command itself, beside the settings of a run.

    Example: `read_flags(["--help", "lr"])` is `Flags(helps=True, words=["lr"])`.
    """
    if any(argument.partition("=")[0] in _HELP for argument in arguments):
        words = [a.partition("=")[2] if a.startswith("--help=") else a for a in arguments]
        words = [w for w in words if w and not w.startswith("-")]
        topics = [w for w in words if "=" not in w]
        return Flags(helps=True, words=topics, rest=[w for w in words if "=" in w])
    rest: list[str] = []
    flags = Flags()
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            rest.append(argument)
            continue
        takes = name not in _BARE
        if takes and not equals and waiting and not waiting[0].startswith("-") and "=" not in waiting[0]:
            value = waiting.pop(0)
        flags = _with(flags, name, value, own)
    return _consistent(replace(flags, rest=rest))


_BARE = ("-m", "--multirun", "--resolve")  # flags without a value


def _with(flags: Flags, name: str, value: str, own: Sequence[str]) -> Flags:
    """The flags with one more. Raises `ConfigurationError` about one that there is not."""
    match name:
        case "-m" | "--multirun":
            return replace(flags, sweeps=True)
        case "--cfg" | "-c":
            _known_view(value)
            return replace(flags, shows=True)
        case "--package" | "-p":
            return replace(flags, package=value)
        case "--resolve":
            return replace(flags, resolved=True)
        case "--info" | "-i":
            return replace(flags, info=value)
        case _:
            raise ConfigurationError(_lead(name, value, own))


def _consistent(flags: Flags) -> Flags:
    """The flags after a check against each other: as in Hydra, one at most names an action."""
    asked = [name for name, given in _EXCLUSIVE.items() if getattr(flags, name) not in (False, None) and given]
    if len(asked) > 1:
        raise ConfigurationError(f"{' and '.join(_EXCLUSIVE[name] for name in asked)} were given; write one of them")
    if not flags.shows and (flags.package or flags.resolved):
        given = "--package" if flags.package else "--resolve"
        raise ConfigurationError(f"{given} says how --cfg job shows the configuration; write --cfg job beside it")
    return flags


_EXCLUSIVE = {"sweeps": "-m", "shows": "--cfg", "info": "--info"}


def without_methods(arguments: Sequence[str]) -> list[str]:
    """Arguments of `opd compare` with `METHOD.KEY=VALUE` as `KEY=VALUE`, for what looks at keys alone.

    Example: `grpo_token_mean.steps=9` is `steps=9`; there is no secret in it, though the method's name has a token.
    """
    own = next((a.removeprefix("conf=") for a in arguments if a.startswith("conf=")), "")
    methods = groups(own if Path(own).is_dir() else "")["method"]
    plain = []
    for argument in arguments:
        first, _, inner = argument.lstrip("+").partition(".")
        plain.append(inner if first in methods else argument)
    return plain


def _known_view(value: str) -> None:
    if value == "hydra":
        raise ConfigurationError(
            "--cfg hydra is how Hydra would start jobs, which opd does itself; --cfg job shows the run's configuration "
            "and --info where it comes from"
        )
    if value not in ("job", "all"):
        raise ConfigurationError(f"--cfg {value or '(nothing)'} is no view of the configuration; write --cfg job")


def _lead(name: str, value: str, own: Sequence[str]) -> str:
    if name in _LEAD:
        return f"there is no option {name}: {_LEAD[name]}"
    plain = name.lstrip("-").replace("-", "_")
    if key := _RENAMED.get(name):
        return f"there is no option {name}: settings are written KEY=VALUE; write {key}={value or '...'}"
    if plain in own:
        return f"there is no option {name}: it is written without dashes; write {plain}={value or '...'}"
    return f"there is no option {name}: settings are written KEY=VALUE; {leading(plain, value)}"
