"""Options that begin with a dash, as users of Hydra and argparse write them, and their equivalent here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config.aliases import ALIASES
from launch.config.shipped_files import groups
from opd.errors import ConfigurationError

_HELP = ("-h", "--help", "--hydra-help")
_SWEEP = "runs side by side are a comparison; opd compare methods=[A,B] sweeps learner.lr alike for all"
_LEAD = {
    "--multirun": _SWEEP,
    "-m": _SWEEP,
    "--run": "a command runs by itself; leave it out",
    "--resolve": "--cfg job prints the resolved configuration; leave it out",
    "--package": "--cfg job prints the whole configuration; opd train --help WORD shows a part",
    "-p": "--cfg job prints the whole configuration; opd train --help WORD shows a part",
    "--info": "--cfg job prints the configuration and dry_run=true the plan",
    "-i": "--cfg job prints the configuration and dry_run=true the plan",
    "--shell-completion": "there is no completion; opd train --help WORD searches the settings",
}
_RENAMED = {"--config-dir": "conf", "-cd": "conf", "--config-path": "conf", "-cp": "conf"} | {
    "--config-name": "experiment",
    "-cn": "experiment",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Parsed flags of a command: `words` to explain (with `helps`), or a request for the configuration (`shows`)."""

    helps: bool = False
    words: Sequence[str] = ()
    shows: bool = False
    rest: Sequence[str] = ()


def read_flags(arguments: Sequence[str]) -> Flags:
    """Separates flags from overrides. Raises `ConfigurationError` with the override to write for an unknown flag.

    Example: `read_flags(["--help", "lr"])` is `Flags(helps=True, words=["lr"])`.
    """
    if any(argument.partition("=")[0] in _HELP for argument in arguments):
        words = [a.partition("=")[2] if a.startswith("--help=") else a for a in arguments]
        words = [w for w in words if w and not w.startswith("-")]
        topics = [w for w in words if "=" not in w]
        return Flags(helps=True, words=topics, rest=[w for w in words if "=" in w])
    rest: list[str] = []
    shows = False
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            rest.append(argument)
            continue
        if not equals and waiting and not waiting[0].startswith("-") and "=" not in waiting[0]:
            value = waiting.pop(0)
        if name in ("--cfg", "-c"):
            shows = True
            _known_view(value)
        else:
            raise ConfigurationError(_lead(name, value))
    return Flags(shows=shows, rest=rest)


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
    if value not in ("job", "all", "hydra"):
        raise ConfigurationError(f"--cfg {value or '(nothing)'} is no view of the configuration; write --cfg job")


def _lead(name: str, value: str) -> str:
    if name in _LEAD:
        return f"there is no option {name}: {_LEAD[name]}"
    plain = name.lstrip("-").replace("-", "_")
    key = _RENAMED.get(name) or ALIASES.get(plain, plain).rstrip("=")
    return f"there is no option {name}: settings are written KEY=VALUE; write {key}={value or '...'}"
