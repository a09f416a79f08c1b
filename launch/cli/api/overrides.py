"""Overrides of the command line, written from Python values."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

from launch.artifacts.user_yaml import dotted
from launch.config.composition.compose import quoted, unknown
from opd.errors import ConfigurationError
from opd.settings.validation import shown

_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)  # text that needs no quotes
_WORDS = ("true", "false", "null", "nan", "inf")  # what the grammar takes for something else


def overrides_of(settings: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """One override for every value of `settings`, whose mappings are settings below a name.

    Example: `{"steps": 5, "learner": {"lr": 1e-3}}` gives `["steps=5", "learner.lr=0.001"]`. What chooses an option of
    `groups` comes first, for the rest is laid over it.

    Raises:
        ConfigurationError: a value is none that a setting can have.
    """
    flat = [(name, value, name in groups and _options(value)) for name, value in dotted(settings)]
    chosen = [f"{name}={options}" for name, _, options in flat if options]
    return [*chosen, *(_override(name, value) for name, value, options in flat if not options)]


def _options(value: Any) -> str:
    """Options of a group as a command line has them, `wandb` or `[wandb,tensorboard]`; "" for anything else."""
    if isinstance(value, str):
        return value
    several = isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value)
    return f"[{','.join(value)}]" if several else ""


def _override(name: str, value: Any) -> str:
    if isinstance(value, str | PurePath) and _PLAIN.fullmatch(str(value)) and str(value).lower() not in _WORDS:
        return f"{name}={value}"
    return f"{name}={_written(value, name)}"


def _written(value: Any, name: str) -> str:
    """A value in the grammar of overrides; text is in quotes."""
    match value:
        case None:
            return "null"
        case np.generic():
            return _written(value.item(), name)
        case bool():
            return str(value).lower()
        case Enum():
            return value.name
        case int() | float():
            return repr(value)
        case str():
            return quoted(f"={value}").removeprefix("=")
        case PurePath():
            return _written(str(value), name)
        case Mapping():
            return f"{{{', '.join(f'{_key(k, name)}: {_written(v, name)}' for k, v in value.items())}}}"
        case Sequence() if not isinstance(value, bytes | bytearray | memoryview):
            return f"[{', '.join(_written(one, name) for one in value)}]"
    if known := unknown(name):
        raise ConfigurationError(f"there is no {name!r}, which was given {got(value)}; {known}")
    hint = " (a part is given whole: method=, prompts=, evaluation=)" if dataclasses.is_dataclass(value) else ""
    raise ConfigurationError(
        f"{name} needs a number, a text, true or false, or lists and mappings of them, got {got(value)}{hint}; give one"
    )


def got(value: Any) -> str:
    """A value that is none of those wanted, in a sentence: itself where it is plain and short, else its class."""
    match value:
        case None | bool():
            return repr(value)
        case int() | float() | str():
            return shown(value)
        case PurePath():
            return f"the path {shown(str(value))}"
        case type():
            return f"the class {value.__name__}"
    return f"an object of class {type(value).__name__}"


def _key(key: Any, name: str) -> str:
    if not isinstance(key, str) or not key.replace("_", "a").isalnum():
        raise ConfigurationError(f"{name} has a key {key!r}; keys are words of letters, digits and _")
    return key
