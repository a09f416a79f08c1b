"""Checks of the place of a run: its name, its directory, and write access."""

import re
import tempfile
from pathlib import Path

from launch.artifacts.run_directory import LATEST, check_name, taken
from launch.checkpoint.resume import can_begin_again
from launch.config.run_config import RunConfig
from opd.errors import ConfigurationError


def check_place(config: RunConfig) -> None:
    """Refuse an invalid name, a directory that is another run's, and a place that cannot be written."""
    if config.run_name:
        check_name(config.run_name)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", config.output_dir):
        raise ConfigurationError(
            f"output_dir={config.output_dir} is the address of a store, and a run is written to folders of this "
            "machine; mount the store and give that folder, or copy the run there afterwards"
        )
    goes_on = config.resume == LATEST or config.resume.isdecimal()
    path = Path(config.output_dir) / config.run_name
    if config.run_name and not goes_on and path.exists() and not can_begin_again(path):
        raise taken(path)
    check_writable(Path(config.output_dir))


def check_writable(root: Path) -> None:
    """Raise `ConfigurationError` unless a file can be made in `root`, or in the deepest existing parent of it."""
    if root.is_symlink() and not root.exists():
        raise ConfigurationError(f"output_dir={root} is a link to nothing; make what it points to, or choose another")
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # without a name: a copy of this folder must not see it
            pass
    except OSError as error:
        raise ConfigurationError(
            f"output_dir={root} cannot be written ({error.strerror or error}: {there}); choose another output_dir=..."
        ) from error
