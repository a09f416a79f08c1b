"""Deadline of calls to a teacher in this process (`teacher.deadline_s`)."""

from collections.abc import Awaitable
from typing import TypeVar

from opd.deadlines import within
from opd.errors import ServiceHung
from teacher_service.config import TeacherConfig

Result = TypeVar("Result")


async def in_time(config: TeacherConfig, work: Awaitable[Result], what: str, at_least: float = 0.0) -> Result:
    """The result of `work`. Raises `ServiceHung` after `deadline_s` seconds (or `at_least`, if that is more)."""
    deadline_s = max(config.deadline_s, at_least)
    hung = ServiceHung(
        f"the teacher did not finish {what} within {deadline_s:.0f} s; raise teacher.deadline_s, or add "
        "teacher.replicas"
    )
    return await within(deadline_s, work, hung)
