"""Verbs that an update may use beside a step: snapshots, extrapolation, the student's own scores, offloading."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.checkpoints.checkpoint import MASTER, Shards
from learner.config import LearnerConfig, LoraConfig
from learner.learner import LearnerRank
from opd.errors import ConfigurationError
from opd.loss.readings import StudentEntropy, VocabularyReverseKL
from opd.settings.devices import Dtype
from opd.types import StepReport
from opd.updates.extrapolated import MATRICES
from tests.integration.learner.test_learner_faults import equal
from tests.small_learner import (
    SMOOTH,
    STAGES,
    Likelihood,
    ReverseKL,
    Start,
    batches_of,
    data,
    keep,
    predictions,
    read_by,
    tiny,
)

Contents = Callable[[LearnerRank], dict[str, torch.Tensor]]


def config_of(stage: int, dtype: Dtype, **more: Any) -> LearnerConfig:
    return replace(SMOOTH, zero_stage=stage, dtype=dtype, eps=1e-8, lr=1e-2, tokens_per_microbatch=40, **more)


def step(rank: LearnerRank, number: int, config: LearnerConfig) -> StepReport:
    return rank.step(batches_of(number, config)[0], Likelihood())


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


@pytest.mark.parametrize(("stage", "dtype"), STAGES, ids=str)
def test_extrapolation_is_exact_in_the_float32_weights(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = config_of(stage, dtype)
    rank = start(config, models["tied"])
    rank.snapshot("start")
    then = contents(rank)
    for number in range(2):
        step(rank, number, config)
    rank.snapshot("end", optimizer=True)
    now = contents(rank)
    for factor in (0.0, -1.0, 0.5, -0.25, 2.0):
        rank.restore("end")
        assert equal(contents(rank), now)
        rank.extrapolate("start", factor)
        _is_extrapolated(contents(rank), then, now, factor)


def _is_extrapolated(
    found: dict[str, torch.Tensor], then: dict[str, torch.Tensor], now: dict[str, torch.Tensor], factor: float
) -> None:
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


@pytest.mark.parametrize(("stage", "dtype"), [STAGES[0], STAGES[2], STAGES[6]], ids=str)
def test_extrapolation_of_some_parameters_leaves_all_others_bit_for_bit(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = config_of(stage, dtype)
    rank = start(config, models["untied"])
    rank.snapshot("start")
    step(rank, 0, config)
    then, now = contents(rank), None
    rank.extrapolate("start", 2.0, only=MATRICES)
    now = contents(rank)
    names = [name for name in now if name.startswith(f"{MASTER}/") and "@" not in name]
    moved = {name for name in names if not torch.equal(now[name], then[name])}
    assert moved == {name for name in names if "proj" in name} and len(moved) >= 7
    assert any("q_norm" in name for name in names) and any("embed" in name for name in names)
    for name in names:
        assert torch.equal(
            now["published " + name.split("/", 2)[2]].flatten().float(),
            now[name].to(now["published " + name.split("/", 2)[2]].dtype).float(),
        ), name


def test_a_pattern_that_is_found_in_no_name_is_refused(models: dict[str, Path], start: Start) -> None:
    rank = start(SMOOTH, models["tied"])
    rank.snapshot("start")
    with pytest.raises(ConfigurationError, match=r"'nowhere' is found in the name of none \(such as '.*embed"):
        rank.extrapolate("start", 1.0, only="nowhere")
    with pytest.raises(ConfigurationError, match="needs a regular expression"):
        rank.extrapolate("start", 1.0, only="(")


def test_an_older_snapshot_is_kept_where_that_is_asked(
    models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = config_of(0, Dtype.FLOAT32)
    rank = start(config, models["tied"])
    rank.snapshot("start", keep_older=True)
    first = contents(rank)
    step(rank, 0, config)
    rank.snapshot("start", keep_older=True)
    rank.restore("start")
    assert equal(masters(contents(rank)), masters(first))
    step(rank, 1, config)
    second = contents(rank)
    rank.snapshot("start")
    step(rank, 2, config)
    rank.restore("start")
    assert equal(masters(contents(rank)), masters(second))


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


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("stage", [0, 3])
def test_readings_are_those_of_the_whole_distributions_and_change_nothing(
    stage: int, chunk: int, models: dict[str, Path], start: Start, contents: Contents
) -> None:
    config = replace(config_of(stage, Dtype.FLOAT32), head_chunk=chunk)
    rank, straight = start(config, models["untied"]), start(config, models["untied"])
    before, (batches,) = contents(rank), batches_of(1, config, read_by(models["tied"]))
    found = rank.read(batches, [StudentEntropy(), VocabularyReverseKL()])
    assert [(values.dtype, values.shape) for values in found] == [(np.float32, (2, len(b))) for b in batches]
    for number, name in enumerate(("entropy", "reverse_kl")):
        counted = [values[number][b.weights > 0] for values, b in zip(found, batches, strict=True)]
        expected = rank.evaluate(batches, ReverseKL())[name]  # the mean over trained tokens, by another way
        assert np.concatenate(counted).mean() == pytest.approx(expected, rel=1e-5)
    assert equal(contents(rank), before)
    assert step(rank, 2, config) == step(straight, 2, config)


@pytest.mark.parametrize(("stage", "dtype"), STAGES, ids=str)
def test_offloading_frees_all_that_a_learner_holds_and_changes_nothing(
    stage: int, dtype: Dtype, start: Start, contents: Contents, tmp_path: Path
) -> None:
    config = config_of(stage, dtype, warmup_steps=3)
    student = tiny(tmp_path / "wide", tied=True, seed=1, width=128)  # of whole pages
    straight, rank = (start(config, student) for _ in range(2))
    for number in range(3):
        assert step(rank, number, config) == step(straight, number, config)
        training = rank._training
        assert training is not None
        row = dict(training._engine.module.named_parameters())["causal.model.embed_tokens.weight"].data[30:31]
        before = row.clone()
        rank.offload()
        if number and stage < 3:  # the first update has a rate of 0
            assert not torch.equal(row, before), "its pages are zeros now, or those of the checkpoint's file"
        rank.reload()
    assert equal(contents(rank), contents(straight))


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
        lambda: rank.read(batches_of(1, SMOOTH)[0], [StudentEntropy()]),
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
