"""Import of a user's modules: from the Python path, or the folder where the command was given."""

import importlib
import os
import sys
from types import ModuleType

IMPORTED_FROM = "correct it, or give the command where the module lies, or name its folder in PYTHONPATH"
"""Remedy for a module that cannot be imported."""


def own_module(name: str) -> ModuleType:
    """The module `name` of the user's own. Raises whatever it raises when it is imported.

    The folder joins `sys.path`, so that Ray's workers, which are given that of the driver, find the module too.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last: it stands in for nothing that is installed
    return importlib.import_module(name)
