"""Timeline of a run: `trace.json`, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_directory import RunDirectory, append_events
from opd.loop.train import StepRecord
from opd.observability.spans import Span, Stage

_TRACK = {role: number for number, role in enumerate(Stage, 1)}


class Tracks:
    """Spans as events of the trace format: a process per role, and in it as many threads as spans overlap.

    Complete events (`ph` X) of one thread must not overlap, so a span goes to the first thread that is free when it
    starts. Times are microseconds since the first span that was seen.
    """

    def __init__(self) -> None:
        self._origin: float | None = None
        self._free: dict[Stage, list[float]] = {role: [] for role in Stage}  # when each thread's last span ends

    def events(self, spans: Sequence[Span]) -> list[dict[str, Any]]:
        """The events to add for more spans, names of new tracks included."""
        made: list[dict[str, Any]] = []
        for span in sorted(spans, key=lambda s: (s.start, s.end)):
            if self._origin is None:
                self._origin = span.start
            made += self._placed(span, self._origin)
        return made

    def _placed(self, span: Span, origin: float) -> list[dict[str, Any]]:
        free, number = self._free[span.role], _TRACK[span.role]
        lane = next((i for i, end in enumerate(free) if end <= span.start), len(free))
        named = []
        if lane == len(free):
            free.append(span.end)
            if lane == 0:
                named += [
                    {"name": "process_name", "ph": "M", "pid": number, "args": {"name": span.role.value}},
                    {"name": "process_sort_index", "ph": "M", "pid": number, "args": {"sort_index": number}},
                ]
            lane_name = {"name": f"{span.role.value} {lane + 1}"}
            named.append({"name": "thread_name", "ph": "M", "pid": number, "tid": lane, "args": lane_name})
        free[lane] = span.end
        # Ends are rounded like starts, so that neighbors of one thread that touch do not overlap.
        start, end = round((span.start - origin) * 1e6), round((span.end - origin) * 1e6)
        event = {
            "name": f"step {span.step}", "cat": span.role.value, "ph": "X", "ts": start, "dur": end - start,
            "pid": number, "tid": lane, "args": {"step": span.step},
        }  # fmt: skip
        return [*named, event]


class TraceTracker:
    """Tracker that adds every step's spans to the run directory's `trace.json`, valid JSON after every step.

    A resumed run has another clock, so it writes `trace_from_step_<n>.json` instead, anew each time it goes on there.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._tracks = Tracks()
        self._path: Path | None = None

    async def __call__(self, record: StepRecord) -> None:
        if self._path is None:
            name = "trace.json" if record.step == 1 else f"trace_from_step_{record.step}.json"
            self._path = self._directory.path / name
            self._path.unlink(missing_ok=True)
        append_events(self._path, self._tracks.events(record.spans))

    def evaluated(self, result: EvaluationPoint) -> None:
        """Ignored: evaluations are no part of the schedule."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close: every step is its own file operation."""
