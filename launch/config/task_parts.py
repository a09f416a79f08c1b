"""Graders and environments of a run: parts by the name of the task that they stand for (`prompts.task`)."""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch.config.reward_function import RewardFunction
from launch.config.typed import construct, imported
from opd.errors import ConfigurationError
from opd.settings.validation import shown

OWN = ("opd.", "launch.inputs.graders.")  # packages whose graders and environments are always built
BY_TASK = GRADERS, ENVIRONMENTS = "graders", "environments"


def graders_of(values: Any, allowed: Sequence[str]) -> dict[str, object]:
    """Graders by name: dataclasses with `grade(completions, answers)`, and functions (`RewardFunction`)."""
    found: dict[str, object] = {}
    for name, fields in _entries(values, GRADERS):
        where, target = f"{GRADERS}.{name}", fields.pop("_target_")
        part = imported(target, where, (*OWN, *allowed))
        if inspect.isfunction(part):
            deadline = {"deadline_s": fields.pop("deadline_s")} if "deadline_s" in fields else {}
            found[name] = RewardFunction(name=name, function=part, settings=fields, **deadline)
        else:
            made = _made(part, fields, where, allowed, "a function or a dataclass with grade(completions, answers)")
            _check_call(made, "grade", 2, where)
            found[name] = made
    return found


def environments_of(values: Any, allowed: Sequence[str]) -> dict[str, object]:
    """Environments by name: dataclasses with `reset(prompt)` and `step(action)`, of which episodes get copies."""
    found: dict[str, object] = {}
    for name, fields in _entries(values, ENVIRONMENTS):
        where, target = f"{ENVIRONMENTS}.{name}", fields.pop("_target_")
        part = imported(target, where, (*OWN, *allowed))
        found[name] = _made(part, fields, where, allowed, "a dataclass with reset(prompt) and step(action)")
        _check_call(found[name], "reset", 1, where)
        _check_call(found[name], "step", 1, where)
    return found


def named_by_hand(overrides: Sequence[str]) -> list[str]:
    """Modules whose graders and environments the command line names itself; a file's need `allow_targets`.

    Example: of `+graders.mine._target_=my_rewards.count_words` it is `["my_rewards"]`.
    """
    pattern = rf"\+{{0,2}}(?:{GRADERS}|{ENVIRONMENTS})\.\w+\._target_=['\"]?([A-Za-z_][\w.]*)\.\w+['\"]?"
    return [found[1] for override in overrides if (found := re.fullmatch(pattern, override))]


def _entries(values: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{where} needs parts by name, got {shown(values)}; set {where}.NAME._target_=...")
    for name, fields in values.items():
        if not (isinstance(fields, Mapping) and "_target_" in fields):
            raise ConfigurationError(
                f"{where}.{name} names no part, got {shown(fields)}; set {where}.{name}._target_=MODULE.NAME"
            )
    return [(str(name), dict(fields)) for name, fields in values.items()]


def _made(part: Any, fields: Mapping[str, Any], where: str, allowed: Sequence[str], wanted: str) -> object:
    if not (isinstance(part, type) and dataclasses.is_dataclass(part)):
        raise ConfigurationError(f"{where}._target_ needs {wanted}, got {shown(part)}; name another")
    return construct(part, fields, where, allowed)


def _check_call(part: object, name: str, arguments: int, where: str) -> None:
    """Refuse a part that lacks a method, or whose method is called otherwise."""
    method = getattr(part, name, None)
    try:
        inspect.signature(method).bind(*[""] * arguments)  # type: ignore[arg-type]  # what cannot be called raises
    except TypeError as error:
        kind = type(part).__name__
        raise ConfigurationError(
            f"{where}: {kind} needs a method {name} that is called with {arguments} argument{'s' * (arguments > 1)} "
            f"({error}); correct it"
        ) from error
