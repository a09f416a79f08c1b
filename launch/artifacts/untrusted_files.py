"""Untrusted files of a run: read within bounds and by their types, or refused with one sentence.

What a run has written itself comes back; what was edited, cut off, copied from elsewhere or made to do harm is a
`DataError` that names the file.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from launch.artifacts.user_yaml import check_files
from opd.errors import ConfigurationError, DataError
from opd.settings.validation import fields_of, fit

MOST_BYTES = 256 << 20
Record = TypeVar("Record")


def read_text(path: Path, advice: str, most: int = MOST_BYTES) -> str:
    """Text in `path`. Raises `DataError`, which ends with `advice`, if it is too long or no text."""
    try:
        if path.stat().st_size > most:
            raise DataError(f"{path} has {path.stat().st_size} bytes, more than a run writes ({most}); {advice}")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {advice}") from error


def read_json(path: Path, advice: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """JSON object in `path`. Raises `DataError`, which ends with `advice`, for anything else."""
    text = read_text(path, advice, most)
    try:
        value = json.loads(text)
    except RecursionError:
        raise DataError(f"{path} cannot be read (it is nested too deep); {advice}") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {advice}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object; {advice}")
    return value


def read_yaml(path: Path, advice: str) -> dict[str, Any]:
    """YAML mapping in `path`, whose aliases expand to few values. Raises `DataError` for anything else."""
    try:
        check_files([path])
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ConfigurationError, OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is no configuration of a run ({' '.join(str(error).split())}); {advice}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no mapping; {advice}")
    return value


def record(cls: type[Record], values: Mapping[str, Any], where: str, advice: str) -> Record:
    """Dataclass that a mapping describes; a value that was no number may be null.

    Raises:
        DataError: a field is missing, unknown, or not of its type.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"{where} is no JSON object; {advice}")
    specs = fields(cls)  # type: ignore[arg-type]
    needed = {spec.name for spec in specs if spec.default is MISSING and spec.default_factory is MISSING}
    known = {spec.name for spec in specs}
    if mismatched := sorted(needed - values.keys()) or sorted(map(str, values.keys() - known)):
        verb = "lacks" if mismatched[0] in known else "has a field that no run writes,"
        raise DataError(f"{where} {verb} {mismatched[0][:60]!r}; {advice}")
    hints = fields_of(cls)
    try:
        return cls(**{name: fit(_or_null(hints[name]), value, name) for name, value in values.items()})
    except ConfigurationError as error:
        raise DataError(f"{where} is not what a run writes ({str(error).partition(';')[0]}); {advice}") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{where} is not what a run writes ({type(error).__name__}); {advice}") from error


def _or_null(hint: Any) -> Any:
    """A declared type whose values, and members, may be null."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return tuple[arguments[0] | None, ...] | None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return Mapping[str, arguments[1] | None] | None
    return hint | None
