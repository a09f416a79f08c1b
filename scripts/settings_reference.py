"""Page of every setting, from the dataclasses: name, type and range, value, a line.

`python scripts/settings_reference.py` writes docs/reference.md; tests/unit/project/test_reference.py compares the two.
`opd train --help WORD` searches the same.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import opd.loss.packing
import opd.method.schedules
import opd.method.shapes
import opd.objectives
import opd.rollouts
import opd.scorers
import opd.token_weights
import opd.updates
from actors.config import StudentConfig
from launch.config.budget import StopAfter
from launch.config.composition.compose import compose
from launch.config.composition.keys import Key, keys
from launch.config.run_config import RunConfig
from launch.config.settings import ClusterConfig, EvaluationConfig, HardwareConfig
from launch.config.tracker import TrackerConfig
from learner.config import LearnerConfig, LoraConfig
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.mixed import MixedPrompts
from opd.settings.declared import Setting, settings
from opd.settings.ranges import HARMLESS
from opd.settings.validation import fields_of, parts_of, wanted
from teacher_service.config import TeacherConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
CHOSEN = ("student=hf", "teacher=hf", "prompts=dataset", "evaluation=dataset")
GROUPS: Mapping[str, tuple[str, type]] = {
    "The run": ("", RunConfig),
    "An end by cost": ("stop_after", StopAfter),
    "Student": ("student", StudentConfig),
    "Teacher, and further ones below `teachers.NAME`": ("teacher", TeacherConfig),
    "Prompts of your own (`prompts=dataset`), and the same below `evaluation.prompts`": ("prompts", DatasetPrompts),
    "Learner": ("learner", LearnerConfig),
    "Adapters": ("learner.lora", LoraConfig),
    "Evaluation": ("evaluation", EvaluationConfig),
    "Cluster": ("cluster", ClusterConfig),
    "Hardware": ("hardware", HardwareConfig),
    "Tracker": ("tracker", TrackerConfig),
}
SLOTS: Mapping[str, Sequence[Any]] = {
    "Rollouts": (opd.rollouts,),
    "Scorers": (opd.scorers,),
    "Objectives": (opd.objectives,),
    "Weights of tokens": (opd.token_weights,),
    "Updates": (opd.updates,),
    "Normalizers, schedules and shapes": (opd.loss.packing, opd.method.schedules, opd.method.shapes),
}
HEAD = """\
# Every setting

Written by `python scripts/settings_reference.py` from the dataclasses; a test compares the two. `opd train --help WORD`
searches the same, and what is out of its range is refused with a sentence that says the range. Everything stands on
the command line as `KEY=VALUE`, in a YAML as a tree, in Python as `{"KEY": value}`.

*Value* is that of a run with `student=hf teacher=hf prompts=dataset evaluation=dataset` and no other option; *needed*
has none. ↻ marks what a resumed run may change freely: the same training comes out
([howto/resume.md](howto/resume.md)). Options of a group (`method=...`, `learner=...`) are listed by
`opd train --help method`.
"""
PARTS = """
## Parts of methods

What a method is made of. `opd methods show gkd` says which parts one has; their fields are settings of it
(`method.objective.beta=0.3`, `method.rollout.temperature=0.7`), and a part is exchanged by its class
(`method.objective._target_=opd.objectives.vocabulary.JensenShannon`). *Value* is the class's own; the YAML of a
method may say another.
"""


def page() -> str:
    """The page, of every setting and every field of a part."""
    found = {key.name: key for key in keys(compose(list(CHOSEN)))}
    return "\n".join([HEAD, *_groups(found), PARTS, *_slots()]).rstrip() + "\n"


def _groups(found: Mapping[str, Key]) -> Iterator[str]:
    for title, (prefix, cls) in GROUPS.items():
        hints, start = fields_of(cls), f"{prefix}." if prefix else ""
        rows = [
            _row(key.name, hints.get(key.name.removeprefix(start)), key.value.replace("???", ""), key.text, key.kind)
            for key in found.values()
            if key.name.startswith(start) and "." not in key.name.removeprefix(start)
        ]
        yield from _table(title, rows, level=2)
        if cls is DatasetPrompts:
            yield from _table("A mixture (`prompts=mixed`)", list(_fields(MixedPrompts, "prompts.")), level=2)


def _slots() -> Iterator[str]:
    for title, packages in SLOTS.items():
        yield f"### {title}\n"
        for cls in _classes(packages):
            rows = list(_fields(cls, ""))
            what = (cls.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()
            yield f"**`{cls.__module__}.{cls.__qualname__}`**: {' '.join(what.split())}\n"
            yield from _table("", rows) if rows else ()


def _classes(packages: Sequence[Any]) -> Iterator[type]:
    """Dataclasses of packages, or of modules, that a YAML may name."""
    for package in packages:
        names = [name for _, name, _ in pkgutil.iter_modules(getattr(package, "__path__", []))]
        modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names] or [package]
        for module in modules:
            for cls in vars(module).values():
                if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == module.__name__ and _public(cls):
                    yield cls


def _public(cls: type) -> bool:
    """Whether it is a part: its fields are checked as settings, or there are none."""
    checked = getattr(getattr(cls, "__post_init__", None), "__module__", "") == fields_of.__module__
    return not cls.__name__.startswith("_") and (checked or not settings(f"{cls.__module__}.{cls.__qualname__}"))


def _fields(cls: type, prefix: str) -> Iterator[str]:
    known: Mapping[str, Setting] = settings(f"{cls.__module__}.{cls.__qualname__}") or {}
    hints = fields_of(cls)
    for name, setting in known.items():
        if name in hints:
            yield _row(f"{prefix}{name}", hints[name], setting.default, setting.text)


def _row(name: str, hint: Any, value: str, text: str, kind: str = "") -> str:
    """Row of a setting; `kind` stands where no dataclass has it."""
    marks = parts_of(hint)[1] if hint is not None else ()
    because = "; ".join(filter(None, (getattr(mark, "because", "") for mark in marks)))
    takes = (wanted(hint) if hint is not None else kind) + (f" ({because})" if because else "")
    shown = f"`{value}`" if value else "needed"
    again = " ↻" if HARMLESS in marks else ""
    return f"| `{name}`{again} | {_cell(takes)} | {_cell(shown)} | {_cell(text)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(title: str, rows: Sequence[str], level: int = 4) -> Iterator[str]:
    if title:
        yield f"{'#' * level} {title}\n"
    yield "| setting | takes | value | |\n|---|---|---|---|"
    yield from rows
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
