"""Small faults of one source file: what is changed, and into what.

Left out by rule, because no test could or should notice: what only people read (docstrings, messages of errors and
assertions, logging), annotations and decorators, abstract classes, switches that cost time or memory alone, deadlines,
and how large the pieces are in which something is done. Left out as noise: what fails at its first use whatever it
computes (a removed local assignment).
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Change = tuple[ast.AST, str, str]  # what is replaced, by which text, and what kind of fault that is

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "|",
}  # fmt: skip
_PAIRS = [
    ("min", "max"), ("any", "all"), ("amin", "amax"), ("argmin", "argmax"), ("sum", "mean"), ("floor", "ceil"),
    ("zeros", "ones"), ("zeros_like", "ones_like"), ("minimum", "maximum"), ("clamp_min", "clamp_max"),
    ("exp", "expm1"), ("log", "log1p"), ("softmax", "log_softmax"), ("sorted", "list"), ("append", "extend"),
    ("issubset", "issuperset"), ("startswith", "endswith"), ("logical_and", "logical_or"),
]  # fmt: skip
_NAMES = dict(_PAIRS) | {right: left for left, right in _PAIRS}
_DROPPED = {"detach", "abs", "clone", "neg", "sort", "strip", "flip", "square", "sqrt"}  # methods: x.abs() becomes x
# Functions of which the order of the arguments is nothing (or where another order fails at once).
_SYMMETRIC = {
    "min", "max", "minimum", "maximum", "fmin", "fmax", "amin", "amax", "gcd", "lcm", "add", "mul", "multiply",
    "equal", "not_equal", "array_equal", "array_equiv", "allclose", "isclose", "eq", "ne", "compare_digest",
    "samefile", "logaddexp", "logaddexp2", "hypot", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor",
    "union", "intersection", "symmetric_difference", "union1d", "intersect1d", "vdot", "promote_types", "result_type",
    "isinstance", "issubclass", "getattr", "hasattr", "setattr", "cast", "TypeVar", "logical_and", "logical_or",
}  # fmt: skip
_SILENT = {"debug", "info", "warning", "error", "exception", "log", "print", "simplefilter", "collect", "freeze"}
_CHEAP = {
    "strict", "non_blocking", "pin_memory", "copy", "inplace", "foreach", "fused", "indent", "ensure_ascii", "daemon",
    "memory_format", "stacklevel", "timeout", "deadline_s", "access_log", "max_workers", "flush", "compresslevel",
    "steps_per_print",
}  # fmt: skip
_PIECES = ("_S", "_s", "logger", "_log", "_CHUNK", "_BLOCK", "_ELEMENTS", "_READERS", "PIECE")  # how names of such end


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`text` replaces bytes `start` to `stop` of `path`; `lines` are those of the statement that has it.

    `inside`: within a function, so that the lines run when it is called (and otherwise when the file is imported).
    """

    path: str
    start: int
    stop: int
    text: str
    kind: str
    lines: tuple[int, int]
    inside: bool

    def applied(self, source: bytes) -> bytes:
        """The file with the fault."""
        return source[: self.start] + self.text.encode() + source[self.stop :]

    def compiles(self, source: bytes) -> bool:
        """Is the file with the fault a program?"""
        try:
            compile(self.applied(source), self.path, "exec", dont_inherit=True)
        except SyntaxError:
            return False
        return True


