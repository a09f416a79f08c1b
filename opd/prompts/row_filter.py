"""Filter expressions over the columns of a record: a small part of Python, read and never executed.

Names are columns (a dot leads into an object), `column("a b")` is one whose name is none of Python's. There are text,
numbers, `True`, `False`, `None`, lists of them, comparisons, `in`, `and`, `or`, `not`, and the functions `len`,
`lower`, `startswith` and `endswith`.
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd.errors import ConfigurationError

Find = Callable[[str], Any]
"""Value of a column by its name; raises what names the record."""
FUNCTIONS: Mapping[str, tuple[int, Callable[..., Any]]] = {
    "len": (1, len),
    "lower": (1, str.lower),
    "startswith": (2, str.startswith),
    "endswith": (2, str.endswith),
}
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda part, whole: part in whole,
    ast.NotIn: lambda part, whole: part not in whole,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
DEEPEST = 40  # levels of an expression


def parsed(text: str, place: str) -> ast.expr:
    """The expression in `text`, checked. Raises `ConfigurationError` about the setting `place` for any other text."""
    try:
        expression = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        raise ConfigurationError(
            f"{place}={text!r} is no expression ({reason}); write one such as 'len(prompt) < 2000', or name a function "
            "as module:function"
        ) from error
    _check(expression, place, DEEPEST)
    return expression


def value(node: ast.expr, find: Find) -> Any:
    """Value of an expression of `parsed`, with `find` for its columns. Raises `TypeError` for types that do not fit."""
    match node:
        case ast.Constant(value=constant):
            return constant
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [value(item, find) for item in items]
        case ast.Name() | ast.Attribute():
            return find(_column(node))
        case ast.BoolOp(op=joint, values=values):
            return _joined(isinstance(joint, ast.And), values, find)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _truth(value(inner, find))
        case ast.UnaryOp(operand=inner):
            return -value(inner, find)
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compared(value(left, find), ops, others, find)
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=name)]):
            return find(str(name))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return FUNCTIONS[name][1](*[value(argument, find) for argument in arguments])
    raise TypeError(f"a {type(node).__name__} has no value")


def _joined(every: bool, values: Sequence[ast.expr], find: Find) -> bool:
    for one in values:
        if _truth(value(one, find)) is not every:
            return not every
    return every


def _compared(left: Any, ops: Sequence[ast.cmpop], others: Sequence[ast.expr], find: Find) -> bool:
    for op, other in zip(ops, others, strict=True):
        right = value(other, find)
        if not COMPARISONS[type(op)](left, right):
            return False
        left = right
    return True


def _truth(found: Any) -> bool:
    if not isinstance(found, bool):
        raise TypeError(f"{found!r:.40} is neither true nor false; compare it")
    return found


def _column(node: ast.expr) -> str:
    """Dotted name of a column; "" for what is none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (above := _column(node.value)):
        return f"{above}.{node.attr}"
    return ""


def _check(node: ast.expr, place: str, depth: int) -> None:
    """Refuse what is no part of the language, by its own text."""
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            below: Sequence[ast.expr] = ()
        case ast.Name() | ast.Attribute() if _column(node):
            below = ()
        case ast.List(elts=below) | ast.Tuple(elts=below) | ast.BoolOp(values=below):
            pass
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=inner):
            below = [inner]
        case ast.Compare(left=left, comparators=others):
            below = [left, *others]
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str())], keywords=[]):
            below = ()
        case ast.Call(func=ast.Name(id=name), args=below, keywords=[]) if FUNCTIONS.get(name, (-1,))[0] == len(below):
            pass
        case _:
            raise _foreign(node, place)
    if not depth:
        raise _foreign(node, place)
    for one in below:
        _check(one, place, depth - 1)


def _foreign(node: ast.expr, place: str) -> ConfigurationError:
    return ConfigurationError(
        f"{place}: {ast.unparse(node)[:80]!r} is no part of a filter, which has columns, constants, comparisons, in, "
        f"and, or, not, and {', '.join(FUNCTIONS)}; name a Python function as module:function for more"
    )
