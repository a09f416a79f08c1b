"""Packing keeps every token, its testimony and its context together, and no split changes the gradient.

Two devices prove it. *Recognizable ids*: token `j` of sequence `i` (prompt and completion counted through) has the id
`1000 i + j`, and everything said about it is a function of that id, so any misplaced row is seen. *A real model*: a
small causal transformer in float64, compared with every trajectory read on its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.errors import ConfigurationError, DataError
from opd.loss.chunked import StudentLogits, chunked_loss
from opd.loss.packing import Constant, Normalizer, SequenceMean, SequenceSum, TokenMean, halves, pack
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.objectives.support import Outside
from opd.objectives.topk import HeadTailDivergence, TopKDivergence
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.ports import Layout
from opd.types import Batch, HiddenScores, RemoteRows, Scored, Scores, TokenScores, TopKScores, VocabularyScores

NORMALIZERS = (TokenMean(), SequenceSum(), Constant(divisor=3.0))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Lengths `(prompt, completion)` and weights of a step's trajectories, and how they are to be cut."""

    shapes: list[tuple[int, int]]
    weights: list[np.ndarray]
    layout: Layout
    normalizer: Normalizer


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=7))
    values = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0])
    weights = [np.array(draw(st.lists(values, min_size=t, max_size=t))) for _, t in shapes]
    kept = [p + t - 1 for (p, t), weight in zip(shapes, weights, strict=True) if weight.any()]
    assume(kept)
    budget = max(kept) + draw(st.integers(0, 25))  # what is not trained may be longer
    layout = Layout(ranks=draw(st.integers(1, 4)), tokens_per_microbatch=budget)
    return Case(shapes=shapes, weights=weights, layout=layout, normalizer=draw(st.sampled_from(NORMALIZERS)))


def numbers(ids: Any) -> np.ndarray:
    return np.asarray(ids, dtype=np.float32) / 8


def recognizable(make: Any, shapes: Sequence[tuple[int, int]]) -> list[Scored[HiddenScores]]:
    """All hidden states lie in one array, whose handle is the string "all"."""
    step, first_row = [], 0
    for i, (p, t) in enumerate(shapes):
        ids = 1000 * i + np.arange(p + t)
        rows = RemoteRows(pieces=(("all", np.arange(first_row, first_row + t)),))
        scores = HiddenScores(logprobs=-numbers(ids[p:]), hidden=rows)
        behavior = TokenScores(logprobs=-numbers(ids[p:]) - 1)
        step.append(make.scored(ids[:p], ids[p:], scores, behavior=behavior))
        first_row += t
    return step


def fetched(step: Sequence[Scored[Any]], handle: str) -> np.ndarray:
    assert handle == "all"
    return np.concatenate([np.stack([i.trajectory.token_ids] * 2, axis=1) for i in step]).astype(np.float32)


@settings(max_examples=50)
@given(case=cases())
def test_every_weighted_token_is_trained_once_where_it_belongs(make: Any, case: Case) -> None:
    step = recognizable(make, case.shapes)
    seen: list[int] = []
    for batch in [b for rank in pack(step, case.weights, case.layout, case.normalizer) for b in rank]:
        bounds = batch.cu_seqlens
        assert bounds[-1] == len(batch.input_ids) <= case.layout.tokens_per_microbatch
        for start, stop in pairwise(bounds):
            i, zero = divmod(int(batch.input_ids[start]), 1000)
            assert zero == 0 and stop - start == sum(case.shapes[i]) - 1
            np.testing.assert_array_equal(batch.input_ids[start:stop], 1000 * i + np.arange(stop - start))
            np.testing.assert_array_equal(batch.position_ids[start:stop], np.arange(stop - start))
        np.testing.assert_array_equal(batch.input_ids[batch.predict_at] + 1, batch.target_ids)
        on_device = batch.to("cpu", lambda handle: fetched(step, handle))
        np.testing.assert_array_equal(on_device.scores.hidden[:, 0], batch.target_ids)
        np.testing.assert_array_equal(on_device.scores.logprobs, -numbers(batch.target_ids))
        np.testing.assert_array_equal(batch.behavior_logprobs, -numbers(batch.target_ids) - 1)
        owners, places = np.divmod(batch.target_ids, 1000)
        np.testing.assert_array_equal(batch.depth, [p - case.shapes[i][0] for i, p in zip(owners, places, strict=True)])
        assert batch.depth.dtype == np.int32 and on_device.depth.dtype == torch.int64
        expected = [case.weights[i][place - case.shapes[i][0]] for i, place in zip(owners, places, strict=True)]
        idle = not batch.weights.any()  # a rank without work repeats a sequence with weight 0
        np.testing.assert_array_equal(batch.weights, np.zeros(len(batch)) if idle else expected)
        assert idle or batch.weights.all()
        seen += [] if idle else batch.target_ids.tolist()
    wanted = [1000 * i + p + j for i, (p, t) in enumerate(case.shapes) for j in range(t) if case.weights[i][j] > 0]
    assert sorted(seen) == sorted(wanted)


