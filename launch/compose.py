"""The command line as one configuration: the only place, with `launch.config`, that knows Hydra.

`compose` reads `conf/` and the overrides; every field of a dataclass can be overridden whether or not a YAML file
mentions it. Nothing here imports a part of a run, so a mistyped key is answered at once.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.errors import ConfigurationError

SECTIONS = ("student", "learner", "cluster", "hardware", "tracker")
PLAIN = (
    "run_name",
    "output_dir",
    "seed",
    "steps",
    "max_tokens",
    "max_staleness",
    "max_ratio",
    "weight_update",
    "deterministic",
    "max_buffer_bytes",
    "checkpoint_every",
    "checkpoint_keep",
    "checkpoint_keep_every",
    "grace_s",
    "resume",
    "doctor",
    "doctor_everything",
    "trace",
    "dry_run",
)
ROOT = {
    *SECTIONS,
    *PLAIN,
    "teacher",
    "teachers",
    "notes",
    "method",
    "prompts",
    "evaluation",
    "allow_targets",
    "comparison",
    "data",
}
_HERE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """A folder of the project: beside `launch/` in a checkout, inside it in an installed wheel."""
    for parent in (_HERE.parent, _HERE):
        if (parent / name).is_dir():
            return parent / name
    raise ConfigurationError(f"the folder {name}/ is missing from this installation; reinstall the project")


def groups(own: str = "") -> dict[str, list[str]]:
    """Config groups and their options, e.g. `{"method": ["full_reverse_kl", ...]}`; `own` is a folder of the user's."""
    roots = [_shipped("conf"), *([Path(own)] if own else [])]
    names = sorted({p.name for root in roots for p in root.iterdir() if p.is_dir()})
    return {name: sorted({f.stem for root in roots for f in (root / name).glob("*.yaml")}) for name in names}


def compose(overrides: Sequence[str]) -> DictConfig:
    """Read `conf/config.yaml` with Hydra `overrides`. Raises `ConfigurationError` with the nearest valid name.

    `conf=DIR` among them adds a folder of the user's own, laid out like ours (`DIR/method/NAME.yaml`).
    """
    if not OmegaConf.has_resolver("assets"):
        OmegaConf.register_new_resolver("assets", lambda name: str(_shipped("assets") / name))
    own = next((o.removeprefix("conf=") for o in overrides if o.startswith("conf=")), "")
    if own and not Path(own).is_dir():
        raise ConfigurationError(f"conf={own} is no folder; give one laid out like the project's conf/")
    known = groups(own)
    prepared = [_prepare(override, known) for override in overrides if not override.startswith("conf=")]
    # Hydra reads one folder; a second one can only be named in its search path, which config.yaml takes from here.
    os.environ["OPD_OWN_CONF"] = str(Path(own or _shipped("conf")).resolve())
    try:
        with initialize_config_dir(config_dir=str(_shipped("conf")), version_base="1.3"):
            return hydra_compose("config", overrides=prepared)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(f"the overrides {list(overrides)} do not compose: {first_line(error)}") from error


def _prepare(override: str, known: Mapping[str, Sequence[str]]) -> str:
    """Values may be set whether or not the YAML mentions the key (its dataclass decides); groups are checked."""
    key, equals, value = override.partition("=")
    bare = key.lstrip("+~")
    if not equals and not key.startswith("~"):
        raise ConfigurationError(f"override {override!r} has no value; write {bare}=VALUE")
    if bare in known and value in known[bare]:
        return override
    if bare in known and not value.startswith(("{", "null")):
        raise ConfigurationError(
            f"{bare}={value} does not exist; {nearest(value, known[bare])}(have: {', '.join(known[bare])})"
        )
    root = bare.split(".")[0].split("@")[0]
    if root not in ROOT and root not in known:
        raise ConfigurationError(f"override {override!r}: there is no {root!r}; {nearest(root, [*ROOT, *known])}")
    return override if key != bare else f"++{override}"


def nearest(name: str, valid: Sequence[str]) -> str:
    """What was probably meant."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else f"valid are {', '.join(sorted(valid))} "


def first_line(error: Exception) -> str:
    """What an error says first."""
    return str(error).strip().splitlines()[0]
