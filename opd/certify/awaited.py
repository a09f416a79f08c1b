"""Results of coroutines, for checks that are plain functions."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def awaited(work: Coroutine[Any, Any, T]) -> T:
    """Result of a coroutine, in an event loop of its own.

    `asyncio.run` takes over SIGINT meanwhile, and Python writes the whole result as text when it gives that back: a
    tenth of a certificate's time.
    """
    with asyncio.Runner() as runner:
        return runner.get_loop().run_until_complete(work)
