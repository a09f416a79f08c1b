"""Where this project departs from a cited paper, the published form exists, too, and is that of its equation."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from launch.config.run_config import run_config
from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.loss.packing import SequenceMean, TokenMean, pack
from opd.ports import Layout
from opd.scorers.returns import WithReturns, returns
from opd.token_weights.length import SkipTruncated
from opd.token_weights.special_tokens import SkipFirst, look_up
from opd.token_weights.teachers import PromptWeight, TeacherBalance
from opd.types import AdvantageScores, Scores, TokenScores

V = 6


def of_step(make: Any, lengths: list[int]) -> tuple[list[Any], list[torch.Tensor]]:
    """A step of texts with advantages, and for each text the logits of the student that reads it."""
    draw = np.random.default_rng(3)
    step, rows = [], []
    for n in lengths:
        ids = draw.integers(0, V, n).astype(np.int32)
        scores = AdvantageScores(advantages=np.full(n, draw.normal(), np.float32), rewards=np.zeros(n, np.float32))
        behavior = TokenScores(logprobs=np.log(draw.uniform(0.1, 0.9, n)).astype(np.float32))
        step.append(make.scored([1], ids, scores, behavior=behavior))
        rows.append(torch.from_numpy(draw.normal(size=(n, V))))
    return step, rows


def divided(method: Any, step: list[Any], rows: list[torch.Tensor], weights: list[np.ndarray], layout: Layout) -> float:
    """The loss that a learner reports for a step."""
    total, at = 0.0, {id(s.trajectory.token_ids): r for s, r in zip(step, rows, strict=True)}
    for rank in pack(step, weights, layout, method.normalizer):
        for batch in rank:
            here = batch.to("cpu", lambda x: x)
            owners = np.searchsorted(batch.cu_seqlens, batch.predict_at, side="right") - 1
            texts = [s for s in step if any(np.array_equal(s.trajectory.token_ids, i) for i in _targets(batch, owners))]
            logits = torch.cat([at[id(t.trajectory.token_ids)] for t in texts])
            loss = method.objective(StudentLogits(logits=logits, overlap_k=0), here).loss
            total += float((here.weights.double() * loss).sum()) / batch.denominator
    return total


def _targets(batch: Any, owners: np.ndarray) -> list[np.ndarray]:
    return [batch.target_ids[owners == i] for i in range(len(batch.cu_seqlens) - 1)]


@pytest.mark.parametrize("name", ["grpo", "grpo_token_mean"])
def test_grpo_is_averaged_over_each_answer_or_over_all_tokens(make: Any, name: str) -> None:
    """arXiv 2402.03300 eq. 3: `1/G sum_i 1/|o_i| sum_t min(r A, clip(r) A)`; DAPO's: `1/sum|o_i| sum_i sum_t`."""
    lengths = [2, 9, 5, 1]
    step, rows = of_step(make, lengths)
    method = run_config([f"method={name}", "prompts.group_size=2"]).method
    terms = []
    for item, z in zip(step, rows, strict=True):
        ids = torch.from_numpy(item.trajectory.token_ids).long()
        p = z.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        r = (p - torch.from_numpy(item.trajectory.behavior.logprobs)).exp()
        a = torch.from_numpy(item.scores.advantages)
        terms.append(-torch.minimum(r * a, r.clamp(0.8, 1.2) * a))
    means = [float(t.mean()) for t in terms]
    published = sum(means) / len(means) if name == "grpo" else float(torch.cat(terms).mean())
    for layout in (Layout(ranks=1, tokens_per_microbatch=99), Layout(ranks=2, tokens_per_microbatch=9)):
        found = divided(method, step, rows, [np.ones(n) for n in lengths], layout)
        assert found == pytest.approx(published, rel=1e-6)
    assert abs(sum(means) / len(means) / float(torch.cat(terms).mean()) - 1) > 0.01, "the two would not be told apart"


def test_gkd_divides_each_text_by_its_own_length_and_masked_tokens_do_not_count(make: Any) -> None:
    """arXiv 2306.13649: `D(y|x) = 1/L_y sum_t D_t`, then the mean over texts."""
    assert isinstance(run_config(["method=gkd"]).method.normalizer, SequenceMean)
    step, _ = of_step(make, [4, 2, 3])
    weights = [np.array([2.0, 0, 2, 0]), np.ones(2), np.zeros(3)]
    ((batch,),) = pack(step, weights, Layout(ranks=1, tokens_per_microbatch=99), SequenceMean())
    assert batch.denominator == 2 and batch.weights.tolist() == [1.0, 1.0, 0.5, 0.5]
    ((plain,),) = pack(step, weights, Layout(ranks=1, tokens_per_microbatch=99), TokenMean())
    assert plain.denominator == 4 and plain.weights.tolist() == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("discount", [1.0, 0.95])
