"""Fields of dataclasses with type, range, default and a line of help, read from their sources without importing them.

Importing the parts of a method imports torch, which takes seconds.
"""

import ast
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opd.settings.ranges import In

_HOME = Path(__file__).resolve().parents[2]
_OPERATORS = {ast.Mult: operator.mul, ast.LShift: operator.lshift, ast.Pow: operator.pow}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A field of a dataclass as its source declares it.

    `kind` is the annotation without `bounds`, a number's range or the names to choose from; `default` is "" where a
    value is needed.
    """

    name: str
    kind: str
    default: str
    text: str
    module: str
    bounds: str = ""


@cache
def _source(module: str) -> tuple[ast.Module, tuple[str, ...]] | None:
    """Syntax tree and lines of a module; None if it is not found (a part of a package that is no file here)."""
    for root in (_HOME, *map(Path, sys.path)):
        base = root.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                return ast.parse(text), tuple(text.splitlines())
    return None


def _imported(tree: ast.Module, module: str) -> dict[str, str]:
    """Dotted origin of each name that a module imports, e.g. `{"Dtype": "opd.settings.devices.Dtype"}`."""
    known = {node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


class _Plain(ast.NodeTransformer):
    """An annotation without its bounds: `Annotated[int, In(1, 9)]`, or an alias of that, is `int`."""

    def __init__(self, tree: ast.Module, known: Mapping[str, str]) -> None:
        self._tree, self._known = tree, known
        self.bounds = ""  # range of the first number that was met, or names of the first choice

    def visit_Name(self, node: ast.Name) -> ast.AST:
        module, _, name = self._known.get(node.id, f".{node.id}").rpartition(".")
        source = _source(module) if module.startswith("opd.") else None
        for line in (source[0] if source else self._tree).body:
            if isinstance(line, ast.Assign) and ast.unparse(line).startswith(f"{name} = Annotated["):
                return self.visit(deepcopy(line.value))
            if (
                isinstance(line, ast.ClassDef)
                and line.name == name
                and [ast.unparse(b) for b in line.bases] == ["Enum"]
            ):
                members = [inner.targets[0] for inner in line.body if isinstance(inner, ast.Assign)]
                self.bounds = self.bounds or f"({', '.join(map(ast.unparse, members))})"
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
            for mark in node.slice.elts[1:]:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "In":
                    self.bounds = self.bounds or _range(mark)
            return self.visit(node.slice.elts[0])
        return self.generic_visit(node)


def _range(mark: ast.Call) -> str:
    """Range of a number as its annotation `In(low, high, ...)` has it, e.g. `from 1 to 9`; "" if it names constants."""
    try:
        named = {word.arg: _literal(word.value) for word in mark.keywords if word.arg and word.arg != "because"}
        return In(*map(_literal, mark.args), **named).says("").strip()
    except (ValueError, TypeError):
        return ""


def _literal(node: ast.expr) -> Any:
    """Value of a literal, or of a product, shift or power of such numbers (`24 * 3600.0`, `1 << 20`)."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_literal(node.left), _literal(node.right))
    return ast.literal_eval(node)


@cache
def settings(cls: str) -> Mapping[str, Setting] | None:
    """Fields of the dataclass `cls` (a dotted name), those of its bases first; None if no such class can be read."""
    module, _, name = cls.rpartition(".")
    source = _source(module)
    if source is None:
        return None
    tree, lines = source
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return None
    known = _imported(tree, module)
    found: dict[str, Setting] = {}
    for base in node.bases:
        inherited = settings(known[base.id]) if isinstance(base, ast.Name) and base.id in known else None
        found |= inherited or {}
    docstring = " ".join((ast.get_docstring(node) or "").split())
    for line in node.body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        plain = _Plain(tree, known)
        kind, field = ast.unparse(plain.visit(deepcopy(line.annotation))), line.target.id
        given = ast.unparse(line.value) if line.value else ""
        if kind.startswith("ClassVar") or "init=False" in given or "repr=False" in given:
            continue  # what is not shown says where a run came from
        found[field] = Setting(
            name=field,
            kind=kind,
            default=_shown(line.value),
            text=_comment(lines, line) or _clause(docstring, field),
            module=module,
            bounds=plain.bounds,
        )
    return found


def _shown(default: ast.expr | None) -> str:
    if default is None:
        return ""
    text = ast.unparse(default)
    if factory := re.search(r"default_factory=(\w+)", text):
        return {"dict": "{}", "list": "[]", "tuple": "()"}.get(factory[1], "...")
    return text.rpartition(".")[2] if re.fullmatch(r"[A-Z]\w*\.[A-Z_0-9]+", text) else text.replace("'", '"')


def _comment(lines: Sequence[str], field: ast.AnnAssign) -> str:
    """Comment behind a field, or in the line above it."""
    behind = lines[(field.end_lineno or field.lineno) - 1].partition("  # ")[2]
    above = lines[field.lineno - 2].strip()
    return behind or (above.removeprefix("# ") if above.startswith("# ") else "")


def _clause(docstring: str, name: str) -> str:
    """Clause of a docstring about a field: from its name in backticks to the end of that clause."""
    at = re.search(rf"`{name}`(?:=\S+)?", docstring)
    if not at:
        return ""
    rest = docstring[at.end() :].replace("e.g.", "e\0g\0")
    return re.split(r"\. |;|, `|\.$|, and `| and `", rest)[0].replace("\0", ".").strip(" :,=")


def class_of(kind: str, module: str) -> str:
    """Dotted name of our dataclass that an annotation names; "" if it names none."""
    source = _source(module)
    target = _imported(source[0], module).get(kind.strip("'\""), "") if source else ""
    return target if target and settings(target) else ""