@settings(max_examples=50)
@given(case=cases())
def test_ranks_enter_together_with_one_denominator_and_the_result_repeats(make: Any, case: Case) -> None:
    step = recognizable(make, case.shapes)
    first, second = (pack(step, case.weights, case.layout, case.normalizer) for _ in range(2))
    assert len(first) == case.layout.ranks
    assert len({len(rank) for rank in first}) == 1 and first[0]
    for rank, again in zip(first, second, strict=True):
        for batch, same in zip(rank, again, strict=True):
            assert batch.denominator == case.normalizer(case.weights)
            for field in fields(batch):
                if field.name not in ("scores", "denominator"):
                    np.testing.assert_array_equal(getattr(batch, field.name), getattr(same, field.name))


@pytest.mark.parametrize(("budget", "micro_batches"), [(4, 3), (7, 3), (8, 2), (11, 2), (12, 1)])
def test_a_micro_batch_is_filled_up_to_the_budget_and_no_further(make: Any, budget: int, micro_batches: int) -> None:
    step = [make.scored([1, 2], [3, 4, 5]) for _ in range(3)]  # four inputs each: the last token is never one
    (batches,) = pack(step, [np.ones(3)] * 3, Layout(ranks=1, tokens_per_microbatch=budget), TokenMean())
    assert len(batches) == micro_batches


def test_sequences_keep_their_order_within_a_micro_batch(make: Any) -> None:
    """Longest first is how bins are filled, so that they are few; it is not how they are packed."""
    shapes = [2, 7, 3, 6, 4, 5, 1, 8]
    step = [make.scored([1], list(range(1, n + 1)), sample=i) for i, n in enumerate(shapes)]
    (batches,) = pack(step, [np.ones(n) for n in shapes], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())
    assert len(batches) == 4, "4 x 9 tokens hold all 36: filled from the shortest on, they would not fit"
    for batch in batches:
        samples = [int(name.split()[1]) for name in batch.names]
        assert samples == sorted(samples)


@pytest.mark.parametrize(
    ("lengths", "cut"), [([2, 2, 2, 2], 2), ([7, 1, 1, 1], 1), ([1, 1, 1, 7], 3), ([1, 5, 3], 2), ([1, 1], 1)]
)
def test_halves_are_cut_nearest_to_the_middle(make: Any, lengths: list[int], cut: int) -> None:
    step = [make.scored([1], list(range(1, n + 1)), sample=i) for i, n in enumerate(lengths)]
    ((batch,),) = pack(step, [np.ones(n) for n in lengths], Layout(ranks=1, tokens_per_microbatch=99), TokenMean())
    two = halves(batch)
    assert two is not None and [len(half.names) for half in two] == [cut, len(lengths) - cut]


def test_normalizers_count_what_they_say() -> None:
    weights = [np.array([0.0, 0.5, 2.0]), np.zeros(4), np.array([1.0])]
    assert TokenMean()(weights) == 3.0
    assert SequenceSum()(weights) == SequenceMean()(weights) == 2.0
    assert not any(kind.per_sequence for kind in (TokenMean, SequenceSum, Constant)) and SequenceMean.per_sequence
    assert Constant()(weights) == 1.0
    for divisor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match=r"Constant\.divisor needs a number"):
            Constant(divisor=divisor)


def test_a_mean_over_sequences_weighs_each_by_its_own_trained_tokens(make: Any) -> None:
    """Also where one has none, or a single one; `0.5` is what a weight part said of that token."""
    weights = [np.array([1.0, 0.0, 0.5, 1.0]), np.zeros(2), np.array([1.0]), np.ones(5), np.array([0.0, 2.0])]
    step = [make.scored([1], [9] * len(w), sample=i) for i, w in enumerate(weights)]
    ((batch,),) = pack(step, weights, Layout(ranks=1, tokens_per_microbatch=99), SequenceMean())
    assert batch.denominator == 4.0
    expected = [1 / 3, 0.5 / 3, 1 / 3, 1.0, *[1 / 5] * 5, 2.0]
    np.testing.assert_allclose(batch.weights, np.array(expected, dtype=np.float32), rtol=1e-7)


