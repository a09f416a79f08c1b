"""Verbs that an update may use beside a step: snapshots, extrapolation, the student's own scores, offloading."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from launch.services.learner_group import LearnerGroup
from launch.services.learner_restart import RankFactory, RestartingLearner
from launch.services.pools import ObservedStudent
from learner.checkpoint import MASTER, Shards
from learner.config import LearnerConfig, LoraConfig
from learner.learner import LearnerRank
from opd.errors import ConfigurationError
from opd.ports import PublishedWeights, WeightAck
from opd.settings.devices import Dtype
from opd.types import StepReport
from tests.integration.learner.test_learner_faults import content, equal
from tests.small_learner import SMOOTH, STAGES, Likelihood, Start, batches_of, data, keep, predictions
from weight_sync.receiver import collect

Contents = Callable[[LearnerRank], dict[str, torch.Tensor]]


def config_of(stage: int, dtype: Dtype, **more: Any) -> LearnerConfig:
    return replace(SMOOTH, zero_stage=stage, dtype=dtype, eps=1e-8, lr=1e-2, tokens_per_microbatch=40, **more)


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    """Master weights, moments, snapshots and published weights of a rank, by name."""
    numbers: Iterator[int] = iter(range(100))
    return lambda rank: content(rank, tmp_path / f"content {next(numbers)}")


def step(rank: LearnerRank, number: int, config: LearnerConfig) -> StepReport:
    return rank.step(batches_of(number, config)[0], Likelihood())


def without_snapshots(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values for name, values in state.items() if "@" not in name}


def masters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values for name, values in state.items() if name.startswith((f"{MASTER}/", "published "))}


@pytest.mark.parametrize(("stage", "dtype"), STAGES, ids=str)
def test_a_snapshot_with_the_optimizer_makes_updates_as_if_they_had_not_been(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = config_of(stage, dtype, warmup_steps=4)  # a place in the schedule that shows
    rank = start(config, models["tied"])
    step(rank, 0, config)
    rank.snapshot("here", optimizer=True)
    before, first = contents(rank), step(rank, 1, config)
    after = contents(rank)
    assert not equal(after, before)
    step(rank, 2, config)
    rank.restore("here")
    assert equal(contents(rank), before)
    assert step(rank, 1, config) == first
    assert equal(contents(rank), after)


@pytest.mark.parametrize(("stage", "dtype"), STAGES, ids=str)
def test_a_snapshot_of_weights_leaves_optimizer_and_schedule_where_they_are(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = config_of(stage, dtype, warmup_steps=4)
    rank = start(config, models["tied"])
    step(rank, 0, config)
    rank.snapshot("here")
    before, lr = contents(rank), step(rank, 1, config).lr
    now = contents(rank)
    rank.restore("here")
    restored = contents(rank)
    assert equal(masters(restored), masters(before))
    moments = [name for name in now if name.startswith("exp_avg") and "@" not in name]
    assert moments and all(torch.equal(restored[name], now[name]) for name in moments)
    assert any(not torch.equal(restored[name], before[name]) for name in moments)
    assert step(rank, 2, config).lr > lr


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, -0.25, 2.0])
@pytest.mark.parametrize(("stage", "dtype"), STAGES, ids=str)
def test_extrapolation_is_exact_in_the_float32_weights(
    stage: int, dtype: Dtype, factor: float, models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = config_of(stage, dtype)
    rank = start(config, models["tied"])
    rank.snapshot("start")
    then = contents(rank)
    for number in range(2):
        step(rank, number, config)
    now = contents(rank)
    rank.extrapolate("start", factor)
    found = contents(rank)
    if factor in (0.0, -1.0):
        assert equal(masters(found), masters(now if factor == 0 else then))
        assert not equal(masters(now), masters(then))
    unchanged = [name for name in now if not name.startswith((f"{MASTER}/", "published "))]
    assert unchanged and all(torch.equal(found[name], now[name]) for name in unchanged)
    for name in (name for name in now if name.startswith(f"{MASTER}/")):
        if factor != -1:
            assert torch.equal(found[name], now[name] + factor * (now[name] - then[name])), name
        live = found["published " + name.split("/", 2)[2]]  # what is computed with and published is the same, rounded
        assert torch.equal(live.flatten(), found[name].to(live.dtype)), name


def test_extrapolation_with_adapters_moves_adapters_alone(
    models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = replace(config_of(2, Dtype.FLOAT32), lora=LoraConfig(r=2, lora_alpha=4.0))
    rank = start(config, models["tied"])
    assert rank._training is not None
    frozen = {name: p.detach().clone() for name, p in rank._training._student.frozen()}
    step(rank, 0, config)
    rank.snapshot("one")
    then = contents(rank)
    step(rank, 1, config)
    now = contents(rank)
    rank.extrapolate("one", 1.5)
    found = contents(rank)
    names = [name for name in now if name.startswith(f"{MASTER}/")]
    assert names and all("lora_" in name for name in names)
    for name in names:
        assert torch.equal(found[name], now[name] + 1.5 * (now[name] - then[name])), name
    assert all(torch.equal(frozen[name], p) for name, p in rank._training._student.frozen())


def test_what_cannot_be_restored_or_extrapolated_is_refused_and_changes_nothing(
    models: dict[str, Path], start: Start, contents: Contents
) -> None:
    rank = start(SMOOTH, models["tied"])
    rank.snapshot("start")
    step(rank, 0, SMOOTH)
    before = contents(rank)
    for refused in (lambda: rank.restore("end"), lambda: rank.extrapolate("end", 1.0)):
        with pytest.raises(
            ConfigurationError, match=r"no snapshot 'end' \(have: 'start'\); call snapshot\('end'\) before"
        ):
            refused()
    with pytest.raises(ConfigurationError, match=r"needs a finite factor, got nan"):
        rank.extrapolate("start", float("nan"))
    for name in ("", "a/b", "a@b", "x" * 65):
        with pytest.raises(ConfigurationError, match=r"name needs 1 to 64 letters"):
            rank.snapshot(name)
    assert equal(contents(rank), before)


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_score_is_the_students_own_log_probability_and_changes_nothing(
    stage: int, chunk: int, models: dict[str, Path], start: Start, contents: Contents
) -> None:
    from transformers import AutoModelForCausalLM

    config = replace(config_of(stage, Dtype.FLOAT32), head_chunk=chunk)
    rank, straight = start(config, models["untied"]), start(config, models["untied"])
    before, (batches,) = contents(rank), batches_of(1, config)
    assert len(batches) > 1
    scores = rank.score(batches)
    assert [(s.dtype, s.shape) for s in scores] == [(np.float32, (len(b),)) for b in batches]
    model = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    expected: dict[tuple[int, ...], Sequence[float]] = {}
    trajectories, weights = data(1)
    for t, w in zip(trajectories, weights, strict=True):
        logprobs = predictions(model, t).log_softmax(-1)
        written = logprobs.gather(-1, torch.from_numpy(t.token_ids).long()[:, None])[:, 0].numpy()
        expected[tuple(t.token_ids[w > 0])] = written[w > 0]
    for batch, score in zip(batches, scores, strict=True):
        sequence = np.searchsorted(batch.cu_seqlens[1:], batch.predict_at, side="right")
        for number in np.unique(sequence):
            ids = tuple(batch.target_ids[sequence == number])
            np.testing.assert_allclose(score[sequence == number], expected[ids], atol=1e-5)
    # ... and as the objective itself sees them, weighted as in a step
    total = sum(
        float(-(s.astype(np.float64) * b.weights).sum()) / b.denominator for s, b in zip(scores, batches, strict=True)
    )
    assert rank.evaluate(batches, Likelihood())["loss"] == pytest.approx(total, rel=1e-6)
    assert equal(contents(rank), before)
    assert step(rank, 2, config) == step(straight, 2, config)


def test_an_offloaded_learner_refuses_work_until_it_is_reloaded(
    models: dict[str, Path], start: Start, tmp_path: Path, contents: Contents
) -> None:
    rank = start(SMOOTH, models["tied"])
    before = contents(rank)
    rank.reload()  # nothing is away
    for _ in range(2):
        rank.offload()
    assert rank.written()[0] == "rank_0.safetensors", "a checkpoint that is being written is no work of the model"
    verbs: list[Callable[[], Any]] = [
        lambda: step(rank, 0, SMOOTH),
        lambda: rank.share(1),
        lambda: rank.score(batches_of(1, SMOOTH)[0]),
        lambda: rank.snapshot("a"),
        lambda: rank.save(tmp_path, 1),
    ]
    for verb in verbs:
        with pytest.raises(
            ConfigurationError, match=r"^the learner's \w+ needs a model on its device, .* reload\(\) before it$"
        ):
            verb()
    rank.reload()
    assert equal(contents(rank), before)


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize(("stage", "other"), [(0, 3), (3, 2), (2, 0)])
def test_a_checkpoint_has_the_snapshots_whoever_reads_it(
    stage: int, other: int, optimizer: bool, models: dict[str, Path], start: Start, tmp_path: Path, contents: Contents
) -> None:
    config = config_of(stage, Dtype.FLOAT32)
    rank = start(config, models["tied"])
    step(rank, 0, config)
    rank.snapshot("one", optimizer=optimizer)
    step(rank, 1, config)
    keep(rank, tmp_path / "kept", 2)
    (facts,) = Shards(tmp_path / "kept").facts
    assert facts.snapshots == {"one": 1 if optimizer else None}
    resumed = start(replace(config, zero_stage=other), models["tied"])
    resumed.snapshot("forgotten")
    assert resumed.load(tmp_path / "kept") == 2
    for learner in (rank, resumed):
        learner.extrapolate("one", 0.5)
    assert equal(contents(resumed), contents(rank))
    for learner in (rank, resumed):
        learner.restore("one")
    assert equal(contents(resumed), contents(rank))
    with pytest.raises(ConfigurationError, match="no snapshot 'forgotten'"):
        resumed.restore("forgotten")


class Local:
    """A rank of this process as Ray shows it; it dies when a verb of `deaths` has been done, before it answers."""

    def __init__(self, rank: LearnerRank, deaths: list[str]) -> None:
        self._rank, self._deaths, self._dead = rank, deaths, False

    def __getattr__(self, name: str) -> Any:
        async def remote(*arguments: Any, **options: Any) -> Any:
            if not self._dead and name != "setup":  # it is set up already
                answer = getattr(self._rank, name)(*arguments, **options)
                if not self._deaths or name != self._deaths[0]:
                    return answer
                self._deaths.pop(0)
                self._dead = True
            if self._dead:
                raise ActorDiedError()
            return None

        return SimpleNamespace(remote=remote)


class LocalGroup(LearnerGroup):
    """Its ranks are objects of this process, which nobody needs to kill."""

    def end(self) -> None:
        pass


async def everything(learner: RestartingLearner, config: LearnerConfig, folder: Path, saved: int) -> list[Any]:
    """Every verb that changes a learner, in an order in which each depends on the ones before."""
    answers: list[Any] = []
    for number in range(4):
        answers.append(await learner.step(batches_of(number, config), Likelihood()))
        if number == 0:
            await learner.snapshot("one", optimizer=True)
        if number == 1:
            await learner.snapshot("two")
            await learner.extrapolate("one", 0.5)
        if number == saved:
            await learner.save(folder / "learner", number)
            await learner.written()
            await learner.kept(folder / "learner")
        answers.append(await learner.score(batches_of(7, config)))
    await learner.restore("one")
    answers.append(await learner.step(batches_of(4, config), Likelihood()))
    await learner.extrapolate("two", -0.25)
    return answers


@pytest.mark.parametrize("saved", [9, 1], ids=["from the start", "from a checkpoint with snapshots"])
@pytest.mark.parametrize(
    "deaths",
    [["snapshot"], ["extrapolate"], ["restore"], ["step", "snapshot", "score", "extrapolate", "restore"]],
    ids=" ".join,
)
@pytest.mark.parametrize(("stage", "dtype"), [STAGES[0], STAGES[5]], ids=str)
def test_new_ranks_repeat_what_lost_ones_did_bit_for_bit(
    stage: int, dtype: Dtype, deaths: list[str], saved: int, models: dict[str, Path], start: Start, tmp_path: Path,
    contents: Contents,
) -> None:  # fmt: skip
    """Ranks, group, restart and log are the real ones; only Ray is not there."""
    config = config_of(stage, dtype, warmup_steps=4)

    def learned(planned: list[str], folder: Path) -> tuple[list[Any], dict[str, torch.Tensor], list[str]]:
        ranks: list[LearnerRank] = []

        def make() -> LocalGroup:
            ranks.append(start(config, models["tied"]))
            return LocalGroup([Local(ranks[-1], planned)], config)

        async def whole(_: Path) -> None:
            pass

        (folder / "learner").mkdir(parents=True)
        learner = RestartingLearner(RankFactory(make=make, check=whole), 9, 1 << 30)
        answers = asyncio.run(everything(learner, config, folder, saved))
        return answers, contents(ranks[-1]), learner.history

    straight, expected, none = learned([], tmp_path / "straight")
    planned = [*deaths]
    answers, found, history = learned(planned, tmp_path / "deaths")
    assert not none and not planned and len(history) == len(deaths)
    assert str(answers) == str(straight) and equal(found, expected)


@dataclass
class ChangeNorm:
    """An observer of weights: how far each version is from the one before, in the Euclidean norm of all parameters."""

    norms: list[float] = field(default_factory=list)
    last: dict[str, torch.Tensor] = field(default_factory=dict)

    async def receive(self, weights: PublishedWeights) -> None:
        now = {name: p.clone() for name, p in collect(weights, np.asarray, "a test").tensors()}
        if self.last:
            self.norms.append(sum(float((now[name] - self.last[name]).square().sum()) for name in now) ** 0.5)
        self.last = now


class Engine:
    """Takes any weights."""

    async def generate(self, requests: list) -> list:
        return []

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        return WeightAck(version=weights.version, digest=weights.digest, gap=0.0)


def test_whatever_receives_versions_may_measure_them(models: dict[str, Path], start: Start) -> None:
    config = config_of(2, Dtype.FLOAT32)
    rank, observer = start(config, models["tied"]), ChangeNorm()
    student = ObservedStudent(Engine(), observers=[observer])

    async def main() -> None:
        learner = LocalGroup([Local(rank, [])], config)
        await learner.snapshot("start")
        await learner.publish(student, 0)
        await learner.step(batches_of(0, config), Likelihood())
        await learner.publish(student, 1)
        await learner.publish(student, 1)  # as a run does that goes on
        await learner.extrapolate("start", 1.0)
        await learner.publish(student, 2)
        await learner.restore("start")
        await learner.publish(student, 3)

    asyncio.run(main())
    moved, again, doubled, back = observer.norms
    assert moved > 0 and again == 0
    assert (doubled, back) == pytest.approx((moved, 2 * moved), rel=1e-5)
