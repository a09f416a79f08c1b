"""Imports of large packages without garbage collection, which takes a sixth of their time and finds nothing."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A block of imports alone: what they make stays, and is not looked through, neither meanwhile nor later.

    Without the second, the collector looks at a million new objects three times, as they grow old, which costs as much
    again as the first. Not for code that loads a model: what that lets go of is to be freed soon.
    """
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was_on:
            gc.enable()
