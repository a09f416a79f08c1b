"""Composition of the command line into one configuration: with `launch.config.run_config`, `sources` beside it and
`launch.cli.sweep.points` all that knows Hydra.

`compose` reads `conf/` and the overrides; every field of a dataclass can be overridden whether or not a YAML file
mentions it. Nothing here imports a part of a run, so a mistyped key is answered at once.
"""

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.artifacts.user_yaml import check_files
from launch.config.composition.advice import Key, advice, bare_word
from launch.config.composition.aliases import METHODS
from launch.config.composition.keys import holds_text, keys
from launch.config.shipped_files import groups, shipped
from opd.errors import ConfigurationError
from opd.settings.validation import shown

_SWEEP = "opd train -m trains a run for each of them (docs/sweeps.md)"
LONG = 500  # characters that no value has that is worth repeating


def own_folder(overrides: Sequence[str]) -> str:
    """Folder of the user's own options, given by `conf=DIR`; "" without one."""
    own = next((o.removeprefix("conf=") for o in overrides if o.startswith("conf=")), "")
    if own and not Path(own).is_dir():
        raise ConfigurationError(f"conf={own} is no folder; give one laid out like the project's conf/")
    if own and not any((Path(own) / group).is_dir() for group in groups()):  # before all of it is read
        raise ConfigurationError(
            f"conf={own} has no folder of options (such as method/ or experiment/); give one laid out like the "
            "project's conf/"
        )
    return own


def compose(overrides: Sequence[str]) -> DictConfig:
    """Composed configuration: `conf/config.yaml` under Hydra `overrides`. Raises `ConfigurationError` about a wrong
    one.

    `conf=DIR` among them adds a folder of the user's own, laid out like ours (`DIR/method/NAME.yaml`).
    """
    own = own_folder(overrides)
    node = _compose(own, readable(overrides))
    _check_data(node, overrides)
    return node


def _check_data(node: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse `data=FOLDER` where nothing reads it: it is for the experiments whose paths are made of it."""
    given = next((o for o in overrides if o.lstrip("+").startswith("data=")), "")
    if given and "${data}" not in OmegaConf.to_yaml(node):
        raise ConfigurationError(
            f"override {shown(given)} would do nothing, because no path of this run is made of it (those of "
            "experiment=gsm8k_tiny are); a file of prompts is named by prompts=dataset prompts.path=FILE"
        )


def readable(overrides: Sequence[str]) -> list[str]:
    """The overrides in Hydra's grammar, `conf=DIR` left out. Raises `ConfigurationError` about a wrong one."""
    own = own_folder(overrides)
    if own:
        check_files(sorted(Path(own).rglob("*.yaml")))
    known = groups(own)
    given = [o for o in overrides if not o.startswith("conf=")]
    chosen = tuple(o for o in given if o.partition("=")[0].lstrip("+~") in known)
    for override in chosen:
        _check_option(override, known)
    keys = _keys(own, chosen) if len(chosen) < len(given) else ()
    for word in (o for o in given if "=" not in o and not o.startswith("~")):
        raise ConfigurationError(f"override {word!r} has no value; {bare_word(word, keys, known, own)}")
    for override in (o for o in given if o.startswith("~") and o not in chosen):
        _refuse_removal(override, keys, given)
    return [o if o in chosen else _readable(o, keys, own) for o in given]


def unknown(name: str) -> str:
    """Advice about a name that no part of a run has; "" for one that may be a setting."""
    known = _keys("", ())
    roots = {key.name.partition(".")[0] for key in known} | groups().keys() | {"conf", "data", "stages", "comparison"}
    return "" if name.partition(".")[0] in roots else advice(name, known)


def leading(name: str, value: str) -> str:
    """The override that an option such as `--max-steps 3` is written as here, in a sentence."""
    known = _keys("", ())
    if kind := next((key.kind for key in known if key.name == name), None):
        return f"write {name}={value or ('true' if kind == 'bool' else '...')}"
    if name in groups():
        return f"write {name}={value or 'NAME'}"
    return advice(f"{name}={value}" if value else name, known)


def _compose(own: str, overrides: Sequence[str]) -> DictConfig:
    """Composition by Hydra, whose options are composed once in a process, because their files do not change.

    Options come before settings in Hydra, too, which composes files first and then applies settings in their order.
    """
    if own:  # whose files may be written between two calls
        with hydra_started(own):
            return hydra_compose("config", overrides=list(overrides))
    known = groups()
    options = tuple(o for o in overrides if o.partition("=")[0].lstrip("+~").partition("@")[0] in known)
    node = deepcopy(_composed(options))
    with _sentences():
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o not in options])
        ConfigLoaderImpl._apply_overrides_to_config(parsed, node)
    return node


@lru_cache(maxsize=128)  # 0.2 MB each
def _composed(options: tuple[str, ...]) -> DictConfig:
    with hydra_started(""):
        return hydra_compose("config", overrides=list(options))


