"""From plain values to typed objects: a dataclass is the schema of the mapping under its name.

Every field can be overridden whether or not a YAML file mentions it, an unknown key, a wrong type or a value out of
range is refused by name, and `_target_` may only point below `OWN` and packages the user lists.
"""

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from launch.artifacts.old_names import todays, todays_part
from launch.config.composition.keys import nearest
from opd.errors import ConfigurationError, OpdError
from opd.settings.own_modules import IMPORTED_FROM, own_module
from opd.settings.ranges import Matches
from opd.settings.validation import default_of, fields_of, fit, missing, parts_of, shown

AllowedPackages = Sequence[
    Annotated[str, Matches(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.?", "that names a package, e.g. my_methods")]
]

OWN = ("opd.", "demos.prompts.")  # packages whose parts are always built


def construct(cls: type, values: Any, where: str, allowed: Sequence[str] = ()) -> Any:
    """An instance of `cls` from `values`, keyed by field, each built and checked against its declared type."""
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"{where} needs fields of {cls.__name__} such as {_first_field(cls)}, got {shown(values)}; set "
            f"{where}.{_first_field(cls)}=..."
        )
    fields, hints = {f.name: f for f in dataclasses.fields(cls) if f.init}, fields_of(cls)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            meant = nearest(str(name), list(fields)) if fields else "it has none, leave it out"
            raise ConfigurationError(f"{where}.{name}: {cls.__name__} has no such field; {meant}")
        default = default_of(fields[name])
        given[name] = built(hints[name], value, f"{where}.{name}", allowed, default)
    unset = [n for n, f in fields.items() if n not in given and default_of(f) is dataclasses.MISSING]
    if unset:
        raise ConfigurationError(f"{where}.{unset[0]} is not set and has no default; set {where}.{unset[0]}=...")
    try:
        return cls(**given)
    except ConfigurationError as error:
        raise ConfigurationError(_placed(str(error), cls, where)) from error
    except OpdError:
        raise
    except Exception as error:  # a user's part may raise anything
        raise ConfigurationError(
            f"{where}: {cls.__name__} cannot be built of these fields ({type(error).__name__}: {error}); correct them"
        ) from error


def _placed(sentence: str, cls: type, where: str) -> str:
    """A class's own sentence with the place of its fields in the configuration: `where.field`.

    The class knows them as `CLASS.field`, or by the usual name of its place (`prompts.field`, `scorer.field`), which
    is another one for `evaluation.sets.NAME.prompts` and `method.terms.NAME.scorer`.
    """
    names, fields = (cls.__name__, where.rpartition(".")[2]), [field.name for field in dataclasses.fields(cls)]
    usual = rf"(?<![\w.])(?:{'|'.join(map(re.escape, names))})\.(?=(?:{'|'.join(fields)})\b)"
    return re.sub(usual, lambda _: f"{where}.", sentence)


def built(hint: Any, value: Any, where: str, allowed: Sequence[str] = (), default: Any = dataclasses.MISSING) -> Any:
    """`value` as `hint` declares it: parts are instantiated from their `_target_`, and all of it is checked."""
    return fit(hint, _parts(hint, value, where, allowed, default), where, default)


def _parts(hint: Any, value: Any, where: str, allowed: Sequence[str], default: Any) -> Any:
    """`value` with every mapping that describes a part or a group of fields replaced by the object."""
    base, _ = parts_of(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        value = todays_part(value, where)
        cls = _target(value["_target_"], where, (*OWN, *allowed))
        if getattr(base, "_is_protocol", False) and (lacking := missing(base, cls)):
            raise ConfigurationError(
                f"{where}._target_ {value['_target_']!r} is none for the slot {base.__name__} ({lacking}); name another"
            )
        return construct(cls, {k: v for k, v in value.items() if k != "_target_"}, where, allowed)
    kinds = get_args(base) if get_origin(base) in (Union, UnionType) else (base,)
    kind = next(k for k in kinds if k is not NoneType)
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if not isinstance(origin, type) or (value is None and NoneType in kinds):
        return value
    if dataclasses.is_dataclass(origin):
        return construct(origin, value, where, allowed)
    if isinstance(value, Mapping) and issubclass(origin, Mapping) and arguments:
        return {k: built(arguments[1], v, f"{where}.{k}", allowed) for k, v in value.items()}
    if isinstance(value, list) and issubclass(origin, Sequence) and arguments:
        return [_parts(arguments[0], v, f"{where}[{i}]", allowed, dataclasses.MISSING) for i, v in enumerate(value)]
    if isinstance(value, Mapping) and value and dataclasses.is_dataclass(default):
        return construct(type(default), value, where, allowed)  # fields of the part that stands there anyway
    return value


def imported(target: Any, where: str, allowed: Sequence[str]) -> Any:
    """Object that a `_target_` names. A module of the user's own may lie in the folder where the command was given."""
    target = todays(target) if isinstance(target, str) else target
    if isinstance(target, str) and not re.fullmatch(r"\w+(\.\w+)*", target):
        raise ConfigurationError(
            f"{where}._target_ is {target!r}, but it is no MODULE.NAME as Python imports it; write the file "
            "my_folder/my_rewards.py with a function f as my_folder.my_rewards.f"
        )
    if not isinstance(target, str) or not any(target.startswith(f"{prefix.rstrip('.')}.") for prefix in allowed):
        raise ConfigurationError(
            f"{where}._target_ is {target!r}, but only parts below {', '.join(allowed)} are built; add its package "
            "to allow_targets if you trust it"
        )
    module, _, name = target.rpartition(".")
    load = importlib.import_module if target.partition(".")[0] in ("opd", "demos", "launch") else own_module
    try:
        return getattr(load(module), name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigurationError(
            f"{where}._target_ {target!r} cannot be imported: {' '.join(str(error).split())}; {IMPORTED_FROM}"
        ) from error


def _target(target: Any, where: str, allowed: Sequence[str]) -> type:
    cls = imported(target, where, allowed)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigurationError(f"{where}._target_ {target!r} is no dataclass; parts are frozen dataclasses")
    return cls


def _first_field(cls: type) -> str:
    return dataclasses.fields(cls)[0].name
