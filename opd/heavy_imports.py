"""Imports of large packages without garbage collection, which takes a sixth of their time and finds nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A block of imports alone: what they make stays, yet would be looked through a thousand times.

    Not for code that loads a model: what that lets go of is to be freed soon.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