def test_a_normalizer_that_says_nothing_of_sequences_keeps_the_weights_of_tokens(make: Any) -> None:
    class Hundredth:
        def __call__(self, weights: Sequence[np.ndarray]) -> float:
            return 100.0

    normalizer: Any = Hundredth()
    ((batch,),) = pack([make.scored([1], [2, 3])], [np.ones(2)], Layout(ranks=1, tokens_per_microbatch=9), normalizer)
    assert batch.weights.tolist() == [1.0, 1.0] and batch.denominator == 100.0


def test_batches_name_the_teachers_of_the_whole_step_in_one_order_and_each_token_s(make: Any) -> None:
    asked = ["m", "z", "a", "q", "b", "y", "k"]
    step = [make.scored([1], [2, 3], sample=i, prompt=make.prompt([1], teacher=t)) for i, t in enumerate(asked)]
    layout = Layout(ranks=2, tokens_per_microbatch=4)
    for batch in [b for rank in pack(step, [np.ones(2)] * 7, layout, TokenMean()) for b in rank]:
        assert batch.routes == tuple(sorted(asked))
        samples = [int(name.split()[1]) for name in batch.names]
        assert [batch.routes[number] for number in batch.route] == [asked[i] for i in samples for _ in range(2)]
    ((alone,),) = pack(step[:1] * 2, [np.ones(2)] * 2, Layout(ranks=1, tokens_per_microbatch=9), TokenMean())
    assert alone.routes == ("m",) and alone.route.shape == (0,)


def test_a_bad_weight_is_named_and_not_a_good_one_beside_it(make: Any) -> None:
    step = [make.scored([1], [2], prompt=make.prompt([1], id=name)) for name in ("good", "bad", "fine")]
    with pytest.raises(DataError, match="prompt 'bad': weights must be"):
        pack(step, [np.ones(1), -np.ones(1), np.ones(1)], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())


def test_a_rank_without_work_repeats_the_first_sequence_that_is_trained(make: Any) -> None:
    step = [make.scored([1], [2, 3], sample=i) for i in range(3)]
    weights = [np.zeros(2), np.ones(2), np.zeros(2)]
    ranks = pack(step, weights, Layout(ranks=3, tokens_per_microbatch=4), TokenMean(), turn=" at step 5")
    assert [[b.names for b in rank] for rank in ranks] == [[("sample 1 of prompt 'p' at step 5",)]] * 3
    assert [rank[0].weights.tolist() for rank in ranks] == [[1, 1], [0, 0], [0, 0]]


# A real model: one layer of causal attention, its mask made from the sequence boundaries.

VOCABULARY, WIDTH = 9, 6


def model() -> dict[str, Tensor]:
    shapes = {"embed": (VOCABULARY, WIDTH), "place": (16, WIDTH), "qkv": (3, WIDTH, WIDTH), "head": (VOCABULARY, WIDTH)}
    draw = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=draw).double().div(2).requires_grad_() for n, s in shapes.items()}


def hidden_states(model: dict[str, Tensor], ids: Tensor, places: Tensor, bounds: Tensor) -> Tensor:
    x = model["embed"][ids] + model["place"][places]
    q, k, v = (x @ w for w in model["qkv"])
    owner = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    sees = (owner[:, None] == owner) & torch.ones(len(ids), len(ids)).tril().bool()
    return (x + (q @ k.T).masked_fill(~sees, -torch.inf).softmax(-1) @ v).tanh()


def packed_gradient(model: dict[str, Tensor], batches: Sequence[Sequence[Batch[Any]]], objective: Any) -> list[Tensor]:
    """The loss and its gradients, added up over all micro-batches of all ranks."""
    total: Tensor = torch.zeros(())
    for batch in [b for rank in batches for b in rank]:
        b = batch.to("cpu", lambda handle: handle)
        hidden = hidden_states(model, b.input_ids, b.position_ids, b.cu_seqlens)[b.predict_at]
        part, _ = chunked_loss(
            hidden, model["head"], b.weights, lambda s, i, j, b=b: objective(s, b.rows(i, j)), chunk=4
        )
        total = total + part / b.denominator
    return [total.detach(), *torch.autograd.grad(total, list(model.values()))]


