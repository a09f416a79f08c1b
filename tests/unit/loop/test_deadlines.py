"""A wait with an end: what comes in time comes, what is late is cancelled, and the caller's own sentence is raised."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.virtual_time import simulate
from opd.deadlines import within
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
