"""What goes wrong inside an update: a loss that is no number, memory that does not suffice."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.config import LearnerConfig
from learner.learner import LearnerRank
from opd.errors import DataError, OpdError
from opd.loss.chunked import StudentLogits
from opd.settings.devices import Dtype
from opd.types import Batch, Scores, TokenLoss
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
    """-log p, for whose first `times` evaluations memory does not suffice."""

    times: int
    calls: list[int] = field(default_factory=list)
    consumes = Scores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        self.calls.append(len(batch))
        if len(self.calls) <= self.times:
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
    hungry, plain = Hungry(times=1), Hungry(times=0)
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
        start(config, models["tied"]).step(batches_of(1, config)[0], Hungry(times=2))
