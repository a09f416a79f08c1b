"""`opd methods`: the methods that a run can name, with their papers, and the composition of one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from launch.config.composition.compose import own_folder
from launch.config.shipped_files import first_sentence, head_comment, option_files
from opd.errors import ConfigurationError

_ROOM_FOR_PAPERS = 100
"""Columns of a terminal from which on there is room for papers."""

_ORDER = ("rollout", "scorer", "weights", "objective", "normalizer", "coefficient", "terms", "update")
_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
_CLAIM = re.compile(r"\bClaim (shown on [a-z_]+|not shown on [a-z_]+|not testable here|not tried)\b")


def list_methods(overrides: Sequence[str], console: Console) -> int:
    """Print a line per method of `conf/method` and of the user's own folder (`conf=DIR`).

    What became of its paper's claim on the stages of this project, if its file says that, the paper, and what it is.
    """
    rows = [("method=", "claim", "arXiv", ""), *(_row(name, path) for name, path in _methods(overrides).items())]
    # One line each: cut where a terminal ends, and whole where a file or another program reads it.
    cut = console.is_terminal
    if cut and console.width < _ROOM_FOR_PAPERS:
        rows = [(name, claim, what) for name, claim, _, what in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        line = "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        console.print(Text(line), no_wrap=True, overflow="ellipsis" if cut else "ignore", crop=cut)
    console.print(
        "opd methods show NAME prints a composition, opd certify method=NAME proves its gradient", style="dim"
    )
    return 0


def show_method(name: str, overrides: Sequence[str], console: Console) -> int:
    """Print what a method is made of: its comment, then a line per part with the settings that its file names."""
    methods = _methods(overrides)
    if name not in methods:
        raise ConfigurationError(f"there is no method {name!r}; opd methods lists all {len(methods)}")
    loaded = yaml.safe_load(methods[name].read_text(encoding="utf-8"))
    console.print(Text(f"method={name}", style="bold"))
    console.print(Text(head_comment(methods[name])))
    for depth, line in _lines({key: loaded[key] for key in sorted(loaded, key=_place) if key != "name"}):
        console.print(Text("  " * (depth + 1) + line), soft_wrap=True)
    return 0


def _row(name: str, path: Path) -> tuple[str, str, str, str]:
    """Name, claim, paper, and what it is."""
    comment = head_comment(path)
    paper, claim = (next(iter(found.findall(comment)), "") for found in (_ARXIV, _CLAIM))
    return name, claim, paper, first_sentence(path)


def _methods(overrides: Sequence[str]) -> Mapping[str, Path]:
    return option_files(own_folder(overrides))["method"]


def _place(key: str) -> tuple[int, str]:
    return (_ORDER.index(key) if key in _ORDER else len(_ORDER), key)


def _lines(node: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[int, str]]:
    """`(depth, line)` of every part: `objective: HeadTailDivergence (opd.objectives.topk)`, then its settings."""
    for key, value in node.items():
        if key == "_target_":
            continue
        if not isinstance(value, Mapping):
            yield depth, f"{key}: {value}"
            continue
        module, _, part = str(value.get("_target_", "")).rpartition(".")
        yield depth, f"{key}: {part} ({module})" if part else f"{key}:"
        yield from _lines(value, depth + 1)
