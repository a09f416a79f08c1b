"""What scorers do with an answer: each reads none that is false, bounds are exact, rewards become advantages."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opd.errors import DataError
from opd.ports import AtIds, Context, LastHidden, SampledToken, ScoreAnswer, ScoreRequest, TopK
from opd.scorers.ensemble import Ensemble
from opd.scorers.returns import WithReturns
from opd.scorers.reward import GroupAdvantage
from opd.scorers.teacher import SampledTokens, StudentTopK, TeacherHidden, TeacherTopK
from opd.scorers.validation import check_support, validate_scores
from opd.types import HiddenScores, RemoteRows, Scores, StopReason, TokenScores, TopKScores
from opd.types.log_probs import MASS, ROUNDING
from tests.one_kind import answered

N = 3
IDS = np.tile(np.array([5, 6], dtype=np.int32), (N, 1))


def floats(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, dtype=np.float32)


def honest(request: ScoreRequest) -> Any:
    """A true answer of the kind that was asked for."""
    n = len(request.token_ids)
    match request.kinds[0]:
        case LastHidden():
            return HiddenScores(logprobs=floats(-2, n), hidden=RemoteRows(pieces=(("h", np.arange(n)),)))
        case TopK(k=k):
            ids = np.tile(np.arange(k, dtype=np.int32), (n, 1))
            return TopKScores(logprobs=floats(-2, n), topk_ids=ids, topk_logprobs=floats(-2, n, k))
        case AtIds(ids=ids):
            return TopKScores(logprobs=floats(-2, n), topk_ids=ids, topk_logprobs=floats(-2, *ids.shape))
    return TokenScores(logprobs=floats(-2, n))


class Teacher:
    """Answers truly, except that request number `lies` is answered with something false."""

    def __init__(self, lies: int | None = None) -> None:
        self.lies = lies

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        answers = [honest(request) for request in requests]
        if self.lies is not None:
            answers[self.lies] = replace(answers[self.lies], logprobs=floats(np.nan, N))
        return answered(answers)


class Graders:
    """Gives each text the reward that stands in it."""

    eos_id = 0

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(text) for text in completions]

    def decode(self, ids: np.ndarray) -> str:
        return str(int(ids[0]) / 1000)

    generate = receive = encode = encode_all = grade


def engines(**teachers: Any) -> Context:
    any_other: Any = Graders()
    named = teachers or {"default": Teacher()}
    return Context(student=any_other, teachers=named, writers={}, graders={"": any_other}, tokenizer=any_other)


ASKING = [
    SampledTokens(), TeacherTopK(k=2), StudentTopK(), TeacherHidden(), WithReturns(k=2),
    *(Ensemble(shares={"default": 1.0, "b": 2.0}, reader=r) for r in (SampledTokens(), StudentTopK(), TeacherHidden())),
]  # fmt: skip


@pytest.mark.parametrize("scorer", ASKING, ids=str)
def test_no_scorer_lets_a_false_answer_through(scorer: Any, make: Any) -> None:
    """Wherever in a group it is, and whichever of several teachers gave it."""
    assert scorer.requires
    behavior = TopKScores(logprobs=floats(-2, N), topk_ids=IDS, topk_logprobs=floats(-2, N, 2))
    group = [make.trajectory([1], [5, 6, 5], behavior=behavior, sample=i) for i in range(3)]
    assert len(asyncio.run(scorer(group, engines(default=Teacher(), b=Teacher())))) == 3
    for lies in range(3):
        for liar in ("default", "b") if isinstance(scorer, Ensemble) else ("default",):
            box = engines(**({"default": Teacher(), "b": Teacher()} | {liar: Teacher(lies)}))
            with pytest.raises(DataError, match="teacher scores are refused: logprobs contains NaN"):
                asyncio.run(scorer(group, box))


def support(ids: Sequence[int], values: Sequence[float], rest: float, logprob: float = -9.0) -> TopKScores:
    return TopKScores(
        logprobs=floats(logprob, 1),
        topk_ids=np.array([ids], dtype=np.int32),
        topk_logprobs=np.array([values], dtype=np.float32),
        rest=floats(rest, 1),
    )


def request_at(ids: Sequence[int], written: int = 1) -> ScoreRequest:
    kind = AtIds(ids=np.array([ids], dtype=np.int32))
    return ScoreRequest(context_ids=np.ones(1, np.int32), token_ids=np.array([written], np.int32), kinds=(kind,))


@pytest.mark.parametrize("ids", [(5, 6, 7), (7, 5, 5), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_probabilities_of_a_support_and_of_the_rest_are_1_within_the_tolerance(
    ids: tuple[int, ...], sign: int
) -> None:
    """An id that is asked for twice counts once."""
    inside = 0.25 * len(set(ids))
    for error, true in ((0.0, True), (0.9, True), (1.1, False)):
        said = support(ids, [np.log(0.25)] * len(ids), float(np.log(1 - inside + sign * error * MASS)))
        if true:
            validate_scores([request_at(ids)], [(said,)])
            continue
        with pytest.raises(DataError, match=r"the probabilities of a support and of the rest .* do not sum to 1"):
            validate_scores([request_at(ids)], [(said,)])


def test_a_log_probability_exceeds_0_by_rounding_at_most() -> None:
    request = replace(request_at([1]), kinds=(SampledToken(),))
    for value, true in ((0.0, True), (0.9 * ROUNDING, True), (1.1 * ROUNDING, False)):
        if true:
            validate_scores([request], [(TokenScores(logprobs=floats(value, 1)),)])
            continue
        with pytest.raises(DataError, match="a value above 0"):
            validate_scores([request], [(TokenScores(logprobs=floats(value, 1)),)])


@pytest.mark.parametrize(("largest", "true"), [(0, True), (9, True), (10, False), (11, False)])
def test_a_support_names_only_rows_that_the_student_has(largest: int, true: bool) -> None:
    for ids in ([largest, 0], [0, largest]):
        said = support(ids, [-1.0, -1.0], -2.0)
        if true:
            check_support(said, 10)
            continue
        with pytest.raises(DataError, match=f"names id {largest}, but the student's output has 10 rows"):
            check_support(said, 10)
    check_support(TokenScores(logprobs=floats(-1, 1)), 1)
    check_support(Scores(), 1)


SHAPES: dict[str, tuple[Any, Any, str]] = {
    "one id less than asked": (TopK(k=3), honest, "asked for k=3, got k=2"),
    "one id more than asked": (TopK(k=1), honest, "asked for k=1, got k=2"),
    "ids of another shape": (TopK(k=2), {"topk_ids": IDS[:, :1]}, "asked for k=2, got k=1 in topk_ids"),
    "one row less of the rest": (TopK(k=2), {"rest": floats(-1, N - 1)}, f"expected {N} rows of rest, got {N - 1}"),
    "one row more of the rest": (TopK(k=2), {"rest": floats(-1, N + 1)}, f"expected {N} rows of rest, got {N + 1}"),
    "a rest above 0": (TopK(k=2), {"rest": floats(0.1, N)}, "rest contains NaN"),
    "a rest of NaN": (TopK(k=2), {"rest": floats(np.nan, N)}, "rest contains NaN"),
    "one of the ids is another": (AtIds(ids=IDS), {"topk_ids": IDS + np.eye(N, 2, dtype=np.int32)}, "other token ids"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_an_answer_of_another_shape_is_refused(case: str) -> None:
    kind, change, sentence = SHAPES[case]
    token_ids = np.zeros(N, dtype=np.int32)
    request = ScoreRequest(context_ids=np.ones(1, np.int32), token_ids=token_ids, kinds=(kind,))
    true = honest(request)
    validate_scores([request], [(true,)])
    wrong = honest(replace(request, kinds=(TopK(k=2),)) if change is honest else request)
    for name, value in ({} if change is honest else change).items():
        object.__setattr__(wrong, name, value)  # tests check the shapes of what is built, a run does not
    with pytest.raises(DataError, match=f"teacher scores are refused: .*{sentence}"):
        validate_scores([request, request], [(true,), (wrong,)])


rewards = st.lists(st.integers(0, 1000), min_size=2, max_size=6)


@given(given_rewards=rewards, epsilon=st.sampled_from([1e-12, 1e-4, 0.5, 1.0]), scaled=st.booleans())
def test_an_advantage_is_the_distance_from_the_mean_in_deviations_of_the_group(
    make: Any, given_rewards: list[int], epsilon: float, scaled: bool
) -> None:
    """Deviations of a sample (n - 1), plus epsilon; every token of a text has its text's."""
    assume(len(set(given_rewards)) > 1)
    group = [make.trajectory([1], [reward, *[2] * i]) for i, reward in enumerate(given_rewards)]
    said = asyncio.run(GroupAdvantage(scale_by_std=scaled, epsilon=epsilon)(group, engines()))
    values = [reward / 1000 for reward in given_rewards]
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    for i, (value, one) in enumerate(zip(values, said, strict=True)):
        expected = (value - mean) / (deviation + epsilon if scaled else 1)
        assert len(one.advantages) == len(one.rewards) == i + 1
        np.testing.assert_allclose(one.advantages, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one.rewards, value, rtol=1e-6)


@given(reward=st.integers(0, 1000), n=st.integers(2, 6), epsilon=st.sampled_from([1e-12, 1e-4, 1.0]))
def test_a_group_of_equal_rewards_has_no_advantage_and_no_noise(make: Any, reward: int, n: int, epsilon: float) -> None:
    said = asyncio.run(GroupAdvantage(epsilon=epsilon)([make.trajectory([1], [reward])] * n, engines()))
    assert all(float(np.abs(one.advantages).max()) <= 1e-12 / epsilon for one in said)


def test_what_the_limit_cut_is_wrong_whatever_is_in_it(make: Any) -> None:
    group = [make.trajectory([1], [900], stop=stop) for stop in (StopReason.END, StopReason.LENGTH)]
    said = asyncio.run(GroupAdvantage()(group, engines()))
    assert [float(one.rewards[0]) for one in said] == [pytest.approx(0.9), 0.0]


def test_ids_of_a_text_without_tokens_can_be_answered() -> None:
    assert AtIds(ids=np.zeros((0, 4), dtype=np.int32)).unreadable(0, 12, 8) == ""
