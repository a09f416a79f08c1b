"""A child process that calls functions with a deadline: what hangs or takes all memory ends alone."""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from opd.errors import OpdError

Found = TypeVar("Found")

START_S = 120.0  # importing what a grader needs takes longer than a deadline


@contextmanager
def _without_main() -> Iterator[None]:
    """Context in which a child that starts does not import the main module.

    It has no need of it, and a user's script that trains without asking for its `__name__` would train once more there.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class GradingProcess:
    """Child process for grading, started at the first call and replaced when it is late or has ended; for one thread.

    `begin` with its arguments is the first thing that every child does; `preload` are modules that are imported once
    for all children.
    """

    def __init__(
        self,
        begin: Callable[..., object],
        *arguments: object,
        preload: Sequence[str] = (),
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self._begin, self._arguments = begin, arguments
        self._preload, self._initializer = list(preload), initializer
        self._pool: ProcessPoolExecutor | None = None

    def call(self, work: Callable[..., Found], *arguments: object, deadline_s: float) -> Found:
        """Result of `work` in the child; raises what it raises.

        Raises:
            TimeoutError: not within the deadline.
            BrokenProcessPool: the child died of it.
            OpdError: no child could be started.
        """
        pool = self._pool or self._started()
        try:
            return pool.submit(work, *arguments).result(deadline_s)
        except (TimeoutError, BrokenProcessPool):
            self.close()
            raise

    def _started(self) -> ProcessPoolExecutor:
        apart = multiprocessing.get_context("forkserver")
        if self._preload:
            apart.set_forkserver_preload(self._preload)
        pool = self._pool = ProcessPoolExecutor(1, mp_context=apart, initializer=self._initializer)
        try:
            with _without_main():
                begun = pool.submit(self._begin, *self._arguments)  # which starts the child
            begun.result(START_S)
        except (TimeoutError, BrokenProcessPool) as error:
            self.close()
            raise OpdError(
                f"the process that grades answers did not start in {START_S:g} s ({type(error).__name__}); check "
                "the memory and the processes of this machine, and start Python from a file or a command"
            ) from error
        except OSError as error:
            self.close()
            raise OpdError(
                f"the process that grades answers cannot be started ({error.strerror or error}); check the folder for "
                f"temporary files ({tempfile.gettempdir()}), and how many files and processes may be open"
            ) from error
        return pool

    def close(self) -> None:
        """End the child process, whatever it is doing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list(pool._processes.values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
