"""A run in a notebook: one panel below the cell, which is drawn anew while the run goes on."""

from time import monotonic
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.terminal import unseen
from launch.monitors.live_view import LiveView
from launch.monitors.step_metrics import Meter
from opd.loop.train import StepRecord

_PAUSE_S = 0.5  # between two drawings; a notebook keeps up with no more
_WIDTH = 100  # letters
_STYLE = "font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace;line-height:1.25;white-space:pre;margin:0"


class NotebookView:
    """Notebook view: the panel of a terminal (`LiveView`) as an output of the cell, which is replaced."""

    def __init__(self, *, title: str, steps: int, meter: Meter) -> None:
        silent = unseen(quiet=True)
        self._view = LiveView(title=title, steps=steps, meter=meter, console=silent)
        self._shown: Any = None
        self._last = 0.0

    async def __call__(self, record: StepRecord) -> None:
        await self._view(record)
        if monotonic() - self._last > _PAUSE_S:
            self._draw()

    def evaluated(self, result: EvaluationPoint) -> None:
        """Show the newest accuracy."""
        self._view.evaluated(result)
        self._draw()

    def __enter__(self) -> Self:
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state below the cell."""
        self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        self._last = monotonic()
        bundle = {"text/html": self._html(), "text/plain": self._text()}
        if self._shown is None:
            self._shown = display(bundle, raw=True, display_id=True)
        else:
            self._shown.update(bundle, raw=True)

    def _html(self) -> str:
        return self._drawn().export_html(inline_styles=True, code_format=f'<pre style="{_STYLE}">{{code}}</pre>')

    def _text(self) -> str:
        return self._drawn().export_text()

    def _drawn(self) -> Console:
        console = unseen(record=True, width=_WIDTH, colored=True)
        console.print(self._view)
        return console
