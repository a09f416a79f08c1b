"""The library of on-policy distillation: types, methods and the loop (torch, numpy, standard library).

`opd.train`, `opd.plan`, `opd.evaluate` and `opd.open_run` are the Python interface (docs/python.md). They start engines
and live in `launch`, which the library does not import; they are looked up when they are asked for.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_INTERFACE = ("TrainedRun", "evaluate", "evaluate_sets", "open_run", "plan", "train")
PACKAGES = ("launch", "actors", "learner", "teacher_service", "weight_sync", "hf", "demos")  # installed beside this one
_ERRORS = ("ConfigurationError", "DataError", "OpdError")


def __getattr__(name: str) -> Any:
    if name in _INTERFACE:
        _check_not_hidden()
        return getattr(importlib.import_module("launch.cli.api"), name)
    if name in _ERRORS:
        return getattr(importlib.import_module("opd.errors"), name)
    interface = ", ".join((*_INTERFACE, *_ERRORS))
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {interface} (docs/python.md) and modules; "
        "what else there is are commands (opd --help)"
    )


def _check_not_hidden() -> None:
    """Refuse packages of this project that a module of the user's hides, such as launch.py beside the program."""
    home = Path(__file__).resolve().parents[1]
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.origin and home not in Path(spec.origin).resolve().parents:
            from opd.errors import ConfigurationError

            raise ConfigurationError(
                f"{spec.origin} hides opd's own package {package!r}; rename it, or start Python in another folder"
            )


def __dir__() -> list[str]:
    return sorted([*globals(), *_INTERFACE, *_ERRORS])
