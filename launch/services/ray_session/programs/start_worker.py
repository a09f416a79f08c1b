"""Start of a Ray worker: set the environment of its actor, then become Ray's own worker program.

Ray's program for this (`ray/_private/workers/setup_worker.py`) does the same and imports Ray for it: half a second of a
processor for every actor, before its own process begins to import anything. What this one does not know (a container, a
command before the worker, another language) goes to Ray's.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence

_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context", "--language"


def main(arguments: Sequence[str]) -> None:
    """Replace this process by the worker; never returns."""
    own, rest = split(arguments)
    context = json.loads(own.get(_CONTEXT) or "{}")
    python = context.get("py_executable") or sys.executable
    if own.get(_LANGUAGE) != "PYTHON" or not plain(context) or not os.path.isfile(python):
        os.execv(sys.executable, [sys.executable, rays_own(), *arguments])
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = expanded(value)
    os.execv(python, [python, *rest])


def split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Arguments for this program, and those of the worker."""
    own, rest = dict[str, str](), list[str]()
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in (_CONTEXT, _LANGUAGE):
            own[name] = value
        else:
            rest.append(argument)
    return own, rest


def plain(context: Mapping[str, object]) -> bool:
    """Whether the context has nothing but variables and an interpreter."""
    return all(name in ("env_vars", "py_executable") or not value for name, value in context.items())


def expanded(value: str) -> str:
    """A variable's value with others' in place of `${NAME}`, nothing in place of unknown ones, as Ray has it."""
    if "$" not in value:
        return value
    import re

    return re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))


def rays_own() -> str:
    """Ray's program, found without importing Ray."""
    from importlib.util import find_spec

    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None
    return os.path.join(os.path.dirname(spec.origin), "_private", "workers", "setup_worker.py")


if __name__ == "__main__":
    main(sys.argv[1:])