def mutants(path: str, source: bytes) -> list[Mutant]:
    """All faults of a file, in the order of its text; what they make of it need not compile."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = dict[tuple[int, int, str], Mutant]()
    for (node, text, kind), statement, inside in _Walk().module(tree):
        assert isinstance(node, ast.expr | ast.stmt) and node.end_lineno and node.end_col_offset is not None
        start, stop = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        if source[start:stop].decode() != text:
            found[start, stop, text] = Mutant(
                path=path, start=start, stop=stop, text=text, kind=kind, lines=_lines(statement), inside=inside
            )
    return [found[key] for key in sorted(found)]


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """The lines of a statement, of a compound one those of its head."""
    body = getattr(statement, "body", None)
    last = statement.end_lineno or statement.lineno
    if isinstance(body, list) and body and isinstance(statement, ast.stmt):
        last = max(statement.lineno, body[0].lineno - 1)
    return statement.lineno, last


class _Walk:
    """Goes through a file and yields changes, each with its statement and whether that is inside a function."""

    def module(self, tree: ast.Module) -> Iterator[tuple[Change, ast.stmt, bool]]:
        """All of a file."""
        yield from self._block(tree.body, inside=False)

    def _block(self, body: Sequence[ast.stmt], inside: bool) -> Iterator[tuple[Change, ast.stmt, bool]]:
        for statement in body:
            if _is_for_people(statement):
                continue
            for change in _of_statement(statement):
                yield change, statement, inside
            within = inside or isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
            for name in ("body", "orelse", "finalbody"):
                yield from self._block(getattr(statement, name, []), within)
            for handler in getattr(statement, "handlers", []):
                yield from self._block(handler.body, within)
            for case in getattr(statement, "cases", []):
                yield from self._block(case.body, within)


def _is_for_people(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Import | ast.ImportFrom | ast.Assert | ast.Delete | ast.Global | ast.Nonlocal):
        return True
    if isinstance(statement, ast.Expr):
        value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
        return isinstance(value, ast.Constant) or (isinstance(value, ast.Call) and _name(value.func) in _SILENT)
    if isinstance(statement, ast.ClassDef):
        return any(_name(base) in ("Protocol", "ABC", "Enum", "TypedDict") for base in statement.bases)
    if isinstance(statement, ast.FunctionDef):
        return statement.name in ("__repr__", "__str__")
    if isinstance(statement, ast.If):
        return _name(statement.test) == "TYPE_CHECKING"
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [_name(part) for target in targets for part in getattr(target, "elts", [target])]
        return any(n == "__all__" or n.endswith(_PIECES) for n in names)
    return False


def _of_statement(statement: ast.stmt) -> Iterator[Change]:
    """Faults of a statement itself and of the expressions in its head."""
    if isinstance(statement, ast.Raise):
        yield statement, "pass", "removed raise"
        return
    if isinstance(statement, ast.Expr):
        yield statement, "pass", "removed call"
    elif isinstance(statement, ast.Break):
        yield statement, "continue", "break for continue"
    elif isinstance(statement, ast.Continue):
        yield statement, "break", "continue for break"
    elif isinstance(statement, ast.AugAssign) and type(statement.op) in _ARITHMETIC:
        target, value = ast.unparse(statement.target), ast.unparse(statement.value)
        yield statement, f"{target} {_ARITHMETIC[type(statement.op)]}= {value}", "operator"
        yield statement, "pass", "removed update"
    elif isinstance(statement, ast.Assign) and all(
        isinstance(t, ast.Attribute | ast.Subscript) for t in statement.targets
    ):
        yield statement, "pass", "removed assignment"
    elif isinstance(statement, ast.If | ast.While) and not isinstance(statement.test, ast.Compare | ast.Constant):
        yield statement.test, f"not ({ast.unparse(statement.test)})", "negated condition"
    for expression in _heads(statement):
        yield from _of_expression(expression)


def _heads(statement: ast.stmt) -> Iterator[ast.expr]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from statement.args.defaults
        yield from (default for default in statement.args.kw_defaults if default is not None)
    elif isinstance(statement, ast.AnnAssign):
        yield from [statement.value] if statement.value is not None else []
    elif isinstance(statement, ast.With | ast.AsyncWith):
        yield from (item.context_expr for item in statement.items)
    elif not isinstance(statement, ast.ClassDef | ast.Try | ast.Match):
        for field in ("test", "iter", "value"):
            child = getattr(statement, field, None)
            if isinstance(child, ast.expr):
                yield child


def _of_expression(node: ast.expr) -> Iterator[Change]:
    """Faults of an expression and of all in it."""
    if isinstance(node, ast.JoinedStr | ast.Lambda):
        yield from _of_expression(node.body) if isinstance(node, ast.Lambda) else ()
        return
    if isinstance(node, ast.Call) and (_name(node.func).endswith(("Error", "Warning")) or _name(node.func) in _SILENT):
        return
    yield from _own(node)
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and key.value in _CHEAP):
                yield from _of_expression(value)
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield from _of_expression(child)
        elif isinstance(child, ast.keyword) and child.arg not in _CHEAP:
            yield from _of_expression(child.value)
        elif isinstance(child, ast.comprehension):
            yield from _of_expression(child.iter)
            for condition in child.ifs:
                if not isinstance(condition, ast.Compare):
                    yield condition, f"(not ({ast.unparse(condition)}))", "negated condition"
                yield from _of_expression(condition)


def _own(node: ast.expr) -> Iterator[Change]:
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            other = _COMPARISONS[type(operator)]
            yield node, f"({ast.unparse(left)} {other} {ast.unparse(right)})", "comparison"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _ARITHMETIC and not _is_text(node):
            yield node, f"({_bound(left)} {_ARITHMETIC[type(operator)]} {_bound(right)})", "operator"
        case ast.BoolOp(op=operator, values=values):
            other = " or " if isinstance(operator, ast.And) else " and "
            yield node, "(" + other.join(_bound(value) for value in values) + ")", "and for or"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield node, f"({ast.unparse(operand)})", "removed sign"
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield node, f"({_bound(orelse)} if {_bound(test)} else {_bound(body)})", "negated condition"
        case ast.Constant(value=bool() as value):
            yield node, str(not value), "constant"
        case ast.Constant(value=int() as value):
            yield node, str(value + 1), "constant"
        case ast.Constant(value=float() as value):
            yield node, repr(2 * value if value else 1.0), "constant"
        case ast.Slice():
            for bound in (node.lower, node.upper):
                if bound is not None and not isinstance(bound, ast.Constant | ast.UnaryOp):
                    yield bound, f"{_bound(bound)} + 1", "off by one"
        case ast.Call():
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[Change]:
    name, arguments = _name(node.func), node.args
    if name in _NAMES and not (name in ("append", "extend") and not arguments):
        other = _NAMES[name]
        target = f"{ast.unparse(node.func.value)}.{other}" if isinstance(node.func, ast.Attribute) else other
        yield node.func, target, "another function"
    if name in _DROPPED and isinstance(node.func, ast.Attribute) and not arguments and not node.keywords:
        yield node, _bound(node.func.value), "removed function"
    if name == "range" and not isinstance(arguments[-1], ast.Constant):
        yield arguments[-1], f"{_bound(arguments[-1])} - 1", "off by one"
    plain = [ast.unparse(argument) for argument in arguments]
    starred = any(isinstance(argument, ast.Starred) for argument in arguments)
    if name not in _SYMMETRIC and not starred and plain[-1:] != plain[-2:-1] and len(plain) > 1:
        swapped = [*plain[:-2], plain[-1], plain[-2], *(ast.unparse(keyword) for keyword in node.keywords)]
        yield node, f"{ast.unparse(node.func)}({', '.join(swapped)})", "swapped arguments"


def _name(node: ast.AST) -> str:
    """The last part of a dotted name: "b" of `a.b` and of `a.b[c]`; "" for anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _bound(node: ast.expr) -> str:
    """The text of an operand, in brackets where it is more than a name, a call or a number."""
    text = ast.unparse(node)
    simple = isinstance(node, ast.Name | ast.Call | ast.Attribute | ast.Constant | ast.Subscript)
    return text if simple else f"({text})"


def _is_text(node: ast.BinOp) -> bool:
    """Is it text or a list that is put together, or a union of types?"""
    parts = (node.left, node.right)
    texts = any(isinstance(p, ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp | ast.Dict | ast.Set) for p in parts)
    return texts or any(isinstance(p, ast.Constant) and isinstance(p.value, str | bytes | None) for p in parts)
