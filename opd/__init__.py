"""The library of on-policy distillation: types, methods and the loop (torch, numpy, standard library).

`opd.train`, `opd.plan`, `opd.evaluate` and `opd.open_run` are the Python interface (docs/python.md). They start engines
and live in `launch`, which the library does not import; they are looked up when they are asked for.
"""

import importlib
from typing import Any

_INTERFACE = ("TrainedRun", "evaluate", "evaluate_sets", "open_run", "plan", "train")
_ERRORS = ("ConfigurationError", "DataError", "OpdError")


def __getattr__(name: str) -> Any:
    if name in _INTERFACE:
        return getattr(importlib.import_module("launch.cli.api"), name)
    if name in _ERRORS:
        return getattr(importlib.import_module("opd.errors"), name)
    interface = ", ".join((*_INTERFACE, *_ERRORS))
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {interface} (docs/python.md) and modules; "
        "what else there is are commands (opd --help)"
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *_INTERFACE, *_ERRORS])
