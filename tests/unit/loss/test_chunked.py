"""The chunked loss is the plain one, in any chunk and in bounded memory; and shapes are enforced in these tests."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd.errors import ConfigurationError
from opd.loss.chunked import (
    StudentLogits,
    _block_rows,
    chunk_rows,
    chunked_loss,
    flat_loss,
    log_softmax_,
    mixture,
    read,
)
from opd.loss.metric_sums import MetricSums
from opd.loss.metrics import diagnosed
from opd.objectives.sampled import SampledReverseKL
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.types import Batch, HiddenScores, TokenLoss, TokenScores, TopKScores, VocabularyScores

ROOT = Path(__file__).parents[2]
H, V = 5, 11


def batch_of(rows: int, vocabulary: int = V, dtype: torch.dtype = torch.float64) -> Batch[HiddenScores]:
    """`rows` trained tokens with a teacher's hidden states; every third one has weight 0."""
    every = torch.arange(rows)
    return Batch(
        input_ids=every,
        position_ids=every,
        cu_seqlens=torch.tensor([0, rows]),
        predict_at=every,
        target_ids=torch.randint(vocabulary, (rows,)),
        behavior_logprobs=-torch.rand(rows, dtype=dtype) - 1,
        weights=torch.rand(rows, dtype=dtype) * (every % 3 > 0),
        depth=every,
        scores=HiddenScores(logprobs=-torch.rand(rows, dtype=dtype) - 1, hidden=torch.randn(rows, 3, dtype=dtype)),
        denominator=1.0,
    )


def evaluate_with(objective: Any, batch: Batch[Any], teacher_head: Tensor) -> Any:
    def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
        return diagnosed(objective, student, read(batch.rows(start, stop), teacher_head))

    return evaluate


@settings(max_examples=40)
@given(rows=st.integers(1, 7), chunk=st.integers(1, 8), objective=st.sampled_from([FullReverseKL(), JensenShannon()]))
def test_any_chunk_gives_the_plain_loss_gradients_and_metrics(rows: int, chunk: int, objective: Any) -> None:
    batch, teacher_head = batch_of(rows), torch.randn(V, 3).double()
    hidden, head = (torch.randn(n, H).double().requires_grad_() for n in (rows, V))
    plain = diagnosed(objective, StudentLogits(logits=hidden @ head.T), read(batch, teacher_head))
    expected = (batch.weights * plain.loss).sum()
    expected_gradients = torch.autograd.grad(expected / 7, (hidden, head))

    evaluate = evaluate_with(objective, batch, teacher_head)
    total, metrics = chunked_loss(hidden, head, batch.weights, evaluate, chunk)
    gradients = torch.autograd.grad(total / 7, (hidden, head))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)
    with torch.no_grad():
        silent, same_metrics = chunked_loss(hidden, head, batch.weights, evaluate, chunk)
    torch.testing.assert_close(silent, expected.detach(), rtol=0, atol=1e-12)
    assert not silent.requires_grad
    assert set(metrics.names) == set(plain.metrics)
    for got in (metrics.means(), same_metrics.means()):
        for name, values in plain.metrics.items():
            counted = values[(batch.weights > 0) & ~values.isnan()]
            assert (name in got) == bool(len(counted))
            if len(counted):
                assert got[name] == pytest.approx(counted.mean().item(), abs=1e-12)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9), chunk=st.integers(1, 10), block=st.integers(1, 10),
    objective=st.sampled_from([FullReverseKL(), FullForwardKL(), JensenShannon(), SampledReverseKL()]),
)  # fmt: skip
def test_chunks_and_blocks_within_them_give_the_plain_loss(rows: int, chunk: int, block: int, objective: Any) -> None:
    batch, teacher_head = batch_of(rows), torch.randn(V, 3).double()
    hidden, head = (torch.randn(n, H).double().requires_grad_() for n in (rows, V))
    plain = diagnosed(objective, StudentLogits(logits=hidden @ head.T), read(batch, teacher_head))
    expected = (batch.weights * plain.loss).sum()
    expected_gradients = torch.autograd.grad(expected / 7, (hidden, head))
    asked: list[tuple[int, int]] = []

    def prepare(first: int, last: int) -> Any:
        asked.append((first, last))
        part = read(batch.rows(first, last), teacher_head)
        return lambda student, start, stop: diagnosed(objective, student, part.rows(start - first, stop - first))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opd.loss.chunked._HOST_BLOCK", block * V * 8)
        total, metrics = flat_loss(hidden, head, batch.weights, prepare, chunk=chunk)
        with torch.no_grad():
            silent, same = flat_loss(hidden, head, batch.weights, prepare, chunk=chunk)
    gradients = torch.autograd.grad(total / 7, (hidden, head))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(silent, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)
    assert asked == 2 * [(at, min(at + chunk, rows)) for at in range(0, rows, chunk)], "a teacher is read once a chunk"
    whole = MetricSums.of(plain.metrics, batch.weights > 0).means()
    assert metrics.means() == pytest.approx(whole, abs=1e-12) and same.means() == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (4096, 300), (64, 152_064), (3, 3_000_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_fits_the_cache_and_is_at_least_a_row(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = torch.empty(1, vocabulary, dtype=dtype).expand(rows, vocabulary)
    block, row = _block_rows(logits), vocabulary * dtype.itemsize
    assert block >= 1 and (block == 1 or block * row <= 2**23) and (block + 1) * row > 2**23


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)], ids=str)
@pytest.mark.parametrize(("device", "room"), [("cpu", 2**26), ("meta", 2**29)])
def test_a_chunk_of_logits_has_the_size_that_is_documented(
    device: str, room: int, dtype: torch.dtype, size: int
) -> None:
    """64 MiB on a CPU, 512 MiB elsewhere, in the type that logits are judged in; and at least a row."""
    for vocabulary in (7, 300, 152_064):
        rows = chunk_rows(torch.empty(vocabulary, 1, dtype=dtype, device=device))
        assert rows * vocabulary * size <= room < (rows + 1) * vocabulary * size
    assert chunk_rows(torch.empty(2**30, 0, dtype=dtype, device=device)) == 1


