"""A run's log: what is printed while it runs, as text with the time, in a file of its directory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import localtime, strftime

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control

from launch.artifacts.redaction import masked
from launch.artifacts.terminal import unseen

_log = logging.getLogger(__name__)
_WIDTH = 160  # letters of a table; sentences are never cut


class RunLog(RenderHook):
    """File that gets a copy of all that a console prints, without colors and secrets.

    What is drawn again and again (a live view) is left out. A disk that is full is one warning, and the run goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path: Path | None = path

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Copy what is about to be printed; it is printed as it is."""
        shown = [one for one in renderables if not isinstance(one, Control)]
        if shown:
            plain = unseen(width=_WIDTH)
            plain.print(*shown, soft_wrap=True, highlight=False)
            self.write(plain.file.getvalue())  # type: ignore[attr-defined]
        return renderables

    def write(self, text: str) -> None:
        """Append lines, each with the time."""
        lines = [line.rstrip() for line in masked(text).splitlines() if line.strip()]
        if self._path is None or not lines:
            return
        now = strftime("%Y-%m-%d %H:%M:%S", localtime())
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{now} {line}\n" for line in lines))
        except OSError as error:
            path, self._path = self._path, None
            _log.warning("%s cannot be written (%s); the run goes on without a log", path, error.strerror or error)


class _Copied(logging.Handler):
    """Handler that copies warnings of libraries, which still go where they went."""

    def __init__(self, log: RunLog, *, last: bool) -> None:
        super().__init__(logging.WARNING)
        self._run_log, self._last = log, last

    def emit(self, record: logging.LogRecord) -> None:
        self._run_log.write(f"{record.levelname.lower()}: {record.getMessage()}")
        if self._last and logging.lastResort is not None:  # no other handler prints it
            logging.lastResort.handle(record)


@contextmanager
def logged(console: Console, path: Path) -> Iterator[None]:
    """Copy what `console` prints, and warnings that are logged, to `path`; an error that ends the run stands last."""
    log, root = RunLog(path), logging.getLogger()
    handler = _Copied(log, last=not root.handlers)
    console.push_render_hook(log)
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        log.write("\n".join([f"ended by: {error or type(error).__name__}", *getattr(error, "__notes__", ())]))
        raise
    finally:
        root.removeHandler(handler)
        console.pop_render_hook()
