"""What goes wrong inside an update: a loss that is no number, memory that does not suffice."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner import engine
from learner.config import LearnerConfig
from learner.learner import LearnerRank
from learner.schedule import Schedule
from learner.training import Training
from opd.errors import DataError, OpdError
from opd.loss.chunked import StudentLogits
from opd.loss.packing import halves
from opd.settings.devices import Dtype
from opd.types import Batch, Scores, StepReport, TokenLoss
from tests.fault_matrix import Witness
from tests.small_learner import SMOOTH, STAGES, Likelihood, Start, batches_of, keep, parameters


@dataclass(frozen=True)
class SpoiltOnce:
    """-log p, but the first trained token of the step has a loss of `value` without a gradient of its own."""

    value: float
    done: list[bool] = field(default_factory=list)
    consumes = Scores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        loss = -student.at(batch.target_ids)
        if not self.done:
            self.done.append(True)
            loss = torch.cat([torch.full_like(loss[:1], self.value), loss[1:]])
        return TokenLoss(loss=loss, metrics={})


@dataclass(frozen=True)
class Hungry:
    """-log p, for whose evaluations number `short` (from 0) memory does not suffice."""

    short: Collection[int] = ()
    calls: list[int] = field(default_factory=list)
    consumes = Scores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        self.calls.append(len(batch))
        if len(self.calls) - 1 in self.short:
            raise torch.OutOfMemoryError("out of memory (planted)")
        return TokenLoss(loss=-student.at(batch.target_ids), metrics={})


def content(rank: LearnerRank, folder: Path) -> dict[str, torch.Tensor]:
    """Master weights, both moments and the published weights, by name."""
    from safetensors.torch import load_file

    state = load_file(keep(rank, folder, 0) / "rank_0.safetensors")
    return state | {f"published {name}": p for name, p in parameters(rank.share(0)).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.faults("loss is no number")
@pytest.mark.parametrize("objective", ["loss nan", "loss inf", "gradient"])
@pytest.mark.parametrize(("stage", "dtype"), STAGES, ids=str)
def test_an_update_that_is_no_number_is_skipped_and_leaves_no_trace(
    stage: int, dtype: Dtype, objective: str, models: dict[str, Path], start: Start, tmp_path: Path, witness: Witness
) -> None:
    spoilt = {
        "loss nan": SpoiltOnce(value=float("nan")),
        "loss inf": SpoiltOnce(value=float("inf")),
        "gradient": Likelihood(scale=3e38),
    }[objective]
    config = replace(SMOOTH, zero_stage=stage, dtype=dtype, eps=1e-8, lr=1e-2, tokens_per_microbatch=40)
    rank, straight = start(config, models["tied"]), start(config, models["tied"])
    for learner in (rank, straight):
        learner.step(batches_of(0, config)[0], Likelihood())
    before = content(rank, tmp_path / "before")
    report = rank.step(batches_of(1, config)[0], spoilt)
    assert report.skipped
    witness("loss is no number")
    assert equal(content(rank, tmp_path / "after"), before)
    # ... and the next update is the one there would have been without it
    last = [learner.step(batches_of(2, config)[0], Likelihood()) for learner in (rank, straight)]
    assert last[0] == last[1] and not last[0].skipped
    assert equal(content(rank, tmp_path / "a"), content(straight, tmp_path / "b"))
    assert not equal(content(rank, tmp_path / "a"), before)


def test_too_many_skipped_updates_in_a_row_are_an_error(models: dict[str, Path], start: Start) -> None:
    rank = start(replace(SMOOTH, max_skipped_steps=2), models["tied"])
    (batches,) = batches_of(1, SMOOTH)
    bad = Likelihood(scale=float("nan"))
    assert [rank.step(batches, o).skipped for o in (bad, bad, Likelihood(), bad, bad)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    before = parameters(rank.share(0))
    with pytest.raises(DataError, match=r"finite loss .* 2 updates before it were skipped"):
        rank.step(batches, bad)
    assert all(torch.equal(before[n], p) for n, p in parameters(rank.share(0)).items())
    surprised = np.asarray(batches[0].behavior_logprobs).copy()
    surprised[3] = -200.0  # finite, but no float32 holds the ratio
    believed = [replace(batches[0], behavior_logprobs=surprised), *batches[1:]]
    place = int(batches[0].depth[3])
    ratio = rf"finite importance ratios, .* at token {place} \(id \d+\) of sample \d+ of prompt .*: log p .* -200; "
    with pytest.raises(DataError, match=ratio):
        start(replace(SMOOTH, max_skipped_steps=0), models["tied"]).step(believed, bad)


@pytest.mark.faults("learner out of memory")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [4096, 70], ids=["one micro-batch", "several"])
def test_a_micro_batch_that_does_not_fit_is_halved(
    stage: int, tokens: int, models: dict[str, Path], start: Start, witness: Witness
) -> None:
    """The optimizer is smooth here, so equal weights mean equal gradients."""
    config: LearnerConfig = replace(SMOOTH, zero_stage=stage, tokens_per_microbatch=tokens)
    (batches,) = batches_of(1, config)
    hungry, plain = Hungry(range(1)), Hungry()
    halved, whole = start(config, models["tied"]), start(config, models["tied"])
    ours, theirs = halved.step(batches, hungry), whole.step(batches, plain)
    assert len(hungry.calls) > len(plain.calls), "it was not halved"
    witness("learner out of memory")
    assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-6)
    assert (ours.tokens, ours.trained_tokens) == (theirs.tokens, theirs.trained_tokens)
    weights = parameters(whole.share(1))
    for name, value in parameters(halved.share(1)).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6, msg=name)


def test_memory_that_does_not_suffice_for_a_half_is_one_sentence(models: dict[str, Path], start: Start) -> None:
    config = replace(SMOOTH, tokens_per_microbatch=4096)
    with pytest.raises(OpdError, match=r"out of memory .* halved \(again\); lower learner.tokens_per_microbatch"):
        start(config, models["tied"]).step(batches_of(1, config)[0], Hungry(range(2)))


def alike(rank: LearnerRank, other: LearnerRank, ours: StepReport, theirs: StepReport) -> None:
    """The same loss, gradient, counts and means; the optimizer is smooth, so equal weights mean equal gradients."""
    assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-6)
    assert (ours.tokens, ours.trained_tokens) == (theirs.tokens, theirs.trained_tokens)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-6)
    weights = parameters(other.share(1))
    for name, value in parameters(rank.share(1)).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("which", [{0}, {2}, {3}, {0, 1, 2, 3}], ids=str)
def test_the_gradient_is_the_same_whichever_micro_batches_are_halved(
    which: set[int], stage: int, models: dict[str, Path], start: Start
) -> None:
    config = replace(SMOOTH, zero_stage=stage, tokens_per_microbatch=40, head_chunk=0)
    (batches,) = batches_of(2, config)
    assert len(batches) == 4
    short, calls = set[int](), 0
    for number in range(4):
        if number in which:
            short, calls = short | {calls}, calls + 2
        calls += 1
    halved, whole, hungry = start(config, models["tied"]), start(config, models["tied"]), Hungry(short)
    reports = halved.step(batches, hungry), whole.step(batches, Hungry())
    assert len(hungry.calls) == calls > 4
    alike(halved, whole, *reports)


def one_of_two(rank: LearnerRank, patch: pytest.MonkeyPatch, short: Sequence[bool], **config: Any) -> Training:
    """Let `rank` believe that there is another, for which memory does or does not suffice, in turn."""
    training, answers = rank._training, cycle(short)
    assert training is not None
    patch.setattr(training, "_config", replace(training._config, ranks=2, **config))

    def with_the_other(own: torch.Tensor) -> torch.Tensor:
        return own if len(own) != 1 else torch.maximum(own, torch.full_like(own, next(answers)))

    patch.setattr(engine, "max_over_ranks", with_the_other)
    return training


@pytest.mark.parametrize("tokens", [40, 25], ids=["halves", "one sequence each"])
def test_a_rank_halves_where_another_has_to(
    tokens: int, models: dict[str, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that cannot be cut is followed by one without weights, so that all ranks do as much."""
    config = replace(SMOOTH, tokens_per_microbatch=tokens, head_chunk=0)
    batches = [b for b in batches_of(3, config)[0] if (halves(b) is None) == (tokens == 25)]
    assert len(batches) > 3
    along, alone = start(config, models["tied"]), start(config, models["tied"])
    hungry, plain = Hungry(), Hungry()
    with monkeypatch.context() as patch:
        theirs = one_of_two(alone, patch, [False]).step(batches, plain)
        ours = one_of_two(along, patch, [True, False, False]).step(batches, hungry)
    alike(along, alone, ours, theirs)
    assert len(hungry.calls) == 3 * len(plain.calls)  # the whole, and then its parts
    assert sum(hungry.calls) == sum(plain.calls) * (3 if tokens == 25 else 2)