def test_off_a_cpu_a_block_is_the_whole_chunk() -> None:
    assert [_block_rows(torch.empty(rows, V, device="meta")) for rows in (0, 1, 2, 9)] == [1, 1, 2, 9]


def test_an_objective_sees_blocks_within_a_chunk_or_whole_chunks_and_the_overlap_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opd.loss.chunked._HOST_BLOCK", 2 * V * 8)
    hidden, head, seen = torch.randn(5, H).double(), torch.randn(V, H).double(), list[tuple[int, int, int]]()

    def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
        torch.testing.assert_close(student.logits, (hidden @ head.T)[start:stop])
        seen.append((start, stop, student.overlap_k))
        return TokenLoss(loss=student.logprobs[:, 0], metrics={})

    def found(call: Any) -> list[tuple[int, int, int]]:
        for trained in (False, True):
            seen.clear()
            call(hidden.clone().requires_grad_(trained), head, torch.ones(5).double())
        return list(seen)

    in_blocks = [(0, 2, 16), (2, 3, 16), (3, 5, 16)]
    assert found(lambda *given: flat_loss(*given, lambda *_: evaluate, chunk=3)) == in_blocks
    assert found(lambda *given: flat_loss(*given, lambda *_: evaluate)) == [(0, 2, 16), (2, 4, 16), (4, 5, 16)]
    assert found(lambda *given: chunked_loss(*given, evaluate, 3)) == [(0, 3, 16), (3, 5, 16)]
    assert found(lambda *given: flat_loss(*given, lambda *_: evaluate, chunk=5, overlap_k=3))[0] == (0, 2, 3)
    monkeypatch.setattr("opd.loss.chunked.HOST_CHUNK", 4 * V * 8)
    assert found(lambda *given: flat_loss(*given, lambda *_: evaluate)) == [(0, 2, 16), (2, 4, 16), (4, 5, 16)]
    assert StudentLogits(logits=hidden).overlap_k == 16


