"""Two ranks, the second in another process: what only several of them do, in a second or two."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import groups
from torch import distributed
from transformers import AutoModelForCausalLM

from learner import engine, training
from learner.checkpoints.checkpoint import KEYS, MASTER, Shards, snapshot_key
from learner.learner import LearnerRank
from learner.model import Student
from opd.errors import OpdError
from opd.loss.packing import halves
from opd.settings.devices import Dtype
from tests.integration.learner.test_learner import SMALL
from tests.integration.learner.test_learner_faults import Hungry
from tests.integration.learner.test_starting import started_whole
from tests.processes import own_port, wait_until
from tests.second_rank import on_both
from tests.small_learner import (
    SMOOTH,
    STAGES,
    Likelihood,
    batches_of,
    group_of_its_own,
    keep,
    naive_loss,
    parameters,
    rank_of,
)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with group_of_its_own():
        yield


def test_a_rank_that_hangs_holds_no_group_of_deepspeed_s_longer_than_the_deadline(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Its own groups have torch's 30 minutes unless they are told."""
    config = replace(SMOOTH, ranks=2, deadline_s=3.0)
    port = own_port()
    given_up = tmp_path / "given up"

    def work(rank: int) -> Any:
        engine.join(rank, 2, "127.0.0.1", port, torch.device("cpu"), config.deadline_s)
        group = groups._clone_world_group()
        distributed.all_reduce(torch.ones(1), group=group)
        if rank:
            wait_until(given_up.exists, 60, "the other rank to give up", 0.05)
            return None
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            distributed.all_reduce(torch.ones(1), group=group)
        given_up.touch()
        distributed.destroy_process_group()
        return None

    on_both(work)


def test_a_rank_that_says_nothing_more_is_waited_for_no_longer_than_the_deadline() -> None:
    def work(rank: int) -> None:
        if rank:
            time.sleep(100)

    with pytest.raises(AssertionError, match=r"rank 1 failed:\nnothing came from it within 0\.5 s"):
        on_both(work, deadline_s=0.5)
    with pytest.raises(AssertionError, match=r"rank 1 failed:\nit ended without a word"):
        on_both(lambda rank: os._exit(3) if rank else None)


def test_a_group_that_was_given_up_in_the_middle_holds_no_later_one_up(models: dict[str, Path]) -> None:
    """The next learner has a group of its own: in the old one it would wait for a rank that is gone."""
    port = own_port()

    def work(rank: int) -> None:
        engine.join(rank, 2, "127.0.0.1", port, torch.device("cpu"), 20.0)
        raise KeyError(rank)

    with pytest.raises(AssertionError, match="KeyError: 1"), group_of_its_own():
        on_both(work)
    with group_of_its_own():
        alone = rank_of(SMOOTH, models["tied"])
        alone.setup(0, 1, *alone.address())
        assert alone.step(*batches_of(1, SMOOTH), Likelihood()).loss > 0
        alone.close()