@contextmanager
def hydra_started(own: str) -> Iterator[None]:
    """Context in which Hydra composes `conf/` and the user's `own` folder, and its errors are ours."""
    if not OmegaConf.has_resolver("assets"):
        OmegaConf.register_new_resolver("assets", lambda name: str(shipped("assets") / name))
        OmegaConf.register_new_resolver("mapping", _mapping)
    # Hydra reads one folder; a second one can only be named in its search path, which config.yaml takes from here.
    os.environ["OPD_OWN_CONF"] = str(Path(own or shipped("conf")).resolve())
    with _sentences(), initialize_config_dir(config_dir=str(shipped("conf")), version_base="1.3"):
        yield


@contextmanager
def _sentences() -> Iterator[None]:
    """Context whose errors of Hydra are sentences of ours."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        said = first_line(error)
        # Which of the keys of a mapping it was Hydra does not say.
        if given := re.search(r"^Could not override .*\+(\w+)=({.*})", str(error), re.DOTALL) or re.match(
            r"Error merging override \+*([\w.]+)=(.*)", said
        ):
            raise ConfigurationError(
                f"{given[1]} cannot be {_cut(given[2])}; look at what it is "
                f"(opd train --help {given[1].partition('.')[0]}), and write settings of a mapping one by one, "
                "KEY.INNER=VALUE, so that a wrong one is named"
            ) from error
        raise ConfigurationError(f"the configuration does not compose: {said}") from error


def _mapping(key: str, *, _root_: DictConfig) -> DictConfig:
    """`${mapping:KEY}` in a YAML: the mapping at KEY, and an empty one where there is none."""
    found = OmegaConf.select(_root_, key)
    return found if isinstance(found, DictConfig) else OmegaConf.create({})


def part_of(node: DictConfig, package: str, *, resolved: bool = False) -> Container:
    """The part of a configuration below a dotted name ("" is all of it), if wanted with interpolations replaced.

    Raises:
        ConfigurationError: there is no such part, or it is a single value.
    """
    try:
        if resolved:
            OmegaConf.resolve(node)
        part = OmegaConf.select(node, package) if package and package != "_global_" else node
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the configuration cannot be shown: {first_line(error)}") from error
    if not isinstance(part, DictConfig | ListConfig):
        what = f"is {part!r}, and no part of the configuration" if part is not None else "is not in the configuration"
        raise ConfigurationError(f"--package {package} {what}; name one, e.g. learner ({', '.join(map(str, node))})")
    return part


@cache
def _keys(own: str, chosen: tuple[str, ...]) -> tuple[Key, ...]:
    """All settings of the run that these options choose."""
    return tuple(keys(_compose(own, chosen)))


SEVERAL = ("tracker", "graders", "evaluation_sets")  # groups of which a run may have several options
ALONE = ("none", "offline", "wandb")  # of which it may have one


def _check_option(override: str, known: Mapping[str, Sequence[str]]) -> None:
    key, equals, value = override.partition("=")
    group = key.lstrip("+~")
    if not equals and not key.startswith("~"):
        raise ConfigurationError(f"override {override!r} has no value; {bare_word(group, (), known)}")
    if value.startswith("{"):
        return
    if key.startswith("~") or value.casefold() in _NOTHING:
        _refuse_no_option(override, group, known)
    chosen = _named_options(value) if group in SEVERAL else [value]
    wrong = [one for one in chosen if one not in known[group]]
    if not wrong:
        if group == "tracker":
            _check_trackers(override, chosen)
        return
    if group in SEVERAL and "," in value and not value.startswith("["):
        raise ConfigurationError(f"{shown(override)} names several; write {group}=[{value}]")
    if not value.startswith("[") and re.search(r",|^(choice|range|glob|sort|shuffle|interval)\(", value):
        raise ConfigurationError(f"{shown(override)} names several options; {_SWEEP}")
    given = override if len(override) < LONG else shown(override)
    if group in _OWN and re.search(r"[/.~]|:", wrong[0]):
        raise ConfigurationError(
            f"{given} names no option (have: {', '.join(known[group])}); one of your own is {_OWN[group]}{value}"
        )
    close = _meant(wrong[0], group, known[group])
    meant = f"did you mean {group}={value.replace(wrong[0], close[0])}? Options are" if close else "name one of"
    raise ConfigurationError(f"{given} does not exist; {meant} {', '.join(known[group])}")


_NOTHING = ("null", "none", "false", "off", "no", "disabled", "0", "")
_OWN = {
    "student": "student=hf student.path=",
    "teacher": "teacher=hf teacher.path=",
    "prompts": "prompts=dataset prompts.path=",
    "evaluation": "evaluation=dataset evaluation.prompts.path=",
}
"""Options for what is the user's own, a folder or a file."""


def _refuse_no_option(override: str, group: str, known: Mapping[str, Sequence[str]]) -> None:
    """Refuse to take a group away, unless that is its option `none`; there is always one way to say so."""
    if override == f"{group}=none" and "none" in known[group]:
        return
    if group in SEVERAL and group != "tracker":
        raise ConfigurationError(f"{shown(override)} names no option; write {group}=[] for none of them")
    if group == "experiment":
        raise ConfigurationError(f"{shown(override)} names no option; leave it out for none")
    remedy = f"write {group}=none" if "none" in known[group] else f"name one of {', '.join(known[group])}"
    raise ConfigurationError(f"{shown(override)} names no option, and a run needs one; {remedy}")


