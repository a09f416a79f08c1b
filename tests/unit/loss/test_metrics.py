"""Diagnostics are what their names say: by enumeration on small vocabularies, and in their limiting cases."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.loss.chunked import StudentLogits, likeliest
from opd.loss.metrics import OVERLAP_EVERY, by_depth, compression, overlap, repetition, topk_metrics, vocabulary_metrics
from opd.types import Batch, Scores, TopKScores, VocabularyScores

V = 40


def draw(rows: int = 6, vocabulary: int = V, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator).double() * 2).log_softmax(-1)


def batch_of(rows: int, scores: Scores, depth: Any = None) -> Batch[Any]:
    every = torch.arange(rows)
    return Batch(
        input_ids=every, position_ids=every, cu_seqlens=torch.tensor([0, rows]), predict_at=every,
        target_ids=torch.zeros(rows, dtype=torch.int64), behavior_logprobs=torch.full((rows,), -1.0).double(),
        weights=torch.ones(rows).double(), scores=scores, denominator=1.0,
        depth=OVERLAP_EVERY * every if depth is None else torch.tensor(depth),
    )  # fmt: skip


def whole(q: Tensor) -> VocabularyScores:
    return VocabularyScores(logprobs=q[:, 0], vocabulary_logprobs=q)


def on_support(q: Tensor, ids: Tensor) -> TopKScores:
    return TopKScores(logprobs=q[:, 0], topk_ids=ids, topk_logprobs=q.gather(-1, ids))


@settings(max_examples=40)
@given(columns=st.integers(1, 3000), k=st.integers(1, 20), rows=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_likeliest_are_those_of_a_full_sort(columns: int, k: int, rows: int, seed: int) -> None:
    k, values = min(k, columns), torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(likeliest(values, k), values.argsort(dim=-1, descending=True)[:, :k])


@pytest.mark.parametrize(("rows", "columns"), [(1, 700), (900, 40), (900, 130), (900, 300)])
@pytest.mark.parametrize("k", [1, 3])
def test_the_likeliest_are_those_of_their_row_however_many_rows_there_are(rows: int, columns: int, k: int) -> None:
    values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    assert torch.equal(likeliest(values, k), values.argsort(dim=-1, descending=True)[:, :k])


def test_the_likeliest_include_every_tied_value_however_the_ties_lie() -> None:
    values = torch.zeros(2, 128 * 30 + 5)
    values[0, -3:] = 1.0
    values[1, 7] = values[1, 900] = 1.0
    for k in (2, 3, 16):
        got = values.gather(-1, likeliest(values, k))
        assert torch.equal(got, values.topk(k).values)


@pytest.mark.parametrize("k", [1, 4, 16, V])
def test_a_student_that_equals_its_teacher_overlaps_fully(k: int) -> None:
    found = overlap(draw(), draw(), k)
    torch.testing.assert_close(found.ratio, torch.ones(6).double())
    torch.testing.assert_close(found.advantage, torch.zeros(6).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.student_mass, found.teacher_mass)
    metrics = vocabulary_metrics(StudentLogits(logits=draw()), batch_of(6, whole(draw())))
    for name in ("reverse_kl", "forward_kl", "entropy_gap"):
        torch.testing.assert_close(metrics[name], torch.zeros(6).double(), rtol=0, atol=1e-13)


@settings(max_examples=30)
@given(k=st.integers(1, V), seed=st.integers(0, 50))
def test_the_overlap_is_the_papers_sum_written_out(k: int, seed: int) -> None:
    p, q = draw(4, seed=seed), draw(4, seed=seed + 1000)
    found = overlap(p, q, k)
    for row in range(4):
        own, other = p[row].exp().numpy(), q[row].exp().numpy()
        both = sorted(set(np.argsort(-own)[:k]) & set(np.argsort(-other)[:k]))
        assert float(found.ratio[row]) == pytest.approx(len(both) / k)
        assert float(found.student_mass[row]) == pytest.approx(own[both].sum())
        assert float(found.teacher_mass[row]) == pytest.approx(other[both].sum())
        if not both:
            assert found.advantage[row].isnan(), "an empty intersection has no advantage"
            continue
        mine, its = own[both] / own[both].sum(), other[both] / other[both].sum()
        assert float(found.advantage[row]) == pytest.approx((mine * np.log(its / mine)).sum(), abs=1e-12)
        assert float(found.advantage[row]) <= 1e-15


def test_supports_that_do_not_meet_have_no_advantage_and_no_mass() -> None:
    low, high = torch.zeros(1, V).double(), torch.zeros(1, V).double()
    low[:, :4] += 5.0 + torch.arange(4)
    high[:, -4:] += 5.0 + torch.arange(4)
    found = overlap(low.log_softmax(-1), high.log_softmax(-1), 4)
    assert found.advantage.isnan().all()
    assert not found.ratio.any() and not found.student_mass.any() and not found.teacher_mass.any()


def test_the_numbering_of_the_vocabulary_does_not_matter() -> None:
    p, q, order = draw(seed=1), draw(seed=2), torch.randperm(V)
    plain = vocabulary_metrics(StudentLogits(logits=p), batch_of(6, whole(q)))
    target = int(torch.argsort(order)[0])
    batch = replace(batch_of(6, whole(q[:, order])), target_ids=torch.full((6,), target))
    other = vocabulary_metrics(StudentLogits(logits=p[:, order]), batch)
    for name, values in plain.items():
        torch.testing.assert_close(other[name], values, equal_nan=True)


def test_both_kls_and_entropies_are_the_plain_sums() -> None:
    p, q = draw(seed=1), draw(seed=2)
    metrics = vocabulary_metrics(StudentLogits(logits=p + 3), batch_of(6, whole(q)))
    torch.testing.assert_close(metrics["reverse_kl"], (p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(metrics["forward_kl"], (q.exp() * (q - p)).sum(-1))
    entropy, teacher = -(p.exp() * p).sum(-1), -(q.exp() * q).sum(-1)
    torch.testing.assert_close(metrics["entropy"], entropy)
    torch.testing.assert_close(metrics["teacher_entropy"], teacher)
    torch.testing.assert_close(metrics["entropy_gap"], (entropy - teacher).abs())
    torch.testing.assert_close(metrics["fidelity"], q.exp().max(-1).values)
    torch.testing.assert_close(metrics["logprob_gap"], (p[:, 0] + 1).abs())


def test_a_teachers_top_k_gives_the_overlap_that_the_whole_vocabulary_gives() -> None:
    p, q, k = draw(seed=1), draw(seed=2), 16
    student = StudentLogits(logits=p, overlap_k=k)
    full = vocabulary_metrics(student, batch_of(6, whole(q)))
    written = torch.full((6, 1), int(q[0].argmax()))
    top = q.topk(k).indices
    for ids, wanted in ((top, k), (torch.cat([top, top[:, :1]], dim=1), k)):  # the written token may be said twice
        some = topk_metrics(student, batch_of(6, on_support(q, ids)))
        torch.testing.assert_close(some["support_overlap"], full["overlap_ratio"] * k / wanted)
        torch.testing.assert_close(some["support_token_advantage"], full["overlap_token_advantage"])
    assert not {"teacher_entropy", "entropy_gap", "forward_kl", "overlap_ratio"} & set(some), "not known, so absent"
    alone = topk_metrics(StudentLogits(logits=p, overlap_k=k), batch_of(6, on_support(q, written)))
    assert set(alone["support_overlap"].tolist()) <= {0.0, 1.0}


def test_overlap_can_be_left_out() -> None:
    q = draw(seed=2)
    student = StudentLogits(logits=draw(), overlap_k=0)
    metrics = vocabulary_metrics(student, batch_of(6, whole(q)))
    metrics |= topk_metrics(student, batch_of(6, on_support(q, q.topk(3).indices)))
    assert "entropy" in metrics and not [name for name in metrics if "overlap" in name or "advantage" in name]


def test_the_overlap_is_measured_at_every_fourth_place_however_rows_are_cut() -> None:
    p, q, depth = draw(9, seed=1), draw(9, seed=2), [0, 1, 2, 3, 4, 8, 0, 5, 7]
    scores = {vocabulary_metrics: whole(q), topk_metrics: on_support(q, q.topk(16).indices)}
    for measure, said in scores.items():
        batch = batch_of(9, said, depth)
        name = "overlap_ratio" if measure is vocabulary_metrics else "support_overlap"
        full = measure(StudentLogits(logits=p), batch)[name]
        assert (~full.isnan()).tolist() == [place % OVERLAP_EVERY == 0 for place in depth]
        parts = [measure(StudentLogits(logits=p[a:b]), batch.rows(a, b))[name] for a, b in ((0, 2), (2, 4), (4, 9))]
        torch.testing.assert_close(torch.cat(parts), full, equal_nan=True)
        every = measure(StudentLogits(logits=p), batch_of(9, said))[name]
        torch.testing.assert_close(full[~full.isnan()], every[~full.isnan()])


def test_every_token_is_in_one_position_bucket() -> None:
    depth = [0, 63, 64, 255, 256, 1023, 1024, 90_000]
    values = torch.arange(8).double()
    found = by_depth({"entropy": values}, torch.tensor(depth))
    buckets = ["entropy_0_63", "entropy_64_255", "entropy_256_1023", "entropy_1024_up"]
    assert list(found) == ["entropy", *buckets]
    assert torch.equal(found["entropy"], values)
    for i, name in enumerate(buckets):
        assert found[name][2 * i : 2 * i + 2].tolist() == [2 * i, 2 * i + 1]
        assert int(found[name].isnan().sum()) == 6


def test_metrics_have_no_gradient() -> None:
    logits = draw().requires_grad_()
    metrics = vocabulary_metrics(StudentLogits(logits=logits), batch_of(6, whole(draw(seed=2))))
    assert not any(values.requires_grad for values in metrics.values())


def test_repetition_counts_repeated_trigrams() -> None:
    assert repetition(np.array([5, 6, 7, 5, 6, 7, 5], dtype=np.int32)) == pytest.approx(0.4)
    assert repetition(np.arange(50, dtype=np.int32)) == 0
    assert repetition(np.full(50, 3, dtype=np.int32)) == pytest.approx(47 / 48)
    for short in range(4):
        assert repetition(np.full(short, 3, dtype=np.int32)) == 0


def test_compression_sees_loops_and_not_text() -> None:
    random = np.random.default_rng(0)
    assert compression(random.integers(0, 150_000, 2000).astype(np.int32)) < 2
    assert compression(random.integers(0, 192, 64).astype(np.int32)) < 4
    assert compression(np.tile(random.integers(0, 150_000, 20), 100).astype(np.int32)) > 30
    assert compression(np.zeros(0, dtype=np.int32)) == 1
    looped_at_the_end = np.concatenate([random.integers(0, 150_000, 9000), np.tile([1, 2, 3], 1000)])
    assert compression(looped_at_the_end.astype(np.int32)) > 10, "the end decides, however long the text"
