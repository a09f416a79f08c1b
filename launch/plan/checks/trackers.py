"""Trackers of a run: whether the packages that they need are installed."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from launch.config.tracker import TrackerConfig
from opd.errors import ConfigurationError

_OWN_FILE = ("sqlalchemy", "alembic")  # what MLflow needs to write a file of its own


def check_trackers(config: TrackerConfig) -> None:
    """Refuse a tracker whose package is missing; nothing is imported."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    wanted: Mapping[str, tuple[bool, Mapping[str, str]]] = {
        "tensorboard": (config.tensorboard, {"tensorboard": "tensorboard"}),
        "mlflow": (
            config.mlflow,
            {"mlflow": "mlflow-skinny"} | ({} if server and "sqlite" not in server else {n: n for n in _OWN_FILE}),
        ),
    }
    for name, (chosen, packages) in wanted.items():
        missing = _missing(packages) if chosen else []
        if missing:
            raise ConfigurationError(
                f"tracker={name} needs {' and '.join(missing)}, but Python finds none here; run "
                f"`pip install {' '.join(missing)}`, or choose another tracker="
            )


def _missing(packages: Mapping[str, str]) -> Sequence[str]:
    """Names on the package index of modules that cannot be imported."""
    return [package for module, package in packages.items() if find_spec(module) is None]