def _meant(name: str, group: str, options: Sequence[str]) -> list[str]:
    """The option that a wrong name may mean, in a list; empty if there is none."""
    elsewhere = METHODS.get(name.casefold().replace("-", "_"), "") if group == "method" else ""
    plain = {option.casefold(): option for option in options}
    same = plain.get(name.casefold().replace("-", "_"))
    found = [one for one in (elsewhere, same) if one]
    return found or difflib.get_close_matches(name, options, n=1, cutoff=0.5)


def _check_trackers(override: str, chosen: Sequence[str]) -> None:
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigurationError(f"{override} needs different names; write tracker=[wandb,tensorboard]")
    if len(set(chosen) & set(ALONE)) > 1 or (len(chosen) > 1 and "none" in chosen):
        raise ConfigurationError(
            f"{override} says two things (offline keeps wandb's files here, wandb sends them, none is without any "
            "tracker); name one of them"
        )


def _named_options(value: str) -> list[str]:
    """Options that `NAME` or `[NAME,NAME]` chooses."""
    if not (value.startswith("[") and value.endswith("]")):
        return [value]
    return [one for part in value[1:-1].split(",") if (one := part.strip().strip("'\""))]


def _readable(override: str, known: Sequence[Key], own: str) -> str:
    """The override in Hydra's grammar: values may be set whether or not the YAML has the key, and text is text.

    What stands behind a key that holds text is taken as it was written, whatever Hydra's grammar makes of it (1e3, a
    comma, a space, an equals sign, a backslash). Its lists, quotes, interpolations and functions keep their meaning.
    """
    written, _, value = override.partition("=")
    name = written.lstrip("+~")
    if not re.fullmatch(r"[A-Za-z_][\w.@:/-]*", name):
        raise ConfigurationError(
            f"override {override!r} begins with no key; write KEY=VALUE without spaces, e.g. steps=50"
        )
    root = name.partition(".")[0].partition("@")[0]
    if root == "hydra":
        raise ConfigurationError(
            f"override {override!r} is about how Hydra starts jobs, which opd does itself; a run's folder is "
            "output_dir=... and run_name=..., and options of your own are in conf=DIR"
        )
    roots = {key.name.partition(".")[0] for key in known} | {"comparison", "stages", "data"}
    if root not in roots or name.startswith("data."):
        raise ConfigurationError(
            f"override {_cut(override)!r}: there is no {name!r}; {advice(override.lstrip('+'), known, own)}"
        )
    prefixed = f"++{override}" if written == name else override
    as_default = re.sub(r"^teachers\.\w+\.", "teacher.", name)  # whose fields every further teacher has
    is_text = any(key.name == as_default and holds_text(key.kind) for key in known)
    try:
        parsed = OverridesParser.create().parse_override(prefixed)
    except (HydraException, ValueError, RecursionError) as error:
        if is_text:
            return quoted(prefixed)
        raise ConfigurationError(
            f"override {shown(override)} cannot be read ({first_line(error)}); "
            + (f"quote its value: {_for_a_shell(name, value)}" if len(value) < LONG else "shorten its value")
        ) from error
    typed = parsed.value()
    if is_text and (parsed.is_sweep_override() or isinstance(typed, bool | int | float)):
        return quoted(prefixed)
    if is_text and isinstance(typed, str) and typed != value.strip() and not value.lstrip().startswith(("'", '"')):
        return quoted(prefixed)  # the grammar took a backslash for an escape
    if parsed.is_sweep_override():
        raise ConfigurationError(
            f"override {shown(override)} has several values; {_SWEEP}, and a list is written "
            f"{name}=[{value if '(' not in value else 'A,B'}]"
        )
    return prefixed


def _refuse_removal(override: str, known: Sequence[Key], given: Sequence[str]) -> None:
    """Refuse to take a setting away, which would leave a default that stands in no file.

    Entries of mappings may go, and settings of a part whose class another override changes.
    """
    name = override.lstrip("~").partition("=")[0]
    found = next((key for key in known if key.name == name), None)
    target = f"{name.rpartition('.')[0]}._target_="
    if found and not found.kind.startswith(("Mapping", "dict")) and not any(target in other for other in given):
        raise ConfigurationError(
            f"override {shown(override)} takes a setting away that every run has; leave it out for {found.value}, or "
            f"set the value that is meant: {name}=..."
        )


def _cut(override: str) -> str:
    return override if len(override) < LONG else f"{override[:LONG]}..."


def quoted(override: str) -> str:
    """`key='value'`, whatever characters the value has; a leading `~/` is the home directory, as in shells."""
    key, _, value = override.partition("=")
    value = os.path.expanduser(value) if value.startswith("~/") else value
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"


def _for_a_shell(name: str, value: str) -> str:
    """The override as typed in a shell, its value in quotes, e.g. `"notes=['a: b']"`."""
    text = quoted(f"{name}={value}")
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return str(error).strip().splitlines()[0]