@pytest.mark.parametrize(("stage", "offloaded"), [(0, False), (2, False), (2, True), (3, False), (3, True)])
def test_two_ranks_step_keep_and_go_on_like_a_naive_one(
    stage: int, offloaded: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    """Also where memory does not suffice on the second one (unless parameters are shared: then nobody halves)."""
    config = replace(
        SMOOTH,
        ranks=2,
        zero_stage=stage,
        offload_optimizer=offloaded,
        tokens_per_microbatch=40,
        publish_chunk_bytes=SMALL,
        head_chunk=0,
        deadline_s=20,
    )
    port = own_port()

    def work(rank: int) -> Any:
        def meet() -> LearnerRank:
            learner = rank_of(config, models["tied"])
            learner.setup(rank, 2, "127.0.0.1", port)
            return learner

        learner, batches = meet(), batches_of(1, config)[rank]
        first = next(i for i, batch in enumerate(batches) if halves(batch))
        hungry = Hungry([first] if rank == 1 and stage < 3 else [])
        reports = [learner.step(batches, hungry)]
        shares = [learner.share(1)]
        keep(learner, tmp_path, 1)
        engine.barrier()
        resumed = meet()
        assert resumed.load(tmp_path) == 1
        reports.append(resumed.step(batches_of(2, config)[rank], Hungry()))
        shares.append(resumed.share(2))
        for one in (learner, resumed):
            one.close()
            assert not distributed.is_initialized()
        return reports, shares, (len(hungry.calls), len(batches))

    (
        (reports, *_, tried),
        (same, *_, other),
    ) = results = on_both(work)
    assert reports == same, "ranks disagree"
    assert all(calls > count for calls, count in (tried, other)) == (stage < 3), "both halve what one cannot hold"
    model = AutoModelForCausalLM.from_pretrained(models["tied"], dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), SMOOTH.lr, (SMOOTH.beta1, SMOOTH.beta2), SMOOTH.eps, weight_decay=0)
    for step, report in enumerate(reports, 1):
        loss = naive_loss(model, step, None)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SMOOTH.grad_clip)
        adam.step()
        adam.zero_grad()
        assert report.loss == pytest.approx(float(loss.detach()), abs=1e-5)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-4)
        weights = parameters(*(shares[step - 1] for _, shares, _ in results))
        for name, value in model.named_parameters():
            torch.testing.assert_close(weights[name], value.detach(), rtol=0, atol=1e-5, msg=name)
    kept, weights = Shards(tmp_path), parameters(*(shares[0] for _, shares, _ in results))
    for name, value in weights.items():
        assert torch.equal(kept.read(MASTER, name, 0, value.numel()), value.view(-1))


@pytest.mark.parametrize(("stage", "dtype"), [STAGES[0], STAGES[2], STAGES[3], STAGES[4], STAGES[5]], ids=str)
def test_two_ranks_extrapolate_and_restore_as_one_would(
    stage: int, dtype: Dtype, models: dict[str, Path], tmp_path: Path
) -> None:
    """What one rank makes of their checkpoint is bit by bit what they make of their own weights; scores are equal."""
    config = replace(
        SMOOTH, ranks=2, zero_stage=stage, dtype=dtype, lr=1e-2, eps=1e-8, tokens_per_microbatch=40, deadline_s=20
    )
    port, factors = own_port(), (0.7, -0.3)

    def work(rank: int) -> Any:
        learner = rank_of(config, models["tied"])
        learner.setup(rank, 2, "127.0.0.1", port)
        learner.step(batches_of(0, config)[rank], Hungry())
        learner.snapshot("one", optimizer=True)
        for number in (1, 2):
            learner.step(batches_of(number, config)[rank], Hungry())
        scores = [learner.score(batches) for batches in batches_of(3, config)]
        keep(learner, tmp_path / "before", 3)
        for i, factor in enumerate(factors):
            learner.extrapolate("one", factor)
            keep(learner, tmp_path / f"after {i}", 3)
        shares = [learner.share(1)]
        learner.restore("one")
        shares.append(learner.share(2))
        keep(learner, tmp_path / "restored", 3)
        learner.close()
        return scores, shares

    with group_of_its_own():
        (scores, shares), (same, others) = on_both(work)
    assert str(scores) == str(same), "ranks disagree about the same text"
    with group_of_its_own():
        alone = rank_of(replace(config, ranks=1), models["tied"])
        alone.setup(0, 1, *alone.address())
        alone.load(tmp_path / "before")
        assert all(
            np.abs(a - b).max() < 1e-5
            for own, other in zip([alone.score(b) for b in batches_of(3, config)], scores, strict=True)
            for a, b in zip(own, other, strict=True)
        )
        for i, factor in enumerate(factors):
            alone.extrapolate("one", factor)
            assert_same_state(tmp_path / f"after {i}", keep(alone, tmp_path / f"alone {i}", 3), alone)
        assert_same_weights(parameters(shares[0], others[0]), parameters(alone.share(1)))
        alone.restore("one")
        assert_same_weights(parameters(shares[1], others[1]), parameters(alone.share(2)))
        assert_same_state(tmp_path / "restored", keep(alone, tmp_path / "alone restored", 3), alone)
        alone.close()


