"""Types and array shapes of the library, enforced on every call while tests run (beartype, jaxtyping).

jaxtyping's own decorator binds the arguments of each call anew and checks them twice, which took most of the time of
the tests of the loop. Here a call is checked once, and the letters of shapes are bound only where a signature has some.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeCallHintViolation, BeartypeDecorHintException, BeartypeException

_whole = jaxtyping.jaxtyped


def _can_be_checked(hint: Any) -> bool:
    try:
        is_bearable(None, hint)
    except BeartypeException:
        return False
    return True


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, without the few hints that cannot be checked at run time (`Self`, `"array[int]"`)."""
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        hints = function.__annotations__
        function.__annotations__ = {n: h if _can_be_checked(h) else Any for n, h in hints.items()}
        return beartype(function)


def _has_shapes(hint: Any) -> bool:
    if isinstance(hint, str):
        return True  # of what only jaxtyping's own decorator looks up
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shapes(part) for part in get_args(hint) if not isinstance(part, str))


def jaxtyped(function: Any = None, *, typechecker: Any = None) -> Any:
    """jaxtyping's decorator, as its import hook asks for it; what is no plain function is left to the original."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if function == "context":
        return _whole("context")
    if not inspect.isfunction(function):
        return _whole(function, typechecker=typechecker)
    shapes = any(map(_has_shapes, function.__annotations__.values()))
    apart = inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function)
    if shapes and (apart or inspect.isasyncgenfunction(function)):
        return _whole(function, typechecker=typechecker)
    typed = checked(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with _whole("context"):
                return typed(*args, **kwargs)
        except BeartypeCallHintViolation as error:
            raise jaxtyping.TypeCheckError(str(error)) from error

    return call if shapes else typed


def enforce(*packages: str) -> None:
    """From now on every function and dataclass of `packages` that is imported is checked."""
    for package in packages:
        assert package not in sys.modules, f"{package} was imported before its types could be enforced"
    module = ModuleType("opd_typechecker")
    module.__dict__["checked"] = checked
    sys.modules["opd_typechecker"] = module  # the hook takes a name, not a function
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping._decorator.jaxtyped = jaxtyped  # where the original finds itself, for `__init__` and methods
    jaxtyping.install_import_hook(list(packages), "opd_typechecker.checked")
