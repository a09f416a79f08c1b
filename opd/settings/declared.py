"""Fields of dataclasses with type, range, default and a line of help, read from their sources without importing them.

Importing the parts of a method imports torch, which takes seconds.
"""

import ast
import builtins
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
    path = _path(module)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return ast.parse(text), tuple(text.splitlines())
    except (SyntaxError, ValueError):  # a user's module; importing it says what is wrong
        return None


def _path(module: str) -> Path | None:
    """File of a module; None if it has none on the path of imports."""
    bases = [root.joinpath(*module.split(".")) for root in (_HOME, *map(Path, sys.path))] if module else []
    return next((p for base in bases for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@cache
def _imported(module: str) -> Mapping[str, str]:
    """Dotted origin of each name that a module has, e.g. `{"Dtype": "opd.settings.devices.Dtype"}`."""
    source = _source(module)
    if source is None:
        return {}
    known: dict[str, str] = {}
    for node in source[0].body:
        if isinstance(node, ast.Import):
            known |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, module)
            for alias in node.names:
                if alias.name == "*":
                    known |= {name: of for name, of in _imported(origin).items() if not name.startswith("_")}
                else:
                    known[alias.asname or alias.name] = f"{origin}.{alias.name}"
        elif isinstance(node, ast.ClassDef):
            known[node.name] = f"{module}.{node.name}"
    return known


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """Dotted name of the module that `from ... import` names in `module`, which may say it from where it stands."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    path = _path(module)
    inner = path is not None and path.name == "__init__.py"
    return ".".join([*parts[: len(parts) - node.level + inner], *([node.module] if node.module else [])])


def _dotted(base: ast.expr, known: Mapping[str, str]) -> str:
    """Dotted name of a base class, as `Part`, `module.Part` or `Part[Kind]`; "" if the module does not have it."""
    match base:
        case ast.Subscript(value=inner):
            return _dotted(inner, known)
        case ast.Attribute(value=inner, attr=name):
            return f"{found}.{name}" if (found := _dotted(inner, known)) else ""
        case ast.Name(id=name):
            return known.get(name) or (f"builtins.{name}" if hasattr(builtins, name) else "")
        case _:
            return ""


def _inherited(bases: Sequence[ast.expr], known: Mapping[str, str]) -> Mapping[str, Setting] | None:
    """Fields of base classes; None if one of them cannot be read."""
    found: dict[str, Setting] = {}
    for name in (_dotted(base, known) for base in bases):
        of_base = {} if name.startswith("builtins.") else settings(name) if name else None
        if of_base is None:
            return None
        found |= of_base
    return found


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
    """Fields of the dataclass `cls` (a dotted name), those of its bases first; None if it or a base cannot be read."""
    module, _, name = cls.rpartition(".")
    source = _source(module)
    if source is None:
        return None
    tree, lines = source
    known = _imported(module)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return settings(known[name]) if known.get(name, cls) != cls else None
    of_bases = _inherited(node.bases, known)
    if of_bases is None:
        return None
    found = dict(of_bases)
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
    target = _imported(module).get(kind.strip("'\""), "")
    return target if target and settings(target) else ""