@pytest.mark.parametrize(
    ("short", "elsewhere", "stage", "tries"),
    [
        (range(1), [False], 3, 1),  # the other rank waits for this one's parameters, and would for ever
        ([1], [True, False], 0, 2),  # half of it is still too much here ...
        ([], [True], 0, 2),  # ... or there
    ],
    ids=["shared parameters", "a half", "a half elsewhere"],
)
def test_a_rank_that_cannot_go_on_says_so_at_once(
    short: Collection[int], elsewhere: list[bool], stage: int, tries: int, models: dict[str, Path], start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rank, hungry = start(replace(SMOOTH, head_chunk=0, zero_stage=stage), models["tied"]), Hungry(short)
    with monkeypatch.context() as patch, pytest.raises(OpdError, match=r"out of memory .* cannot be halved \(again\)"):
        one_of_two(rank, patch, elsewhere).step(batches_of(1, SMOOTH)[0], hungry)
    assert len(hungry.calls) == tries


def test_memory_that_a_failed_pass_held_is_given_back_before_the_next(
    models: dict[str, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back, hungry = list[int](), Hungry(range(1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(len(hungry.calls)))
    start(replace(SMOOTH, head_chunk=0), models["tied"]).step(batches_of(1, SMOOTH)[0], hungry)
    assert given_back == [1]


def test_a_backward_pass_that_runs_out_of_memory_is_one_sentence(models: dict[str, Path], start: Start) -> None:
    """Some gradients are in and some are not, so there is no second try."""

    def short(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory (planted)")

    rank = start(SMOOTH, models["tied"])
    assert rank._training is not None
    first, *_ = (p for _, p in rank._training._student.named())
    first.register_hook(short)
    with pytest.raises(OpdError, match=r"^the learner ran out of memory in a backward pass; lower .* and resume$"):
        rank.step(batches_of(1, SMOOTH)[0], Likelihood())


@pytest.mark.parametrize(("stage", "dtype"), [STAGES[0], STAGES[2], STAGES[4]], ids=str)
def test_only_updates_that_were_applied_count(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    """A loss that is no number, and one that is but whose gradient is none, leave weights and schedule as they are."""
    schedule = {"schedule": Schedule.LINEAR, "warmup_steps": 3, "lr": 1e-2, "eps": 1e-8}
    rank = start(replace(SMOOTH, zero_stage=stage, dtype=dtype, **schedule), models["tied"])
    (batches,) = batches_of(1, SMOOTH)
    rates = [rank.step(batches, Likelihood()).lr for _ in range(2)]
    before = content(rank, tmp_path / "before")
    for spoilt in (Likelihood(scale=3e38), SpoiltOnce(value=float("inf")), SpoiltOnce(value=float("nan"))):
        report = rank.step(batches, spoilt)
        assert report.skipped and not np.isfinite(report.grad_norm)
        rates.append(report.lr)
    assert equal(content(rank, tmp_path / "after"), before)
    rates.append(rank.step(batches, Likelihood()).lr)
    assert rates == pytest.approx([0.0, 1e-2 / 3, *[2e-2 / 3] * 4])


def test_an_update_that_broke_off_is_never_saved(
    models: dict[str, Path], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("Connection closed by peer")

    rank = start(SMOOTH, models["tied"])
    monkeypatch.setattr(engine, "apply", broken)
    with pytest.raises(RuntimeError, match="closed by peer"):
        rank.step(batches_of(1, SMOOTH)[0], Likelihood())
    with pytest.raises(OpdError, match="the weights of step 1 cannot be saved, because the update after it broke off"):
        rank.save(tmp_path, 1)
    assert not list(tmp_path.iterdir())
