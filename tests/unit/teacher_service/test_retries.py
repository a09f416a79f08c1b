"""What becomes of a remote teacher's answers: tried again, refused for good, or raised as one sentence."""

import asyncio
from typing import Any

import numpy as np
import pytest

from opd.errors import ConfigurationError, OpdError
from opd.types import HiddenScores, RemoteRows, TopKScores
from teacher_service import retries
from teacher_service.backends.http import _check_values, _finite
from teacher_service.config import TeacherConfig
from teacher_service.retries import NoAnswer, RetryLoop, Unreadable, WrongAnswer, _refused, together

T = np.float32


def retries_of(**fields: Any) -> RetryLoop:
    return RetryLoop(TeacherConfig(path="here", url="http://there", **fields))


def ends(attempts: RetryLoop, error: Exception, right_at: int = 99) -> tuple[int, object]:
    """How often was tried what fails with `error` before its attempt number `right_at`, and how that ended."""
    tried: list[int] = []

    async def attempt(number: int) -> str:
        tried.append(number)
        if number == right_at:
            return "an answer"
        raise error

    try:
        return len(tried), asyncio.run(attempts(attempt))
    except OpdError as raised:
        return len(tried), str(raised)
    finally:
        assert tried == list(range(len(tried)))


def test_a_call_is_tried_as_often_as_it_may_with_a_pause_between_any_two(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(retries.asyncio, "sleep", sleep)
    tried, said = ends(retries_of(retries=3, backoff_s=2.0), NoAnswer("lost"))
    assert (tried, len(pauses)) == (4, 3), "none after the last attempt"
    assert "no believable answer in 4 attempts (last: lost)" in str(said)
    assert all(2.0**n <= pause <= 2.0 * 2.0**n for n, pause in enumerate(pauses)), "each twice as long, jittered"
    pauses.clear()
    assert ends(retries_of(retries=3), NoAnswer("busy", 7.0), right_at=2)[1] == "an answer"
    assert len(pauses) == 2 and min(pauses) >= 7.0, "as long as the server asks for"
    pauses.clear()
    ends(retries_of(retries=1, backoff_s=3600), NoAnswer("busy", 1e9))
    assert max(pauses) <= retries.LONGEST_WAIT_S


def test_wrong_answers_in_a_row_give_a_teacher_up_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "LONGEST_WAIT_S", 0.0)
    teacher = retries_of(retries=9, max_consecutive_failures=3)
    tried, said = ends(teacher, WrongAnswer("it lies"))
    assert "not asked again after 3 wrong answers in a row (last: it lies)" in str(said) and teacher.quarantined == 3
    assert ends(teacher, WrongAnswer("it lies"))[0] == 0 and tried <= 3
    teacher = retries_of(retries=9, max_consecutive_failures=3)
    for _ in range(3):  # a right answer between them clears it
        assert ends(teacher, WrongAnswer("it lies"), right_at=2)[1] == "an answer"


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        *((status, NoAnswer, f"status {status}") for status in (400, 408, 425, 429, 500, 502, 503, 599)),
        *((status, ConfigurationError, "refuses our token") for status in (401, 403)),
        *((status, Unreadable, "cannot take a request") for status in (413, 422)),
        *((status, ConfigurationError, "correct teacher.url") for status in (301, 402, 404, 405, 418)),
    ],
)
def test_what_a_status_means(status: int, kind: type[OpdError], says: str) -> None:
    error = _refused("http://there", status, b"so  it\nsays", "12")
    assert type(error) is kind and says in str(error) and (says == "refuses our token" or "so it says" in str(error))
    assert not isinstance(error, NoAnswer) or error.wait_s == 12.0
    late = _refused("http://there", status, b"", "Wed, 21 Oct 2026 07:28:00 GMT")
    assert not isinstance(late, NoAnswer) or late.wait_s == 0.0, "a date is not waited for"


def test_of_several_failures_one_sentence_is_raised_and_a_bug_is_not_hidden_by_it() -> None:
    async def fails(error: Exception) -> None:
        raise error

    def run(*errors: Exception) -> None:
        asyncio.run(together([fails(error) for error in errors]))

    with pytest.raises(OpdError, match="the first"):
        run(OpdError("the first"), OpdError("the second"))
    with pytest.raises(BaseExceptionGroup) as caught:
        run(OpdError("the first"), ZeroDivisionError("a bug"))
    assert len(caught.value.exceptions) == 2


@pytest.mark.parametrize(
    ("bits", "number"), [(0x7F7F, True), (0x7F80, False), (0xFF80, False), (0x7FC1, False), (0x8000, True)]
)
def test_words_of_bfloat16_that_are_no_numbers_are_seen(bits: int, number: bool) -> None:
    assert _finite(np.array([[0x3F80, bits]], dtype=np.uint16)) is number
    assert _finite(np.array([1.0, 3e38], dtype=T)) and not _finite(np.array([1.0, np.nan], dtype=T))


@pytest.mark.parametrize(("ids", "fine"), [([[0, 9]], True), ([[-1, 3]], False), ([[3, 10]], False), ([], True)])
def test_ids_beyond_the_vocabulary_are_wrong(ids: list[list[int]], fine: bool) -> None:
    support = np.array(ids, dtype=np.int32).reshape(len(ids), 2)
    answer = TopKScores(
        logprobs=np.zeros(len(ids), dtype=T), topk_ids=support, topk_logprobs=np.full(support.shape, -2, dtype=T)
    )
    if fine:
        _check_values(answer, _Rows(10))  # type: ignore[arg-type]
        return
    with pytest.raises(WrongAnswer, match="outside its vocabulary of 10"):
        _check_values(answer, _Rows(10))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_hidden_states_that_are_no_numbers_are_wrong(value: float) -> None:
    rows = RemoteRows(pieces=((np.array([[0.5, value]], dtype=T), np.array([0])),), row_nbytes=8)
    answer = HiddenScores(logprobs=np.zeros(1, dtype=T), hidden=rows)
    if np.isfinite(value):
        _check_values(answer, _Rows(10))  # type: ignore[arg-type]
        return
    with pytest.raises(WrongAnswer, match="NaN or infinity"):
        _check_values(answer, _Rows(10))  # type: ignore[arg-type]


class _Rows:
    """As far as an identity is read here."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