def lonely_gradient(model: dict[str, Tensor], step: Sequence[Scored[TokenScores]], case: Case) -> list[Tensor]:
    """The same, every trajectory read alone and token by token: sampled reverse KL written out."""
    total = torch.zeros(())
    for item, weights in zip(step, case.weights, strict=True):
        t = item.trajectory
        ids = torch.from_numpy(np.concatenate([t.prompt.student_ids, t.token_ids])).long()
        hidden = hidden_states(model, ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]))
        logprobs = (hidden @ model["head"].T).log_softmax(-1)
        for j, weight in enumerate(weights):
            place = len(t.prompt.student_ids) + j
            p, mu = logprobs[place - 1, ids[place]], float(t.behavior.logprobs[j])
            total = total + weight * (p - mu).exp() * (mu - float(item.scores.logprobs[j]))
    total = total / case.normalizer(case.weights)
    return [
        total.detach(),
        *torch.autograd.grad(total, list(model.values()), allow_unused=True, materialize_grads=True),
    ]


def written(make: Any, shapes: Sequence[tuple[int, int]], seed: int = 0) -> list[Scored[TokenScores]]:
    draw = np.random.default_rng(seed)
    said = [[TokenScores(logprobs=-draw.random(t, dtype=np.float32) - 1) for _ in range(2)] for _, t in shapes]
    ids = [draw.integers(0, VOCABULARY, p + t) for p, t in shapes]
    return [
        make.scored(i[:p], i[p:], teacher, behavior=writer)
        for i, (p, _), (teacher, writer) in zip(ids, shapes, said, strict=True)
    ]


