"""A wait with an end: what comes in time comes, what is late is cancelled, and the caller's own sentence is raised."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.virtual_time import simulate
from opd import deadlines
from opd.deadlines import backoff, repeated, within
from opd.errors import DataError, OpdError

LATE = OpdError("somebody did not answer; ask again")


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6))
def test_what_takes_longer_than_the_deadline_is_cancelled_and_only_that(deadline_s: float, takes_s: float) -> None:
    ended = list[str]()

    async def work() -> str:
        try:
            await asyncio.sleep(takes_s)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return "said"

    async def waited() -> str:
        try:
            return await within(deadline_s, work(), LATE)
        except OpdError as error:
            return "late" if error is LATE else "another error"

    if abs(takes_s - deadline_s) < 1e-6 * deadline_s:
        return  # both at once
    late = takes_s > deadline_s
    assert simulate(waited(), 1e7) == ("late" if late else "said")
    assert ended == (["cancelled"] if late else [])


def test_what_goes_wrong_in_time_is_told_as_it_is() -> None:
    async def work() -> None:
        raise DataError("damaged")

    with pytest.raises(DataError, match="damaged"):
        asyncio.run(within(1.0, work(), LATE))


@given(st.just(0.0) | st.floats(1e-3, 3600.0), st.integers(0, 10**9), st.floats(0.0, 1e6))
def test_a_pause_doubles_with_every_failure_up_to_the_longest(first_s: float, failures: int, longest_s: float) -> None:
    pause = backoff(first_s, failures, longest_s)
    assert pause == min(longest_s, first_s * 2.0 ** min(failures, 500))
    assert backoff(first_s, failures + 1, longest_s) == pytest.approx(min(longest_s, 2 * pause), rel=1e-12)


@given(failures=st.integers(0, 9), deadline_s=st.floats(0.0, 5.0), pause_s=st.floats(0.1, 2.0))
def test_a_call_is_repeated_while_its_error_is_transient_and_the_next_begins_in_time(
    failures: int, deadline_s: float, pause_s: float
) -> None:
    now, begun = [0.0], list[float]()

    def call() -> str:
        begun.append(now[0])
        if len(begun) <= failures:
            raise ConnectionError("not yet")
        return "an answer"

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deadlines, "monotonic", lambda: now[0])
        patch.setattr(deadlines, "sleep", sleep)
        try:
            ended: object = repeated(call, lambda error: isinstance(error, ConnectionError), deadline_s, pause_s)
        except ConnectionError as error:
            ended = error
        with pytest.raises(ValueError, match="a bug"):
            repeated(lambda: int("a bug"), lambda error: isinstance(error, ConnectionError), 1e9, pause_s)
    assert begun[0] == 0.0 and all(moment < deadline_s for moment in begun[1:])
    assert np.allclose(np.diff(begun), pause_s)
    if ended != "an answer":
        assert str(ended) == "not yet" and begun[-1] + pause_s >= deadline_s
    else:
        assert len(begun) == failures + 1
