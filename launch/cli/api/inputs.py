"""Objects of a Python program as settings: lists of prompts and parts become files, rewards are named.

Files are named after their content and lie in `output_dir/.inputs`, so that the same objects are the same settings, and
the command of a run repeats it.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import yaml

from launch.artifacts.run_directory import write_bytes
from launch.cli.api.overrides import got
from launch.config.held_rewards import HeldReward, hold
from opd.errors import ConfigurationError
from opd.method.method import Method

FOLDER = ".inputs"  # in output_dir
REWARD = "reward"  # the task of prompts that are graded by `reward=`


def prompts_file(records: Iterable[Any], folder: Path, name: str) -> tuple[Path, Mapping[str, str], int]:
    """JSONL file of `records`, its column settings (`prompt_column`, `answer_column`), and the number of rows.

    A record is a text, a list of messages, or a mapping with `prompt` (or `messages`) and perhaps `answer`. Of a table
    (a DataFrame, an Arrow table) every row is one.

    Raises:
        ConfigurationError: there is none, or one is nothing of that, or has a value that JSON has not.
    """
    rows = [_row(record, f"{name}[{number}]") for number, record in enumerate(_in_order(records, name))]
    if not rows:
        raise ConfigurationError(f"{name} is empty; give at least one prompt")
    lines = [_json(row, f"{name}[{number}]") for number, row in enumerate(rows)]
    keys = [key for key in ("prompt", "messages") if key in rows[0]]
    columns = {"prompt_column": keys[0]} if keys else {}
    if any("answer" in row for row in rows):
        columns["answer_column"] = "answer"
    return _stored("\n".join([*lines, ""]), folder, "prompts", ".jsonl"), columns, len(rows)


def _in_order(given: Any, name: str) -> Iterable[Any]:
    """Records of what was given, one after the other; a table would give its columns.

    Raises:
        ConfigurationError: it has several parts, or no order.
    """
    match given:
        case bytes() | bytearray() | set() | frozenset():
            raise ConfigurationError(
                f"{name} needs records in an order that is the same every time, got {got(given)}; give a list"
            )
    if callable(getattr(given, "readline", None)):
        raise ConfigurationError(
            f"{name} is an open file, whose lines would be asked as they are spelled; give its path, {name}=PATH"
        )
    if has_splits(given):
        raise ConfigurationError(
            f"{name} has several splits ({', '.join(given)}); give one, {name}=data[{min(given)!r}]"
        )
    if _is(given, "pyarrow", "Table", "RecordBatch"):
        names, rows = list(given.column_names), given.to_pylist
    elif _is(given, "pandas", "DataFrame"):
        names, rows = list(given.columns), lambda: given.to_dict("records")
    elif isinstance(given, Iterable):
        return given
    else:
        raise ConfigurationError(
            f"{name} needs a file, a list of prompts or a source of prompts, got {got(given)}; give one"
        )
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{name} has two columns of one name; rename one")
    return rows()


def has_splits(given: Any) -> bool:
    """Whether it is a data set of several splits, which is a mapping, too."""
    return _is(given, "datasets", "DatasetDict", "IterableDatasetDict")


def _is(given: Any, package: str, *names: str) -> bool:
    """Whether it is an instance of a class of a package, which is not imported for that."""
    module = sys.modules.get(package)
    return any(isinstance(given, getattr(module, name)) for name in names if hasattr(module, name))


def _row(record: Any, where: str) -> Mapping[str, Any]:
    match record:
        case str():
            return {"prompt": record}
        case Mapping():
            return record
        case list() | tuple():
            return {"prompt": list(record)}
    raise ConfigurationError(
        f"{where} needs a text, a list of messages, or a mapping with prompt and answer, got {got(record)}; give one"
    )


def _json(row: Mapping[str, Any], where: str) -> str:
    try:
        _check_keys(row)
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
        text.encode()  # half a surrogate is no text
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where} cannot be written as JSON ({error}); give texts and numbers") from error
    return text


def _check_keys(value: Any) -> None:
    """Raise `TypeError` about a key that is no text: JSON would make one of it."""
    match value:
        case Mapping():
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise TypeError(f"the key {key!r} is no text")
                _check_keys(inner)
        case list() | tuple():
            for inner in value:
                _check_keys(inner)


def _plain(value: Any) -> Any:
    """A mapping, a number or an array of other packages, which tables have in their cells, as Python has it."""
    if isinstance(value, Mapping):
        return dict(value)
    if _is(value, "numpy", "ndarray"):
        return value.tolist()
    if _is(value, "numpy", "integer", "floating", "bool_"):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def part_option(part: Any, group: str, name: str, folder: Path) -> list[str]:
    """Overrides that choose `part` as the option of a group, written as the YAML of a folder of its own.

    Raises:
        ConfigurationError: it is no dataclass, or a field of it is none that YAML has.
    """
    values = described(part, group)
    if isinstance(part, Method):
        del values["_target_"]  # what stands there is always one
    text = f"# Written from a Python object.\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    root = _stored(text, folder, group, ".yaml")
    option = root.parent / root.stem / group / f"{name}.yaml"
    option.parent.mkdir(parents=True, exist_ok=True)
    if not option.exists():
        write_bytes(option, text.encode())
    packages = sorted(packages_of(part) - {"opd", "demos"})
    allowed = [f"allow_targets=[{', '.join(packages)}]"] if packages else []
    return [f"conf={root.parent / root.stem}", f"{group}={name}", *allowed]


def described(part: Any, where: str) -> Any:
    """A part as plain values: dataclasses by `_target_` and fields, enumerations by name."""
    match part:
        case None | bool() | int() | float() | str():
            return part
        case Enum():
            return part.name
        case PurePath():
            return str(part)
        case Mapping():
            return {str(key): described(value, f"{where}.{key}") for key, value in part.items()}
        case list() | tuple():
            return [described(value, f"{where}[{i}]") for i, value in enumerate(part)]
    kind = type(part)
    if not dataclasses.is_dataclass(part) or "." in kind.__qualname__:
        raise ConfigurationError(
            f"{where} needs a part that is a dataclass of a module's top level, got {kind.__qualname__}; write it so"
        )
    # What is not shown is no setting: it says where the part came from.
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init and f.repr}
    return {
        "_target_": f"{kind.__module__}.{kind.__qualname__}",
        **{name: described(value, f"{where}.{name}") for name, value in fields.items()},
    }


def packages_of(part: Any) -> set[str]:
    """Names of the packages that a part and its parts come from."""
    match part:
        case Mapping():
            return {name for value in part.values() for name in packages_of(value)}
        case list() | tuple():
            return {name for value in part for name in packages_of(value)}
    if not dataclasses.is_dataclass(part):
        return set()
    inner = {name for f in dataclasses.fields(part) if f.init for name in packages_of(getattr(part, f.name))}
    return inner | {type(part).__module__.partition(".")[0]}


def reward_settings(reward: Callable[..., Any]) -> Mapping[str, Any]:
    """Settings of `graders.NAME` for a function: by its module if it has one, else held by this program."""
    if importable(reward):
        return {"_target_": f"{reward.__module__}.{reward.__qualname__}"}
    held = HeldReward(name=getattr(reward, "__name__", type(reward).__name__).strip("<>"), code=hold(reward))
    kind = type(held)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", "name": held.name, "code": held.code}


def importable(function: Callable[..., Any]) -> bool:
    """Whether another process finds the function by its module and name."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    name = getattr(function, "__qualname__", "")
    if not inspect.isfunction(function) or module is None or module.__name__ == "__main__" or "." in name:
        return False
    return getattr(module, name, None) is function


def _stored(text: str, folder: Path, kind: str, ending: str) -> Path:
    data = text.encode()
    path = folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:16]}{ending}"
    if not path.exists():
        os.makedirs(folder, exist_ok=True)
        write_bytes(path, data)
    return path
