"""Progress of what is fetched from the hub: a bar on a terminal, a line now and then in a log."""

from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from hf.hub.cache import Snapshot
from launch.artifacts import terminal

EVERY_S = 15.0  # between two lines in a log
SMALL = 1 << 20  # bytes that are not worth a bar


class Progress:
    """Context in which downloads are shown on the error output."""

    def __init__(self) -> None:
        self._console = terminal.console(stderr=True)
        self._bars: Bars | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bars = Bars(*columns, TimeRemainingColumn(), console=self._console, transient=True)

    def __enter__(self) -> "Progress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def announce(self, known: Snapshot, files: Sequence[str]) -> Callable[[int], None]:
        """Say what is fetched now; returns the counter of its bytes."""
        total = sum(max(0, known.files.get(file, 0)) for file in files)
        if not files:
            return lambda _: None
        what = f"{known.key}: fetching {known.pinned}, {len(files)} file{'s' * (len(files) > 1)}, {total / 1e6:.1f} MB"
        self._console.print(what, soft_wrap=True, highlight=False)
        if total < SMALL:
            return lambda _: None
        return self._bar(known.key, total) if self._bars is not None else self._lines(known.key, total)

    def _bar(self, key: str, total: int) -> Callable[[int], None]:
        bars = self._bars
        assert bars is not None
        task = bars.add_task(key, total=total)
        return lambda more: bars.advance(task, more)

    def _lines(self, key: str, total: int) -> Callable[[int], None]:
        seen, said = 0, monotonic()

        def count(more: int) -> None:
            nonlocal seen, said
            seen += more
            if monotonic() - said >= EVERY_S:
                said = monotonic()
                self._console.print(f"{key}: {seen / 1e6:.0f} of {total / 1e6:.0f} MB", soft_wrap=True, highlight=False)

        return count