def test_minillms_return_begins_after_the_token_or_with_it(own: bool, normalized: bool, discount: float) -> None:
    """The paper's long part is `R_{t+1}`; the released code's rewards are summed from the token itself on."""
    r = np.random.default_rng(0).normal(size=7)
    first = 0 if own else 1
    for t, got in enumerate(returns(r, discount, normalized, own)):
        terms = [discount**i * x for i, x in enumerate(r[t + first :])]
        assert got == pytest.approx(sum(terms) / (max(len(terms), 1) if normalized else 1), abs=1e-12)
    scorer = run_config(["method=minillm", *(["method.scorer.own_reward=true"] if own else [])]).method.scorer
    assert isinstance(scorer, WithReturns) and scorer.own_reward is own


def test_local_support_matching_leaves_out_an_end_that_the_paper_rewrites(make: Any) -> None:
    """`<|endoftext|>` counts as `<|im_end|>` there, whose first occurrence is not trained."""
    ends = {"<|endoftext|>": 4, "<|im_end|>": 5}
    weights = look_up(run_config(["method=local_support_matching"]).method.weights, ends)
    step = [make.scored([1], [2, 3, 4]), make.scored([1], [2, 5]), make.scored([1], [2, 3])]
    assert [w.tolist() for w in weights["special"](step, engines(make_world(0, 6), RequestLog()))] == [
        [1, 1, 0],
        [1, 0],
        [1, 1],
    ]


ONE_ID = {
    "local_support_matching": ("method.scorer.k", ["method.scorer.k=1"]),
    "renormalized_forward_kl": ("method.scorer.k", ["method.scorer.k=1"]),
    "tail_bucket_jensen_shannon": ("method.scorer.k", ["method.scorer.k=1", "method.objective.outside=RENORMALIZED"]),
    "rethinking_eq5": ("method.rollout.record_topk", ["method.rollout.record_topk=1"]),
    "intersection_reverse_kl": ("method.objective.support.k", ["method.objective.support.k=1"]),
    "eopd": ("method.objective.k", ["method.objective.k=1"]),
}


@pytest.mark.parametrize("name", ONE_ID)
def test_a_renormalized_objective_on_a_single_id_is_refused(name: str) -> None:
    setting, overrides = ONE_ID[name]
    with pytest.raises(
        ConfigurationError, match=rf"renormalizes over its support .* but {setting}=1, .*; set {setting}=2"
    ):
        run_config([f"method={name}", *overrides])
    run_config([f"method={name}", *[o.replace("=1", "=2") for o in overrides]])


def test_one_id_is_enough_where_nothing_is_renormalized() -> None:
    for overrides in (
        ["method=tail_bucket_reverse_kl", "method.scorer.k=1"],
        ["method=rethinking_code", "method.rollout.record_topk=1"],
        ["method=union_reverse_kl", "method.objective.support.k=1"],
    ):
        run_config(overrides)


READING = {
    "token": SkipFirst(token_ids=[3]),
    "end": SkipTruncated(),
    "inside": TeacherBalance(filters={"f": SkipFirst(token_ids=[3])}),
}
STATE = {"prompt": PromptWeight(), "counts": TeacherBalance()}
SOME = ["sampled_reverse_kl", "topk_reverse_kl", "vopd", "minillm", "grpo", "full_reverse_kl", "monte_carlo_reverse_kl"]


@pytest.mark.parametrize("name", SOME)
def test_a_weight_that_reads_what_was_written_is_refused_with_a_sampled_estimate(name: str) -> None:
    """GRPO's credit is for what was written, so it may drop texts; weights of the state go with everything."""
    method = run_config([f"method={name}", "prompts.group_size=2"]).method
    assert replace(method, weights=STATE)
    refused = name in SOME[:4]
    for key, weight in READING.items():
        sentence = rf"weight '{key}' \w+ depends on what was sampled, but objective \w+ estimates"
        with pytest.raises(ConfigurationError, match=sentence) if refused else nullcontext():
            replace(method, weights={key: weight})

    @dataclass(frozen=True)
    class Silent:  # what does not say so is taken to read everything
        consumes: ClassVar[type[Scores]] = Scores

        def __call__(self, scored: Any, context: Any) -> list[np.ndarray]:
            return [np.ones(len(s.trajectory)) for s in scored]

    with pytest.raises(ConfigurationError, match="Silent depends on") if refused else nullcontext():
        replace(method, weights={"mine": Silent()})