@settings(max_examples=50)
@given(case=cases())
def test_p8_any_split_gives_the_gradient_of_every_trajectory_on_its_own(make: Any, case: Case) -> None:
    step, student = written(make, case.shapes), model()
    batches = pack(step, case.weights, case.layout, case.normalizer)
    packed = packed_gradient(student, batches, SampledReverseKL())
    for got, expected in zip(packed, lonely_gradient(student, step, case), strict=True):
        torch.testing.assert_close(got, expected.double(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("defect", ["none", "normalizer of the micro-batch", "mean over micro-batches"])
def test_p8_is_seen_to_fail_where_a_split_matters(make: Any, defect: str) -> None:
    shapes = [(2, 6), (3, 1), (1, 3), (5, 2)]
    step, weights, student = written(make, shapes), [np.ones(t) for _, t in shapes], model()
    results = []
    for layout in (Layout(ranks=1, tokens_per_microbatch=100), Layout(ranks=2, tokens_per_microbatch=7)):
        batches = pack(step, weights, layout, TokenMean())
        if defect == "normalizer of the micro-batch":
            batches = [[replace(b, denominator=float(len(b))) for b in rank] for rank in batches]
        elif defect == "mean over micro-batches":
            batches = [[replace(b, denominator=b.denominator * len(rank)) for b in rank] for rank in batches]
        results.append(packed_gradient(student, batches, SampledReverseKL()))
    same = all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(*results, strict=True))
    assert same == (defect == "none")


def test_p9_masked_tokens_have_no_gradient_and_stay_in_the_context(make: Any) -> None:
    weights, layout, student = [np.array([1.0, 0.0, 1.0])], Layout(ranks=1, tokens_per_microbatch=9), model()

    def results(token: int, teacher: float) -> list[Tensor]:
        scores = TokenScores(logprobs=np.array([-2.0, teacher, -3.0], dtype=np.float32))
        batches = pack([make.scored([1, 2], [3, token, 5], scores)], weights, layout, TokenMean())
        assert batches[0][0].predict_at.tolist() == [1, 3]
        return packed_gradient(student, batches, SampledReverseKL())

    base, other_signal, other_token = results(4, -1.5), results(4, -7.0), results(6, -1.5)
    assert all(torch.equal(a, b) for a, b in zip(base, other_signal, strict=True))
    assert float((base[0] - other_token[0]).abs()) > 1e-3


OBJECTIVES = (
    SampledReverseKL(signal=LogprobSource.STUDENT),
    HeadTailDivergence(of=FullReverseKL()),
    TopKDivergence(of=FullReverseKL(), outside=Outside.BUCKET),
    TopKDivergence(of=FullReverseKL(), outside=Outside.RENORMALIZED),
    FullReverseKL(),
    FullForwardKL(),
    JensenShannon(),
)


@pytest.mark.parametrize("shift", [0, 1, -1])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_p7_a_teacher_shifted_by_one_moves_a_student_that_equals_it(make: Any, objective: Any, shift: int) -> None:
    """The student predicts from the token before; its teacher is itself, asked at the same tokens (or one beside)."""
    table = torch.randn(VOCABULARY, VOCABULARY).double().log_softmax(-1)
    step: list[Scored[Scores]] = []
    for ids in (np.array([1, 2, 3, 4, 5, 6]), np.array([8, 0, 7, 1, 6, 3])):
        rows = np.roll(table[ids[1:-1]].numpy(), shift, axis=0)  # what precedes each of the four written tokens
        written = TokenScores(logprobs=rows[np.arange(4), ids[2:]])
        support = np.argsort(rows, axis=1)[:, :3]
        scores = {
            TokenScores: written,
            TopKScores: TopKScores(
                logprobs=written.logprobs, topk_ids=support, topk_logprobs=np.take_along_axis(rows, support, 1)
            ),
            VocabularyScores: VocabularyScores(logprobs=written.logprobs, vocabulary_logprobs=rows),
        }[objective.consumes]
        step.append(make.scored(ids[:2], ids[2:], scores))
    (batch,) = pack(step, [np.ones(4)] * 2, Layout(ranks=1, tokens_per_microbatch=99), TokenMean())[0]
    batch = batch.to("cpu", lambda handle: handle)
    weight = table.clone().requires_grad_()
    objective(StudentLogits(logits=weight[batch.input_ids[batch.predict_at]]), batch).loss.sum().backward()
    assert weight.grad is not None
    moved = float(weight.grad.abs().max())
    assert (moved < 1e-12) if shift == 0 else (moved > 1e-2)


@pytest.mark.parametrize("tokens", [1, 2])
def test_an_empty_prompt_is_named(make: Any, tokens: int) -> None:
    step = [make.scored([], [1] * tokens, prompt=make.prompt([], id="shop/7"))]
    with pytest.raises(DataError, match="prompt 'shop/7' is empty; a completion needs a token to follow"):
        pack(step, [np.ones(tokens)], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())
    good = make.scored([1], [2])
    batches = pack([*step, good], [np.zeros(tokens), np.ones(1)], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())
    assert batches[0][0].target_ids.tolist() == [2]  # what is not trained may be anything


def test_a_sequence_that_cannot_fit_says_what_to_raise(make: Any) -> None:
    layout = Layout(ranks=2, tokens_per_microbatch=4)
    with pytest.raises(ConfigurationError, match="tokens_per_microbatch is 4, but a sequence has 5 tokens; raise it"):
        pack([make.scored([1, 2], [3, 4, 5, 6])], [np.ones(4)], layout, TokenMean())
    shorter = make.scored([1], [2])
    with pytest.raises(ConfigurationError, match=r"a sequence has 5 tokens; raise it to at least 5 or lower"):
        pack(
            [shorter, make.scored([1, 2], [3, 4, 5, 6]), shorter], [np.ones(n) for n in (1, 4, 1)], layout, TokenMean()
        )
    assert pack([make.scored([1, 2], [3, 4, 5])], [np.ones(3)], layout, TokenMean())


def test_a_writer_that_says_too_little_about_its_tokens_is_refused(make: Any) -> None:
    item = make.scored([1, 2], [3, 4, 5])
    short = replace(item.trajectory, behavior=TokenScores(logprobs=np.zeros(2, dtype=np.float32)))
    with pytest.raises(DataError, match="2 logprobs for 3 tokens"):
        pack([replace(item, trajectory=short)], [np.ones(3)], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())


BAD_WEIGHTS = ([1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0], [1.0], [1.0, 1.0, 1.0])


@pytest.mark.parametrize("weights", BAD_WEIGHTS, ids=str)
def test_a_weight_that_is_none_is_refused(make: Any, weights: list[float]) -> None:
    with pytest.raises(DataError, match="prompt 'p': weights must be one finite number >= 0 per token"):
        pack([make.scored([1], [2, 3])], [np.array(weights)], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())


def test_a_step_without_weight_is_refused(make: Any) -> None:
    with pytest.raises(DataError, match="no token to train: every weight is 0; check loss masks"):
        pack([make.scored([1], [2])], [np.zeros(1)], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())


@settings(max_examples=30)
@given(case=cases())
def test_two_halves_have_every_trained_token_once_and_add_up_to_the_whole(make: Any, case: Case) -> None:
    step, student = written(make, case.shapes), model()
    whole = [b for rank in pack(step, case.weights, case.layout, case.normalizer) for b in rank]
    parts = [halves(batch) or (batch,) for batch in whole]
    for batch, cut in zip(whole, parts, strict=True):
        for name in ("input_ids", "target_ids", "weights", "depth", "behavior_logprobs", "position_ids"):
            joined = np.concatenate([np.asarray(getattr(part, name)) for part in cut])
            np.testing.assert_array_equal(joined, getattr(batch, name))
        assert tuple(name for part in cut for name in part.names) == batch.names
        assert all(part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == len(part.input_ids) for part in cut)
    split = packed_gradient(student, [[p for cut in parts for p in cut]], SampledReverseKL())
    for got, expected in zip(split, packed_gradient(student, [whole], SampledReverseKL()), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
