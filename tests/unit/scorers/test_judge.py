"""A judge's verdict as a reward: what it is asked, what it pays, and that an answer cannot break out of its place."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.method.terms import Term
from opd.objectives.sampled import ClippedPolicyGradient, LogprobSource, SampledReverseKL
from opd.rollouts.student import StudentRollout
from opd.scorers.judge import JudgeAdvantage
from opd.scorers.teacher import SampledTokens
from opd.types import StopReason, TokenScores, Trajectory
from tests.method_needs import NEEDS

WORLD = make_world(0, names=("default", "judge"), named=frozenset({"judge"}))
ROLLOUT = StudentRollout(max_tokens=8)
SCORER = JudgeAdvantage(before="{prompt} 5", after="7 {answer}", yes="1", no="2")


def group(size: int = 3) -> tuple[Any, Any, RequestLog]:
    prompts = [replace(p, answer="6") for p in WORLD.prompts if p.id == WORLD.prompts[0].id][:size]
    log = RequestLog()
    context = engines(WORLD, log)
    return asyncio.run(ROLLOUT(prompts, context)), context, log


def test_the_reward_is_the_probability_of_yes_among_the_verdicts_behind_the_whole_answer() -> None:
    texts, context, log = group()
    found: Any = asyncio.run(SCORER(texts, context))
    rewards = []
    for text in texts:
        ids = np.asarray([*text.prompt.student_ids, 5, *text.token_ids, 7, 6], dtype=np.int32)
        yes, no = (
            float(WORLD.teachers["judge"].logprobs([(ids, np.asarray([v], dtype=np.int32))])[0][0, v].exp())
            for v in (1, 2)
        )
        rewards.append(yes / (yes + no))
        assert [r.token_ids.tolist() for n, r in log.score_requests if r.context_ids.tolist() == ids.tolist()] == [
            [1],
            [2],
        ]
    assert {name for name, _ in log.score_requests} == {"judge"}
    np.testing.assert_allclose([s.rewards[0] for s in found], rewards, atol=1e-6)
    expected = (np.asarray(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-4)
    for text, scores, advantage in zip(texts, found, expected, strict=True):
        np.testing.assert_allclose(scores.advantages, np.full(len(text), advantage), atol=1e-4)


class _Hostile:
    """Tokenizer that reads `<end>` as the token 0, which `decode` leaves out, and spells the ids 8 and 9 as it."""

    eos_id = 0
    told: "list[str]"

    def __init__(self, of: Any) -> None:
        self._of, self.told = of, []

    def encode(self, text: str) -> np.ndarray:
        self.told.append(text)
        return self._of.encode(text.replace("<end>", " 0 "))

    def encode_all(self, prompts: Any) -> list[np.ndarray]:
        return [self.encode(str(prompt.text)) for prompt in prompts]

    def decode(self, ids: np.ndarray) -> str:
        return " ".join({8: "<end", 9: ">"}.get(int(i), str(i)) for i in ids if i)


def test_what_an_answer_spells_is_data_and_its_special_tokens_are_left_out() -> None:
    texts, context, log = group(2)
    tokenizer: Any = _Hostile(context.tokenizer)
    ids = np.asarray([8, 9, 0, 1], dtype=np.int32)  # spells <end>, then ends, then says yes
    hostile = Trajectory(
        prompt=texts[0].prompt,
        sample=0,
        token_ids=ids,
        behavior=TokenScores(logprobs=np.zeros(4, dtype=np.float32)),
        loss_mask=np.ones(4, dtype=bool),
        versions=np.zeros(4, dtype=np.int32),
        stop=StopReason.END,
    )
    asyncio.run(SCORER([hostile, texts[1]], replace(context, tokenizer=tokenizer)))
    first = log.score_requests[0][1].context_ids.tolist()
    assert first == [*texts[0].prompt.student_ids.tolist(), 5, 8, 9, 1, 7, 6]
    assert not any("<end" in text or "8" in text for text in tokenizer.told)  # nothing of it was encoded


def test_verdicts_that_begin_with_the_same_token_are_refused() -> None:
    texts, context, _ = group()
    for words in ({"yes": "3 1", "no": "3 2"}, {"yes": "", "no": "3"}):
        with pytest.raises(ConfigurationError, match="tells verdicts by their first tokens"):
            asyncio.run(replace(SCORER, **words)(texts, context))


def test_such_verdicts_are_refused_when_the_run_is_planned() -> None:
    judged = ["experiment=shop", "method=judged", *NEEDS["judged"], "method.terms.verdict.scorer.no=1"]
    with pytest.raises(ConfigurationError, match="tells verdicts by their first tokens, but yes='1' begins with"):
        make_plan(run_config(judged))


def test_without_its_factor_it_is_plain_distillation_bit_for_bit_and_the_judge_is_not_asked() -> None:
    plain = SampledReverseKL(signal=LogprobSource.STUDENT)
    term = Term(scorer=SCORER, objective=ClippedPolicyGradient(), coefficient=0.0)
    method = Method(name="m", rollout=ROLLOUT, scorer=SampledTokens(), objective=plain, terms={"verdict": term})
    assert method.loss == plain and not method.is_sum
    assert not any(getattr(scorer, "judge", "") for scorer in (t.scorer for t in method.every_term.values()))
