"""An optimizer in host memory trains what a resident one trains: bit by bit, over checkpoints, faults and verbs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner import engine
from learner.config import LearnerConfig, LoraConfig
from learner.learner import LearnerRank
from opd.settings.devices import Dtype
from opd.types import StepReport
from tests.integration.learner.test_learner_faults import SpoiltOnce, content, equal
from tests.small_learner import SMOOTH, STAGES, Likelihood, Start, batches_of, keep, parameters

# Several micro-batches a step; Adam as it is in runs, whose steps do not depend on the size of gradients.
CONFIG = replace(SMOOTH, eps=1e-8, lr=1e-2, grad_clip=1.0, weight_decay=0.1, tokens_per_microbatch=60)
SAME_NORM = [(1, Dtype.FLOAT32), (2, Dtype.FLOAT32), (2, Dtype.BFLOAT16)]
"""Where DeepSpeed sums the norm alike. Elsewhere its last bit differs: ZeRO-3 rounds the sum of squares to float32 only
with an offloaded optimizer, and ZeRO-1 in bfloat16 has another optimizer of DeepSpeed's without."""


def settings(stage: int, dtype: Dtype) -> tuple[LearnerConfig, LearnerConfig]:
    """Resident and offloaded; gradients are clipped where the norm is the same to the last bit."""
    config = replace(CONFIG, zero_stage=stage, dtype=dtype)
    if (stage, dtype) not in SAME_NORM:
        config = replace(config, grad_clip=0.0)
    return config, replace(config, offload_optimizer=True)


def steps(rank: LearnerRank, first: int, last: int) -> list[StepReport]:
    return [rank.step(batches_of(step, CONFIG)[0], Likelihood()) for step in range(first, last)]


def assert_same(a: list[StepReport], b: list[StepReport], *, norm: bool) -> None:
    for mine, theirs in zip(a, b, strict=True):
        assert (mine.loss, mine.metrics) == (theirs.loss, theirs.metrics)
        assert mine.grad_norm == (theirs.grad_norm if norm else pytest.approx(theirs.grad_norm, rel=1e-6))


@pytest.mark.parametrize(("stage", "dtype"), [one for one in STAGES if one[0]], ids=str)
def test_where_the_optimizer_lives_changes_no_bit(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    """Steps, verbs, a step that is skipped, turns, and checkpoints that each of them reads of the other."""
    resident, offloaded = settings(stage, dtype)
    there, here = start(resident, models["tied"]), start(offloaded, models["tied"])
    norm = (stage, dtype) in SAME_NORM
    assert_same(steps(here, 0, 2), steps(there, 0, 2), norm=norm)
    for rank in (here, there):
        rank.snapshot("second", optimizer=True)
    assert_same(steps(here, 2, 3), steps(there, 2, 3), norm=norm)
    folders = [keep(rank, tmp_path / name, 3) for name, rank in (("here", here), ("there", there))]
    assert equal(content(here, tmp_path / "a"), content(there, tmp_path / "b"))

    before, published = content(here, tmp_path / "c"), parameters(here.share(1))
    assert here.step(batches_of(9, CONFIG)[0], SpoiltOnce(value=float("nan"))).skipped
    assert equal(content(here, tmp_path / "d"), before)
    here.offload()
    here.reload()
    later = steps(there, 3, 4)
    assert_same(steps(here, 3, 4), later, norm=norm)
    moved = parameters(here.share(2))
    assert any(not torch.equal(published[name], moved[name]) for name in moved), "engines get what was trained"
    for rank, folder in ((start(offloaded, models["tied"]), folders[1]), (start(resident, models["tied"]), folders[0])):
        assert rank.load(folder) == 3
        assert_same(steps(rank, 3, 4), later, norm=norm)
        assert equal(content(rank, tmp_path / "e"), content(here, tmp_path / "f"))

    for rank in (here, there):
        rank.extrapolate("second", 0.5, only="mlp")
    assert equal(content(here, tmp_path / "g"), content(there, tmp_path / "h"))
    for rank in (here, there):
        rank.restore("second")
    assert_same(steps(here, 2, 3), steps(there, 2, 3), norm=norm)


@pytest.mark.parametrize(("stage", "dtype"), [(1, Dtype.FLOAT32), (2, Dtype.BFLOAT16), (3, Dtype.BFLOAT16)], ids=str)
def test_where_the_optimizer_of_adapters_lives_changes_no_bit(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    """What is frozen has no optimizer; a checkpoint of adapters goes on under the other setting, too."""
    resident, offloaded = (replace(one, lora=LoraConfig(r=4, lora_alpha=8)) for one in settings(stage, dtype))
    there, here = start(resident, models["tied"]), start(offloaded, models["tied"])
    norm = (stage, dtype) in SAME_NORM
    assert_same(steps(here, 0, 2), steps(there, 0, 2), norm=norm)
    folders = [keep(rank, tmp_path / name, 2) for name, rank in (("here", here), ("there", there))]
    assert equal(content(here, tmp_path / "a"), content(there, tmp_path / "b"))
    later = steps(there, 2, 3)
    for rank, folder in ((start(offloaded, models["tied"]), folders[1]), (start(resident, models["tied"]), folders[0])):
        assert rank.load(folder) == 2
        assert_same(steps(rank, 2, 3), later, norm=norm)
    shares = [parameters(rank.share(3)) for rank in (there, rank)]
    assert all(torch.equal(value, shares[1][name]) for name, value in shares[0].items())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sleeping_learner_gives_up_what_a_gpu_holds_and_keeps_its_optimizer(
    stage: int, models: dict[str, Path], start: Start
) -> None:
    _, config = settings(stage, Dtype.BFLOAT16)
    rank = start(config, models["untied"])
    steps(rank, 0, 1)
    training = rank._training
    assert training is not None
    held = engine.on_host(training._engine, config)
    assert {t.dtype for t in held} <= {torch.float32, torch.bfloat16}
    masters = sum(t.numel() for t in held if t.requires_grad)
    assert masters >= sum(p.numel() for p in parameters(rank.share(1)).values()), "all of them"
    copies = [t.clone() for t in held]
    rank.offload()
    assert all(torch.equal(t, copy) for t, copy in zip(held, copies, strict=True)), "stays where it is"
    rank.reload()
    steps(rank, 1, 2)
