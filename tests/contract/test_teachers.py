"""Every backend of teachers says the same of the same text: what a plain forward pass of the model says."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import ConfigurationError, DataError
from opd.ports import AtIds, LastHidden, SampledToken, ScoreRequest, TopK
from opd.types import HiddenScores, TokenScores, TopKScores
from teacher_service.config import OWN_ENGINE, REMOTE, Backend
from tests.contract.conftest import Class, Tiny, make_request, make_requests, open_class
from tests.one_kind import singles
from tests.tiny_models import VOCABULARY, completion_logprobs

EXACT = 2e-5  # nats, float32


@pytest.fixture(scope="module", params=list(Backend), ids=lambda b: b.value)
def school(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[Class]:
    yield from open_class(request.param, tiny)


def test_every_kind_of_testimony_is_the_model_s_own(school: Class) -> None:
    requests = make_requests(school.supports, 30)  # mixed in one call
    assert {type(r.kinds[0]) for r in requests} == school.supports
    worst = 0.0
    for asked, answer in zip(requests, school.score(requests), strict=True):
        full = completion_logprobs(school.plain, asked)
        ids = torch.from_numpy(asked.token_ids).long()
        worst = max(worst, gap(answer.logprobs, full.gather(1, ids[:, None])[:, 0]))
        match asked.kinds[0]:
            case TopK(k=k):
                assert isinstance(answer, TopKScores)
                worst = max(worst, gap(answer.topk_logprobs, full.topk(k).values))
                named = torch.from_numpy(answer.topk_ids.copy()).long()
                worst = max(worst, gap(answer.topk_logprobs, full.gather(1, named)))
                assert all(len(set(row)) == k for row in answer.topk_ids.tolist())
                worst = max(worst, gap(answer.rest, full.scatter(1, named, -torch.inf).logsumexp(-1)))
            case AtIds(ids=named):
                assert isinstance(answer, TopKScores)
                assert np.array_equal(answer.topk_ids, named)
                named = torch.from_numpy(named).long()
                worst = max(worst, gap(answer.topk_logprobs, full.gather(1, named)))
                worst = max(worst, gap(answer.rest, full.scatter(1, named, -torch.inf).logsumexp(-1)))
            case LastHidden():
                assert isinstance(answer, HiddenScores)
                head = school.plain.lm_head.weight
                rebuilt = (answer.hidden.fetch(school.shelf.fetch) @ head.T).log_softmax(-1)
                worst = max(worst, gap(rebuilt, full))
            case SampledToken():
                assert type(answer) is TokenScores
    assert worst <= EXACT


def gap(ours: Any, theirs: torch.Tensor) -> float:
    return float(np.abs(np.asarray(ours) - theirs.numpy()).max())


def test_answers_do_not_depend_on_order_company_or_overlap(school: Class) -> None:
    requests = [r for r in make_requests(school.supports, 20, seed=100) if not isinstance(r.kinds[0], LastHidden)]
    together = school.score(requests)
    shuffled = np.random.default_rng(1).permutation(len(requests))
    apart = school.score([requests[i] for i in shuffled])

    async def overlapping() -> list[Any]:
        halves = (requests[::2], requests[1::2])
        return [singles(one) for one in await asyncio.gather(*(school.teacher.score(half) for half in halves))]

    even, odd = school.run(overlapping())
    for i, answer in zip(shuffled, apart, strict=True):
        alone = school.score([requests[i]])[0] if i < 3 else answer
        half = (even, odd)[i % 2][i // 2]
        for other in (answer, alone, half):
            np.testing.assert_allclose(other.logprobs, together[i].logprobs, atol=EXACT)
            if isinstance(other, TopKScores):
                assert isinstance(together[i], TopKScores)
                np.testing.assert_allclose(other.topk_logprobs, together[i].topk_logprobs, atol=EXACT)


def test_nothing_asked_is_nothing_answered(school: Class) -> None:
    assert school.score([]) == []


def test_a_completion_of_one_token_after_a_context_of_one(school: Class) -> None:
    one = ScoreRequest(context_ids=np.array([7], np.int32), token_ids=np.array([9], np.int32), kinds=(TopK(k=1),))
    (answer,) = school.score([one])
    assert gap(answer.logprobs, completion_logprobs(school.plain, one)[:, 9]) <= EXACT


def test_requests_that_cannot_be_read_are_refused(school: Class) -> None:
    good = make_request(1, 0)

    def refused(match: str, **changes: Any) -> None:
        fields = {"context_ids": good.context_ids, "token_ids": good.token_ids, "kinds": good.kinds}
        with pytest.raises(DataError, match=match):
            school.run(school.teacher.score([good, ScoreRequest(**(fields | changes))]))

    far, empty = np.asarray([VOCABULARY], dtype=np.int32), np.zeros(0, dtype=np.int32)
    refused("0 context", context_ids=empty)
    refused("0 completion", token_ids=empty)
    refused("context has ids outside", context_ids=far)
    refused("completion has ids outside", token_ids=-far)
    refused("tokens, more than the", context_ids=np.ones(200, dtype=np.int32))
    refused(r"51.*50", kinds=(TopK(k=51),))
    if AtIds in school.supports:
        refused(
            "asks at ids outside", kinds=(AtIds(ids=np.full((len(good.token_ids), 2), VOCABULARY, dtype=np.int32)),)
        )
    school.score([good])  # and it serves on


def test_what_a_backend_cannot_answer_it_refuses(school: Class) -> None:
    for kind in range(5):
        asked = make_request(kind, 3)
        if type(asked.kinds[0]) not in school.supports:
            with pytest.raises(ConfigurationError, match="cannot answer"):
                school.run(school.teacher.score([asked]))


def test_a_teacher_that_slept_scores_as_before(school: Class) -> None:
    """To the last bit, twice; meanwhile it refuses, and its weights are not in memory."""
    if school.backend in REMOTE:
        assert not hasattr(school.teacher, "sleep"), "its memory is elsewhere"
        return
    asked = make_requests(school.supports, 6, seed=200)
    before, held = school.score(asked), weighs(school)
    for _ in range(2):
        school.run(school.teacher.sleep())
        school.run(school.teacher.sleep())
        with pytest.raises(ConfigurationError, match="it sleeps; wake it before"):
            school.score(asked)
        assert weighs(school) <= 0.5 * held, "ends of pages stay where they are"
        school.run(school.teacher.wake())
        school.run(school.teacher.wake())
        for one, other in zip(school.score(asked), before, strict=True):
            assert np.array_equal(one.logprobs, other.logprobs)
            if isinstance(one, TopKScores):
                assert np.array_equal(one.topk_logprobs, other.topk_logprobs)


def weighs(school: Class) -> float:
    """Sum of the magnitudes of all parameters that a vLLM teacher has in memory; 0 for others."""
    if school.backend not in OWN_ENGINE:
        return 0.0
    (total,) = school.teacher._engine.result().collective_rpc(magnitude)
    return total


def magnitude(worker: Any) -> float:
    return sum(float(p.detach().abs().sum()) for p in worker.model_runner.model.parameters())


def test_statistics_count(school: Class) -> None:
    before = school.run(school.teacher.stats())
    asked = make_request(0, 5)
    school.score([asked])
    after = school.run(school.teacher.stats())
    assert after.requests == before.requests + 1
    assert after.scored == before.scored + len(asked.token_ids)
    assert after.read == before.read + len(asked.context_ids) + len(asked.token_ids) - 1
    assert after.busy_s > before.busy_s
    assert after.quarantined == 0
