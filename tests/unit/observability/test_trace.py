"""Traces: valid JSON of the trace event format after every step, with nothing lost and nothing overlapping."""

import asyncio
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.artifacts.run_directory import RunDirectory, append_events
from launch.monitors.trace import TraceTracker, Tracks
from opd.loop.train import StepRecord
from opd.observability.spans import Span, Stage
from opd.ports import PublishReport
from opd.types import StepReport

TIMES = st.floats(0, 1000, allow_nan=False, allow_subnormal=False)
SPANS = st.lists(
    st.builds(
        lambda role, step, a, b: Span(role=role, step=step, start=min(a, b), end=max(a, b)),
        st.sampled_from(Stage), st.integers(1, 9), TIMES, TIMES,
    ),
    max_size=30,
)  # fmt: skip


def record(step: int, spans: list[Span]) -> StepRecord:
    return StepRecord(
        step=step, scored=[], weights=[], ledger={}, seconds={}, spans=spans,
        report=StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, trained_tokens=0, metrics={}),
        published=PublishReport(version=step, gap=0.0, nbytes=0),
    )  # fmt: skip


def check(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rules of the format for what we write; returns the complete events."""
    named, threads = set(), defaultdict(list)
    for event in events:
        assert event["ph"] in "MX" and isinstance(event["pid"], int)
        if event["ph"] == "M":
            key = (event["name"], event["pid"], event.get("tid"))
            assert key not in named, "a track was named twice"
            named.add(key)
            continue
        assert {type(event[name]) for name in ("ts", "dur", "pid", "tid")} == {int} and event["dur"] >= 0
        assert ("thread_name", event["pid"], event["tid"]) in named, "a track was used before it was named"
        assert ("process_name", event["pid"], None) in named
        threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered)), "spans of a thread overlap"
    return [event for event in events if event["ph"] == "X"]


@given(st.lists(SPANS, max_size=4))
def test_every_span_is_an_event_and_no_thread_has_two_at_once(told: list[list[Span]]) -> None:
    tracks = Tracks()
    drawn = check([event for spans in told for event in tracks.events(spans)])
    spans = [span for spans in told for span in spans]
    assert sorted((e["cat"], e["name"]) for e in drawn) == sorted((s.role.value, f"step {s.step}") for s in spans)
    if spans:
        origin = min(told[[bool(s) for s in told].index(True)], key=lambda s: s.start).start
        assert sorted(e["ts"] for e in drawn) == sorted(round((s.start - origin) * 1e6) for s in spans)


def test_spans_that_touch_share_a_thread_and_overlapping_ones_do_not() -> None:
    def span(a: float, b: float) -> Span:
        return Span(role=Stage.TEACHER, step=1, start=a, end=b)

    drawn = check(Tracks().events([span(5.0, 6.0), span(6.0, 8.0), span(5.5, 7.0)]))
    assert [(e["tid"], e["ts"], e["dur"]) for e in drawn] == [
        (0, 0, 1_000_000), (1, 500_000, 1_500_000), (0, 1_000_000, 2_000_000),
    ]  # fmt: skip


def test_the_file_is_valid_after_every_step(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    tracker = TraceTracker(directory)
    path = directory.path / "trace.json"
    for step in range(1, 5):
        spans = [
            Span(role=role, step=step, start=10.0 * step + shift, end=10.0 * step + 6 + shift)
            for role in Stage
            for shift in (0.0, 1.0)
        ]
        asyncio.run(tracker(record(step, spans)))
        assert len(check(json.loads(path.read_text()))) == 8 * step
    asyncio.run(tracker(record(5, [])))
    assert len(check(json.loads(path.read_text()))) == 32


def test_a_resumed_run_writes_a_file_of_its_own(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    for clock in (1.0, 0.5):  # killed before its next checkpoint, and resumed there once more
        span = Span(role=Stage.LEARNER, step=8, start=clock, end=clock + 1)
        asyncio.run(TraceTracker(directory)(record(8, [span])))
        assert len(check(json.loads((directory.path / "trace_from_step_8.json").read_text()))) == 1
    assert json.loads((directory.path / "trace_from_step_8.json").read_text())
    assert not (directory.path / "trace.json").exists()


@pytest.mark.parametrize("pieces", [[[{"a": 1}]], [[{"a": 1}, {"b": 2}], [{"c": float("nan")}]], [[], [{"a": "\n]"}]]])
def test_events_are_appended_to_an_array(tmp_path: Path, pieces: list[list[dict[str, Any]]]) -> None:
    path = tmp_path / "events.json"
    for piece in pieces:
        append_events(path, piece)
    flat = [event for piece in pieces for event in piece]
    read = json.loads(path.read_text())
    assert len(read) == len(flat) and [list(event) for event in read] == [list(event) for event in flat]
