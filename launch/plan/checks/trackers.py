"""Trackers of a run: whether the packages that they need are installed, and addresses are some."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from urllib.parse import urlsplit

from launch.artifacts.redaction import masked
from launch.config.tracker import TrackerConfig
from opd.errors import ConfigurationError

_OWN_FILE = ("sqlalchemy", "alembic")  # what MLflow needs to write a file of its own


def check_trackers(config: TrackerConfig) -> None:
    """Refuse a tracker whose package is missing; nothing is imported."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if config.mlflow and server:
        _check_address(server)
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


def _check_address(server: str) -> None:
    """Refuse what MLflow would take for a folder, or for a server without a name, and would explain as something
    else.
    """
    found = urlsplit(server)
    if found.scheme.startswith("databricks") or server.startswith("databricks"):
        return
    if "://" not in server or (found.scheme in ("http", "https") and not found.hostname):
        raise ConfigurationError(
            f"MLFLOW_TRACKING_URI needs an address such as http://127.0.0.1:5000 or sqlite:////PATH/FILE.db, got "
            f"{masked(server)!r}; correct it, or choose another tracker="
        )


def _missing(packages: Mapping[str, str]) -> Sequence[str]:
    """Names on the package index of modules that cannot be imported."""
    return [package for module, package in packages.items() if find_spec(module) is None]