@pytest.mark.parametrize("infinite", [torch.inf, torch.nan])
def test_a_token_of_weight_0_may_have_any_loss(infinite: float) -> None:
    hidden, head = (torch.randn(n, H).double().requires_grad_() for n in (3, V))
    weights = torch.tensor([0.5, 0.0, 2.0]).double()
    spoil = torch.tensor([1.0, infinite, 3.0]).double()

    def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
        loss = student.logprobs[:, 0] + spoil[start:stop]
        return TokenLoss(loss=loss, metrics={"loss": loss.detach()})

    total, sums = chunked_loss(hidden, head, weights, evaluate, 2)
    chosen = ((hidden @ head.T).log_softmax(-1)[:, 0] + spoil)[[0, 2]]
    torch.testing.assert_close(total, (weights[[0, 2]] * chosen).sum())
    assert sums.means()["loss"] == pytest.approx(chosen.mean().item())
    torch.testing.assert_close(
        torch.autograd.grad(total, head), torch.autograd.grad((weights[[0, 2]] * chosen).sum(), head)
    )


def test_sixteen_bit_gradients_add_up_in_32_bits() -> None:
    """Of many chunks, whose parts a 16-bit sum would forget."""
    batch, teacher_head = batch_of(300, dtype=torch.float32), torch.randn(V, 3)
    hidden, head = (torch.randn(n, H).bfloat16().requires_grad_() for n in (300, V))
    found = {}
    for chunk in (1, 300):
        total, _ = chunked_loss(hidden, head, batch.weights, evaluate_with(FullReverseKL(), batch, teacher_head), chunk)
        found[chunk] = torch.autograd.grad(total, (hidden, head))
    wide = [x.detach().float().requires_grad_() for x in (hidden, head)]
    total, _ = chunked_loss(*wide, batch.weights, evaluate_with(FullReverseKL(), batch, teacher_head), 300)
    exact = torch.autograd.grad(total, wide)
    for mine, wanted in [pair for got in found.values() for pair in zip(got, exact, strict=True)]:
        assert mine.dtype == torch.bfloat16 and float((mine.float() - wanted).norm() / wanted.norm()) < 0.02
    few, many = (found[chunk][1].float() for chunk in (300, 1))
    assert float((few - many).norm() / few.norm()) < 4e-3


def test_gradients_are_given_away_once() -> None:
    batch, teacher_head = batch_of(4), torch.randn(V, 3).double()
    hidden, head = (torch.randn(n, H).double().requires_grad_() for n in (4, V))
    total, _ = chunked_loss(hidden, head, batch.weights, evaluate_with(FullReverseKL(), batch, teacher_head), 2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away by the first backward"):
        total.backward()


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 8])
def test_log_softmax_in_place_is_log_softmax(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("opd.loss.chunked._HOST_BLOCK", 3 * V * 8)
    logits = torch.randn(rows, V).double() * 9
    expected = logits.log_softmax(-1)
    assert log_softmax_(logits) is logits
    assert torch.equal(logits, expected), "a row was left out, or taken twice"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_mixture_is_the_weighted_mean_of_probabilities(count: int) -> None:
    members = [torch.randn(6, V).double().log_softmax(-1) for _ in range(count)]
    shares = torch.rand(count, 6).double() + 0.1
    shares /= shares.sum(0)
    expected = sum(share[:, None] * member.exp() for share, member in zip(shares, members, strict=True))
    got = mixture((m.clone() for m in members), list(shares))
    torch.testing.assert_close(got.exp(), expected)
    same = mixture((m.clone() for m in members), [1 / count] * count)
    torch.testing.assert_close(same.exp(), torch.stack(members).exp().mean(0))


@pytest.mark.parametrize(("members", "shares"), [(0, 0), (0, 1), (1, 2), (2, 1)])
def test_a_mixture_with_a_share_too_many_or_too_few_is_refused(members: int, shares: int) -> None:
    with pytest.raises(ConfigurationError, match="one member for each"):
        mixture([torch.zeros(1, V)] * members, [0.5] * shares)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    batch, teacher_head = batch_of(4), torch.randn(V, 3).double()
    hidden, head = torch.randn(4, H).double(), torch.randn(V, H).double()
    evaluate = evaluate_with(FullReverseKL(), batch, teacher_head)
    frozen, _ = chunked_loss(hidden, head, batch.weights, evaluate, 2)
    assert not frozen.requires_grad
    for trained, fixed in ((hidden, head), (head, hidden)):
        trained.requires_grad_()
        chunked_loss(hidden, head, batch.weights, evaluate, 2)[0].backward()
        assert trained.grad is not None and fixed.grad is None
        trained.requires_grad_(False)
        trained.grad = None


def test_sixteen_bit_states_are_judged_in_float32() -> None:
    batch = batch_of(6, dtype=torch.float32)
    hidden, head = (torch.randn(n, H).bfloat16().requires_grad_() for n in (6, V))
    teacher_head, seen = torch.randn(V, 3), []

    def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
        seen.append(student.logits.dtype)
        return FullReverseKL()(student, read(batch.rows(start, stop), teacher_head))

    total, _ = chunked_loss(hidden, head, batch.weights, evaluate, 2)
    total.backward()
    assert set(seen) == {torch.float32} and total.dtype == torch.float64
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("train", [True, False], ids=["with gradient", "without"])
def test_no_tensor_is_as_large_as_tokens_times_vocabulary(train: bool) -> None:
    rows, vocabulary, chunk = 64, 512, 4
    batch, teacher_head = batch_of(rows, vocabulary), torch.randn(vocabulary, 3).double()
    hidden, head = (torch.randn(n, H).double().requires_grad_(train) for n in (rows, vocabulary))
    evaluate = evaluate_with(JensenShannon(), batch, teacher_head)
    with Largest() as plain:
        JensenShannon()(StudentLogits(logits=hidden @ head.T), read(batch, teacher_head))
    with Largest() as chunked:
        total, _ = chunked_loss(hidden, head, batch.weights, evaluate, chunk)
        if train:
            total.backward()
    assert plain.numel == rows * vocabulary
    assert chunked.numel == max(chunk * vocabulary, vocabulary * H)


@pytest.mark.slow
def test_the_memory_of_a_process_does_not_grow_with_tokens() -> None:
    """What a test of tensor sizes cannot see: small metrics kept between large blocks once cut the heap in pieces."""
    peaks = []
    for rows in ("256", "1024"):
        command = [sys.executable, "benchmarks/loss.py", "arm", "ours", rows, "151936", "16"]
        ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, check=True)
        peaks.append(json.loads(ran.stdout)["bytes"])
    assert peaks[1] < 1.15 * peaks[0]


