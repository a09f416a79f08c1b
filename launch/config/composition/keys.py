"""Every key of a run with its type, value and one line of help, read from the sources without importing them.

Importing the parts imports torch, which takes seconds; a mistyped key and `--help` are answered in less than one.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.artifacts.old_names import todays
from launch.config.composition.advice import Key, advice
from launch.config.shipped_files import shipped
from opd.errors import ConfigurationError
from opd.settings.declared import Setting, class_of, settings

_RUN = "launch.config.run_config.RunConfig"
_COMMENT = re.compile(r"^( *)([a-z_]\w*):[^#]*(?:#\s*(.*))?$")


@cache
def _comments(path: Path) -> Mapping[str, str]:
    """Comments behind the keys of a YAML file, by dotted key."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _COMMENT.match(line):
            indent, name, comment = len(match[1]), match[2], match[3]
            above = [(i, n) for i, n in above if i < indent]
            above.append((indent, name))
            if comment:
                found[".".join(n for _, n in above)] = comment.rstrip()
    return found


def _fields(cls: str) -> Mapping[str, Setting] | None:
    """The settings of `cls`; for a whole run also those that stand in its YAML and not in its dataclass."""
    found = settings(cls) if cls else None
    if cls != _RUN or found is None:
        return found
    module = _RUN.rpartition(".")[0]
    data = "folder of the data that an experiment asks for (experiment=gsm8k_tiny)"
    extra = {"teacher": ("TeacherConfig", ""), "allow_targets": ("Sequence[str]", ""), "data": ("str", data)}
    added = {n: Setting(name=n, kind=kind, default="", text=text, module=module) for n, (kind, text) in extra.items()}
    return {**found, **added}


def _leaves(node: DictConfig, cls: str, where: str = "") -> Iterator[tuple[str, Setting | None, Any]]:
    """Every key below `node`: dotted name, setting and raw node; None for a setting that `cls` lacks.

    Below a class whose source is not found every key is taken for a setting of it.
    """
    known = _fields(cls)
    for name in [*(known or {}), *(str(n) for n in node if str(n) not in (known or {}))]:
        dotted = f"{where}.{name}" if where else name
        setting = (known or {}).get(name)
        value = node._get_node(name) if name in node else None
        if name == "_target_" or (not where and name in ("hydra", "comparison", "stages")):
            continue
        if setting is None and known is not None:
            yield dotted, None, value
            continue
        kind, module = (setting.kind, setting.module) if setting else ("", "")
        own = class_of(kind, module)
        entries = re.match(r"(?:Mapping|dict)\[str, (\w+)\]", kind)
        if isinstance(value, DictConfig) and not (value._is_none() or value._is_missing()):
            target = _target(value, own)
            if target:
                yield from _leaves(value, target, dotted)
            elif entries:
                one = class_of(entries[1], module)
                if not value:
                    yield dotted, setting, value
                for entry, inner in ((entry, value._get_node(entry)) for entry in value):
                    if isinstance(inner, DictConfig):
                        yield from _leaves(inner, _target(inner, one), f"{dotted}.{entry}")
                    else:
                        yield f"{dotted}.{entry}", setting, inner
            else:
                yield dotted, setting or _unknown(name), value
        elif own and value is None:
            yield from _leaves(OmegaConf.create({}), own, dotted)
        else:
            yield dotted, setting or _unknown(name), value


def _target(node: Mapping[Any, Any], otherwise: str = "") -> str:
    """The class that a node names, by its current name."""
    return todays(str(node.get("_target_") or otherwise))


def _unknown(name: str) -> Setting:
    return Setting(name=name, kind="", default="", text="", module="")


def keys(node: DictConfig) -> list[Key]:
    """All keys of a composed run with their values."""
    comments = dict(_comments(shipped("conf") / "config.yaml"))
    found = []
    for name, setting, value in _leaves(node, _RUN):
        if setting is not None:
            text = comments.get(name) or setting.text
            shown = setting.default if value is None else _value(value)
            found.append(Key(name=name, kind=setting.kind, value=shown, text=text, bounds=setting.bounds))
    return found


def _value(node: Any) -> str:
    """Value of a node, as one would write it."""
    if node._is_missing():
        return "???"
    try:
        value = node._dereference_node()._value() if node._is_interpolation() else node._value()
    except OmegaConfBaseException:
        return str(node._value())  # it points to what is not set yet
    if isinstance(node, DictConfig | ListConfig):
        return str(OmegaConf.to_container(node, resolve=False)).replace("'", "")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or '""'


def holds_text(kind: str) -> bool:
    """Whether values of this type are text, to be taken literally."""
    return bool(re.search(r"\bstr\b", kind)) and not re.search(r"\b(int|float|bool|Mapping|dict)\b", kind)


def check_names(node: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Raise `ConfigurationError` about the first key that its part of the run does not have."""
    for name, setting, _ in _leaves(node, _RUN):
        if setting is None:
            written = next((o.lstrip("+") for o in overrides if o.lstrip("+").partition("=")[0] == name), name)
            raise ConfigurationError(f"{written}: there is no setting {name!r}; {advice(written, keys(node))}")


def nearest(name: str, valid: Sequence[str]) -> str:
    """Nearest of a few names to the one given."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else f"valid are {', '.join(sorted(valid))} "