def test_two_ranks_that_start_divided_are_whole_ones_to_the_last_bit(models: dict[str, Path], tmp_path: Path) -> None:
    """Their sentinel, losses and norms, what they publish, and their checkpoint, with which either goes on alike."""
    config = replace(
        SMOOTH, zero_stage=3, weight_decay=0.1, gradient_checkpointing=True, ranks=2, dtype=Dtype.BFLOAT16,
        tokens_per_microbatch=40, deadline_s=20,
    )  # fmt: skip

    def trained(folder: Path, starting_student: Callable[..., Student]) -> list[Any]:
        port = own_port()

        def work(rank: int) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "starting_student", starting_student)
                return as_usual(rank)

        def as_usual(rank: int) -> Any:
            def meet() -> LearnerRank:
                learner = rank_of(config, models["tied"])
                learner.setup(rank, 2, "127.0.0.1", port)
                return learner

            one = meet()
            shares, reports = [one.share(0)], [one.step(batches_of(1, config)[rank], Likelihood())]
            keep(one, folder, 1)
            engine.barrier()
            resumed = meet()
            assert resumed.load(folder) == 1
            reports.append(resumed.step(batches_of(2, config)[rank], Likelihood()))
            shares.append(resumed.share(2))
            for each in (one, resumed):
                each.close()
            return reports, shares[0].sentinel.logprobs.tolist(), shares

        with group_of_its_own():
            return on_both(work)

    divided = trained(tmp_path / "divided", training.starting_student)
    whole = trained(tmp_path / "whole", started_whole)
    assert [one[:2] for one in divided] == [one[:2] for one in whole]
    for place in (0, 1):
        assert_same_weights(*(parameters(*(shares[place] for *_, shares in both)) for both in (divided, whole)))
    kept, expected = (
        {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "divided", tmp_path / "whole")
    )
    assert kept == expected and sum(map(len, kept.values())) > 1000


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_state(folder: Path, other: Path, rank: LearnerRank) -> None:
    """Weights, moments and those of the snapshot in two checkpoints, whoever wrote which part."""
    one, two = Shards(folder), Shards(other)
    assert one.facts[0].snapshots == two.facts[0].snapshots == {"one": 1}
    assert one.facts[0].updates == two.facts[0].updates
    for name, value in parameters(rank.share(9)).items():
        for key in (*KEYS, *(snapshot_key(key, "one") for key in KEYS)):
            mine, theirs = (shards.read(key, name, 0, value.numel()) for shards in (one, two))
            assert torch.equal(mine, theirs), f"{key} of {name}"


def test_ranks_add_up_find_the_greatest_and_wait_for_each_other(models: dict[str, Path], tmp_path: Path) -> None:
    port = own_port()

    def work(rank: int) -> Any:
        engine.join(rank, 2, "127.0.0.1", port, torch.device("cpu"), 20.0)
        numbers = torch.tensor([1.0 + rank, 5.0 - rank], dtype=torch.float64)
        told = [engine.sum_over_ranks(numbers.clone()).tolist(), engine.max_over_ranks(numbers.clone()).tolist()]
        if rank == 1:
            time.sleep(0.2)
            (tmp_path / "late").touch()
        engine.barrier()
        assert (tmp_path / "late").exists(), "it did not wait"
        distributed.destroy_process_group()
        return told

    assert on_both(work) == [[[3.0, 9.0], [2.0, 5.0]]] * 2


def test_a_rank_that_cannot_meet_the_others_says_so(models: dict[str, Path]) -> None:
    host, port = rank_of(SMOOTH, models["tied"]).address()
    with pytest.raises(OpdError, match=rf"rank 1 of 2 could not meet the other ranks at {host}:{port} within 1 s \("):
        engine.join(1, 2, host, port, torch.device("cpu"), 1.0)