def test_hidden_states_read_through_the_teachers_head_are_its_distribution() -> None:
    batch, teacher_head = batch_of(8), torch.randn(V, 3).double()
    logprobs = (torch.as_tensor(batch.scores.hidden) @ teacher_head.T).log_softmax(-1)
    same = replace(batch, scores=VocabularyScores(logprobs=batch.scores.logprobs, vocabulary_logprobs=logprobs))
    student = StudentLogits(logits=torch.randn(8, V).double())
    got, expected = (JensenShannon()(student, read(b, teacher_head)) for b in (batch, same))
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-12)
    assert read(same, None) is same


def test_hidden_states_without_the_teachers_head_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="output matrix"):
        read(batch_of(2), None)


def test_the_students_verbs_agree_with_its_softmax() -> None:
    logits = torch.randn(4, V).double()
    student, p = StudentLogits(logits=logits), logits.softmax(-1)
    ids, support = torch.tensor([0, 3, 5, 10]), torch.randint(V, (4, 3))
    torch.testing.assert_close(student.at(ids).exp(), p[torch.arange(4), ids])
    torch.testing.assert_close(student.at_support(support).exp(), p.gather(1, support))
    torch.testing.assert_close(student.entropy, -(p * p.log()).sum(-1))
    assert not StudentLogits(logits=logits.requires_grad_()).entropy.requires_grad


def test_wrong_shapes_are_refused_when_tests_run() -> None:
    """The import hook of conftest.py truly fires: on values, on arguments, and across the fields of one value."""
    with pytest.raises(TypeCheckError):
        TokenScores(logprobs=np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(TypeCheckError):
        TokenScores(logprobs=np.zeros(2, dtype=np.int32))
    with pytest.raises(TypeCheckError):
        TopKScores(
            logprobs=np.zeros(3, dtype=np.float32),
            topk_ids=np.zeros((2, 1), dtype=np.int32),
            topk_logprobs=np.zeros((2, 1), dtype=np.float32),
        )
    with pytest.raises(TypeCheckError):
        StudentLogits(logits=torch.zeros(2, V)).at(torch.zeros((2, 1), dtype=torch.int64))
    with pytest.raises(BeartypeCallHintViolation):
        SampledReverseKL()(StudentLogits(logits=torch.zeros(2, V)), "no batch")
