"""Advice about what is no setting: its name here, its place, the option that has it, or the nearest name.

What an advice says to write is no unknown name again, and a value is repeated in it only where it may be meant
(`tests/unit/cli/test_advice.py`).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from launch.artifacts.old_names import todays, todays_setting
from launch.config.composition.aliases import ALIASES, ELSEWHERE, REASONS
from launch.config.shipped_files import option_files
from opd.settings.declared import settings

_ROLES = {"teacher": "teacher", "teachers": "teacher"} | dict.fromkeys(
    ("evaluation", "eval", "val", "validation", "test"), "evaluation"
)
"""Words in a name that say whose setting it is, where it is not the run's own."""
_MODEL = {"student.path": "student=hf", "teacher.path": "teacher=hf"}  # whose other settings fit models of one's own
_LONG = 200  # characters of a value that is worth repeating
_ALIKE = 0.8  # from here on a name is a misspelling of another, and not another word


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A setting at its place in a run, e.g. `Key(name="learner.lr", kind="float", value="0.001", text="...")`."""

    name: str
    kind: str
    value: str
    text: str
    bounds: str = ""


def advice(written: str, known: Sequence[Key], own: str = "") -> str:
    """Advice about a setting that does not exist: another option, another name for it, its place, or the nearest name.

    Example: `advice("lr=1e-3", keys(node))` is `"it is learner.lr here; write learner.lr=1e-3"`.
    """
    name, equals, value = written.partition("=")
    above, _, last = name.rpartition(".")
    every = [key.name for key in known]
    if options := _options_with(name, own):
        return f"it belongs to {', '.join(options[:4])}{' ...' if len(options) > 4 else ''}; add that to the command"
    if (renamed := todays_setting(name)) in every:
        return f"it is called {renamed} now; write {renamed}{equals}{value}"
    if found := _elsewhere(name, value, every, own):
        return found
    beside = {key.rpartition(".")[2]: key for key in every if key.rpartition(".")[0] == above}
    beside |= {} if above else {key.partition(".")[0]: key.partition(".")[0] for key in every}
    close = difflib.get_close_matches(last, beside, n=1) or difflib.get_close_matches(name, every, n=1, cutoff=0.85)
    role = _role(name)
    places = [key for key in every if key.rpartition(".")[2] == last] or [beside.get(name, name) for name in close]
    places = [key for key in places if not role or key.startswith(f"{role}.")]
    if len(places) == 1:
        return _nearest(name, places[0], f"{equals}{value}", known)
    if beside and above:
        return f"{above} has {', '.join(beside)}"
    return "opd train --help WORD searches all settings"


def _elsewhere(name: str, value: str, every: Sequence[str], own: str) -> str:
    """Advice about a name of another program; "" for one that is not known."""
    *above, last = name.lower().split(".")
    target = ALIASES.get(last) or ALIASES.get(above[-1] if above else "", "")
    if last in ELSEWHERE:
        return ELSEWHERE[last]
    if target.endswith("="):
        return f"it is chosen by {target}NAME here (opd train --help {target[:-1]})"
    why = REASONS.get(last, "") or ("" if last in ALIASES else REASONS.get(above[-1] if above else "", ""))
    role = _role(name)
    target = _of_role(target, role, every, own) if role else target
    if not target:
        return ""
    needed = _beside(target, every, own)
    return f"it is {target} here{f': {why}' if why else ''}; write {needed}{target}={_example(value, why)}"


def _role(name: str) -> str:
    """Part whose setting a name is, where it is not the run's own, as in "teacher" of `teacher_model.path`; else ""."""
    *above, _ = name.split(".")
    if above[:1] == ["teachers"] and len(above) > 1:
        return ".".join(above[:2])
    words = re.split(r"[._-]", ".".join(above).lower())
    return next((_ROLES[word] for word in words if word in _ROLES), "")


def _of_role(target: str, role: str, every: Sequence[str], own: str) -> str:
    """The same setting of a teacher or of the evaluation; "" where they have none, since the run's is another one."""
    if target.startswith(f"{role}.") or target == "max_tokens":
        return target
    ends = target.split(".")
    of_role = [".".join([role, *ends[i:]]) for i in range(len(ends))]
    return next((one for one in of_role if one in every or _options_with(one, own)), "")


def _beside(target: str, every: Sequence[str], own: str) -> str:
    """Option that a setting needs beside it, as an override; "" if none."""
    if target in _MODEL:
        return f"{_MODEL[target]} "
    options = [] if target in every or target.startswith("method.") else _options_with(target, own)
    return f"{options[0]} " if options else ""


def _nearest(name: str, place: str, given: str, known: Sequence[Key]) -> str:
    """The nearest name: to be written, if it can be a misspelling; otherwise with what it holds."""
    (above, _, last), (there, _, near) = name.rpartition("."), place.rpartition(".")
    longer = above and above == there and last.startswith(near)
    if longer or last in place.split(".") or difflib.SequenceMatcher(None, last, near).ratio() >= _ALIKE:
        return f"did you mean {place!r}? write {place}{given}"
    text = next((key.text for key in known if key.name == place), "")
    return f"the nearest is {place}{f' ({text})' if text else ''}; opd train --help WORD searches all settings"


def _options_with(name: str, own: str) -> list[str]:
    """Options of a group that have this setting, e.g. `["prompts=dataset"]` for `prompts.path`."""
    group, *path = name.split(".")
    found = []
    for option, file in option_files(own).get(group, {}).items():
        node = _parsed(file, file.stat().st_mtime_ns)
        for part in path[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        target = todays(str(node.get("_target_") or "")) if isinstance(node, dict) else ""
        if path and path[-1] in (settings(target) or {} if target else {}):
            found.append(f"{group}={option}")
    return found


@cache
def _parsed(file: Path, changed: int) -> Any:  # noqa: ARG001 (a file that changed is read again)
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _example(value: str, why: str) -> str:
    """The given value as an example, unless the setting counts something else."""
    return "..." if why or len(value) > _LONG else value or "..."


def bare_word(word: str, known: Sequence[Key], groups: Mapping[str, Sequence[str]], own: str = "") -> str:
    """Advice about a word of the command line that has no value, e.g. `write method=gkd`."""
    kinds = {key.name: key.kind for key in known}
    if word in kinds:
        return f"write {word}={'true' if kinds[word] == 'bool' else 'VALUE'}"
    if word in groups:
        return f"write {word}=NAME (opd train --help {word})"
    if homes := sorted(group for group, options in groups.items() if word in options):
        return f"write {' or '.join(f'{home}={word}' for home in homes)}"
    if word.startswith("@") or word.endswith((".yaml", ".yml", ".toml")):
        return "settings in a file of yours are an option: DIR/experiment/NAME.yaml is read by conf=DIR experiment=NAME"
    if re.search(r"[/.~]", word):
        return (
            "if it is a path, say what it is: student=hf student.path=..., teacher=hf teacher.path=..., "
            "prompts=dataset prompts.path=..., or checkpoint=... for opd eval"
        )
    return f"{advice(word, known, own)}; an option is written with its group, e.g. method=gkd"
