"""The learner is right whatever the packing, the micro-batches and the number of ranks: real DeepSpeed.

Run as a script (`python test_learner.py RANK WORLD PORT FOLDER`) this file is one of several ranks.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from learner import engine
from learner.checkpoints import checkpoint
from learner.config import LearnerConfig, LossKernel, StudentText, environment
from learner.model import sentinel_ids
from learner.schedule import Schedule
from learner.training import MakeSender
from opd.errors import ConfigurationError, DataError
from opd.objectives.support import Outside
from opd.objectives.topk import TopKDivergence
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import PublishedWeights
from opd.settings.devices import Device, Dtype
from opd.types import HiddenScores, RemoteRows, TopKScores, Trajectory
from tests.processes import own_port
from tests.small_learner import (
    SMOOTH,
    STAGES,
    VOCABULARY,
    Likelihood,
    ReverseKL,
    Start,
    Teacher,
    batches_of,
    data,
    keep,
    lay_down,
    naive_loss,
    parameters,
    pick_up,
    rank_of,
    read_by,
    tiny,
)
from weight_sync.nccl import PullBackend, PullSender, pull
from weight_sync.receiver import assemble, collect
from weight_sync.shared_memory import SharedMemorySender, read

HERE = Path(__file__).resolve()


# ---- one rank, in this process ----


def naive_step(model: Any, step: int, teacher: Teacher | None) -> float:
    """One step as one would first write it, with torch's AdamW. The loss."""
    loss = naive_loss(model, step, teacher)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), SMOOTH.grad_clip)
    adam = torch.optim.AdamW(model.parameters(), SMOOTH.lr, (SMOOTH.beta1, SMOOTH.beta2), SMOOTH.eps, weight_decay=0)
    adam.step()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("stage", "tokens"), [(0, 32), (0, 4096), (1, 32), (2, 70), (3, 32)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_step_is_the_naive_one_whatever_the_stage_and_micro_batch(
    kind: str, stage: int, tokens: int, models: dict[str, Path], start: Start
) -> None:
    config = replace(SMOOTH, zero_stage=stage, tokens_per_microbatch=tokens, gradient_checkpointing=tokens == 70)
    scores_from_hidden = read_by(models["teacher"])
    batches = batches_of(1, config, scores_from_hidden)[0]
    assert (len(batches) > 3) == (tokens == 32) and (len(batches) > 1) == (tokens < 4096)

    rank = start(config, models[kind])
    report = rank.step(batches, ReverseKL())
    model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
    assert report.loss == pytest.approx(naive_step(model, 1, scores_from_hidden), abs=1e-5)
    weights = rank.share(1)
    ours, theirs = parameters(weights), dict(model.named_parameters())
    assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) == (kind == "untied")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=0, atol=1e-5, msg=name)
    moved = max(float((ours[n] - p).abs().max()) for n, p in _fresh(models[kind]).items())
    assert moved > 1e-3, "the comparison would hold for a learner that does nothing"
    weighted = [w for w in data(1)[1] if w.any()]
    assert report.trained_tokens == sum(np.count_nonzero(w) for w in weighted)
    assert report.tokens == sum(len(b.input_ids) for b in batches)


def _fresh(path: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("teacher", ["teacher", "untied teacher"])
def test_hidden_states_and_whole_distributions_train_alike(teacher: str, models: dict[str, Path], start: Start) -> None:
    model = AutoModelForCausalLM.from_pretrained(models[teacher])

    @torch.no_grad()
    def hidden(t: Trajectory) -> HiddenScores:
        ids = torch.from_numpy(np.concatenate([t.prompt.student_ids, t.token_ids])).long()
        states = model.model(input_ids=ids[None]).last_hidden_state[0, len(t.prompt.student_ids) - 1 : -1].numpy()
        pieces = ((states, np.arange(len(states))),)
        return HiddenScores(logprobs=np.zeros(len(states), dtype=np.float32), hidden=RemoteRows(pieces=pieces))

    whole = start(SMOOTH, models["tied"]).step(batches_of(1, SMOOTH, read_by(models[teacher]))[0], ReverseKL())
    rank = start(SMOOTH, models["tied"], models[teacher])
    by_hidden = batches_of(1, SMOOTH, hidden)[0]
    before = rank.evaluate(by_hidden, ReverseKL())
    report = rank.step(by_hidden, ReverseKL())
    assert before == pytest.approx({"loss": report.loss, **report.metrics}, abs=1e-6)
    assert report.loss == pytest.approx(whole.loss, abs=1e-5)
    assert report.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    assert rank.evaluate(by_hidden, ReverseKL())["loss"] < report.loss


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (7, 2), (7, 3), (5, 5), (4096, 2)], ids=str)
def test_a_step_does_not_depend_on_chunks_and_blocks_of_rows(
    chunk: int, block: int, models: dict[str, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, metrics, gradient and evaluation, where two teachers of different matrices read in turn."""
    heads = [models["teacher"], models["untied teacher"]]
    readers = [AutoModelForCausalLM.from_pretrained(path) for path in heads]

    @torch.no_grad()
    def hidden(t: Trajectory) -> HiddenScores:
        head = int(t.prompt.id) % 2
        ids = torch.from_numpy(np.concatenate([t.prompt.student_ids, t.token_ids])).long()
        states = readers[head].model(input_ids=ids[None]).last_hidden_state[0, len(t.prompt.student_ids) - 1 : -1]
        n = len(t.token_ids)
        return HiddenScores(
            logprobs=np.zeros(n, dtype=np.float32),
            hidden=RemoteRows(pieces=((states.numpy(), np.arange(n)),)),
            head=np.full(n, head, dtype=np.int32),
        )

    ended = []
    for head_chunk, rows in ((4096, 4096), (chunk, block)):
        monkeypatch.setattr("opd.loss.chunked._HOST_BLOCK", rows * VOCABULARY * 4)
        config = replace(SMOOTH, head_chunk=head_chunk)
        rank = start(config, models["tied"], heads)
        batches = batches_of(1, config, hidden)[0]
        assert sum(len(batch.predict_at) for batch in batches) > 20
        before = rank.evaluate(batches, FullReverseKL())
        ended.append((before, rank.step(batches, FullReverseKL()), parameters(rank.share(1))))
    (before, report, weights), (other_before, other, others) = ended
    assert other_before == pytest.approx(before, rel=1e-5, abs=1e-6)
    assert other.loss == pytest.approx(report.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(report.grad_norm, rel=1e-5)
    assert other.metrics == pytest.approx(report.metrics, rel=1e-5, abs=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.gpu
def test_the_liger_kernel_trains_alike(models: dict[str, Path], start: Start) -> None:
    """On a GPU, or with TRITON_INTERPRET=1 on a CPU."""
    plain = replace(SMOOTH, device=Device.CPU if os.environ.get("TRITON_INTERPRET") else Device.GPU)
    reports = []
    for kernel in LossKernel:
        rank = start(replace(plain, loss_kernel=kernel), models["tied"])
        batches = batches_of(1, plain, read_by(models["teacher"]))[0]
        reports.append([rank.step(batches, FullReverseKL()) for _ in range(3)])
    for torch_report, liger_report in zip(*reports, strict=True):
        assert liger_report.loss == pytest.approx(torch_report.loss, rel=1e-5)
        assert liger_report.grad_norm == pytest.approx(torch_report.grad_norm, rel=1e-4)
        assert liger_report.metrics == pytest.approx(torch_report.metrics, rel=1e-3, abs=1e-5)


def test_a_teacher_with_another_vocabulary_is_refused(models: dict[str, Path], start: Start, tmp_path: Path) -> None:
    config = Qwen3Config.from_pretrained(models["teacher"])
    config.vocab_size = VOCABULARY + 3
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"equal vocabularies.* 64 rows.* 61"):
        start(SMOOTH, models["tied"], tmp_path)


def test_a_top_k_that_names_padding_of_the_teacher_is_one_sentence(models: dict[str, Path], start: Start) -> None:
    def said(largest: int, t: Trajectory) -> TopKScores:
        ids = np.tile(np.array([0, largest], np.int32), (len(t), 1))
        own, at = np.full(len(t), -1, np.float32), np.full(ids.shape, -1, np.float32)
        return TopKScores(logprobs=own, topk_ids=ids, topk_logprobs=at)

    rank, (last, beyond) = start(SMOOTH, models["tied"]), (VOCABULARY - 1, VOCABULARY)
    rank.evaluate(
        batches_of(1, SMOOTH, partial(said, last))[0], TopKDivergence(of=FullReverseKL(), outside=Outside.RENORMALIZED)
    )
    with pytest.raises(DataError, match=rf"names id {beyond}, but the student's output has {VOCABULARY} rows.*lower"):
        rank.evaluate(
            batches_of(1, SMOOTH, partial(said, beyond))[0],
            TopKDivergence(of=FullReverseKL(), outside=Outside.RENORMALIZED),
        )


def test_a_window_shorter_than_the_sequences_is_kept(start: Start, models: dict[str, Path], tmp_path: Path) -> None:
    config = Qwen3Config.from_pretrained(models["tied"])
    windowed = Qwen3Config(
        **{**config.to_dict(), "use_sliding_window": True, "sliding_window": 8, "layer_types": None,
           "max_window_layers": 0}
    )  # fmt: skip
    plain = Qwen3ForCausalLM(windowed).eval()
    plain.save_pretrained(tmp_path)
    sentinel = start(SMOOTH, tmp_path).share(0).sentinel
    ids = torch.from_numpy(sentinel.ids).long()
    assert len(ids) > 8
    with torch.no_grad():
        logprobs = plain(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    np.testing.assert_allclose(sentinel.logprobs, logprobs.numpy(), rtol=0, atol=1e-5)


def test_masked_tokens_do_not_move_anything(models: dict[str, Path], start: Start) -> None:
    rank = start(SMOOTH, models["tied"])
    (batch,) = batches_of(1, SMOOTH)[0]
    before = parameters(rank.share(0))
    masked = replace(batch, weights=np.zeros_like(batch.weights))
    half = replace(batch, weights=np.where(np.arange(len(batch)) % 2, batch.weights, 0))
    spoilt = replace(half, behavior_logprobs=np.where(half.weights > 0, half.behavior_logprobs, -np.inf))
    values = [rank.evaluate([b], Likelihood()) for b in (half, spoilt)]
    assert values[0] == values[1]
    # The other micro-batch keeps the means finite; its own weight of zero must leave no trace.
    first = rank.step([masked, half], Likelihood())
    second = start(SMOOTH, models["tied"]).step([half], Likelihood())
    assert (first.loss, first.grad_norm) == pytest.approx((second.loss, second.grad_norm), rel=1e-6)
    assert first.tokens == second.tokens
    assert any(not torch.equal(before[n], p) for n, p in parameters(rank.share(1)).items())


def test_weights_and_export_are_the_model(models: dict[str, Path], start: Start, tmp_path: Path) -> None:
    rank = start(SMOOTH, models["untied"])
    rank.step(batches_of(1, SMOOTH)[0], Likelihood())
    weights = rank.share(7)
    assert weights.version == 7 and weights.sentinel.tolerance == 0
    again = rank.share(7)
    assert assemble([again]).digest == assemble([weights]).digest
    assert again.chunks[0].handle is not weights.chunks[0].handle
    rank.export(tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, value in exported.named_parameters():
        assert torch.equal(parameters(weights)[name], value)
    ids = torch.from_numpy(weights.sentinel.ids).long()
    with torch.no_grad():
        logprobs = exported(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(weights.sentinel.logprobs), logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_matrices_alone_are_decayed(decay: float, stage: int, models: dict[str, Path], start: Start) -> None:
    """Where there is no gradient the update is the decay, by lr * weight_decay; gains never."""
    rank = start(replace(SMOOTH, lr=0.1, weight_decay=decay, zero_stage=stage), models["untied"])
    (batch,) = batches_of(1, SMOOTH)[0]
    rank.step([replace(batch, weights=np.zeros_like(batch.weights))], Likelihood())
    after = parameters(rank.share(1))
    for name, before in _fresh(models["untied"]).items():
        factor = 1 - 0.1 * decay if before.ndim > 1 else 1.0
        torch.testing.assert_close(after[name], before * factor, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 2])
def test_every_update_has_the_rate_of_the_schedule(stage: int, models: dict[str, Path], start: Start) -> None:
    """The first of a warm-up has none and moves nothing; Adam's later ones move by about the rate, whatever the size
    of the gradient, which is told as it was before clipping."""
    config = replace(SMOOTH, schedule=Schedule.CONSTANT_WITH_WARMUP, warmup_steps=4, lr=4e-3, eps=1e-12, beta1=0.0,
                     beta2=0.0, grad_clip=0.0, zero_stage=stage)  # fmt: skip
    rank, clipped = start(config, models["tied"]), start(replace(config, grad_clip=1e-6), models["tied"])
    batches, before, reports = batches_of(1, SMOOTH)[0], _fresh(models["tied"]), []
    for update in range(4):
        reports.append(rank.step(batches, Likelihood()))
        after = parameters(rank.share(1))
        moved = torch.cat([(after[name] - p).abs().view(-1) for name, p in before.items() if "embed" not in name])
        assert float(moved.median()) == pytest.approx(update * 1e-3, rel=1e-2, abs=1e-9)
        before = {name: p.clone() for name, p in after.items()}
    assert [report.lr for report in reports] == pytest.approx([0, 1e-3, 2e-3, 3e-3])
    assert clipped.step(batches, Likelihood()).grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_is_alone_with_its_gradients_sends_them_nowhere(
    stage: int, models: dict[str, Path], start: Start
) -> None:
    """ZeRO works by what it sends, also to itself."""
    training = start(replace(SMOOTH, zero_stage=stage), models["tied"])._training
    assert training is not None
    assert training._engine.enable_backward_allreduce == (stage > 0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_rank_begins_from_its_seed_on_one_thread_and_as_exactly_as_it_is_told(
    deterministic: bool, models: dict[str, Path], start: Start
) -> None:
    config, states = replace(SMOOTH, deterministic=deterministic), []
    threads, filled = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        for ambient in (1, 2):
            torch.manual_seed(ambient)
            torch.set_num_threads(2)
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            start(config, models["tied"])
            states.append(torch.get_rng_state())
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.utils.deterministic.fill_uninitialized_memory != deterministic  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)  # as in tests/conftest.py
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
    assert torch.equal(*states)


def test_the_sentinel_is_a_text_of_the_run_if_there_is_one(models: dict[str, Path], start: Start) -> None:
    text = StudentText(sentinel=(5, 3, 9, 1))
    one, other = (
        start(replace(SMOOTH, sentinel_tolerance=0.3), models["tied"], text=text),
        start(SMOOTH, models["tied"]),
    )
    assert one.share(0).sentinel.ids.tolist() == [5, 3, 9, 1]
    assert other.share(0).sentinel.ids.tolist() == sentinel_ids(VOCABULARY).tolist()
    origin = one.share(0).sentinel
    one.step(batches_of(1, SMOOTH)[0], Likelihood())
    later = one.share(1).sentinel
    assert origin.tolerance == 0.3 and len(origin.logprobs) == 3
    assert np.array_equal(origin.logprobs, origin.origin) and np.array_equal(origin.origin, later.origin)
    assert not np.array_equal(later.logprobs, later.origin)


def test_a_checkpoint_brings_back_random_numbers_and_counts_and_all_ranks_wait_for_the_last_reader(
    models: dict[str, Path], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = start(replace(SMOOTH, max_skipped_steps=1), models["tied"])
    (batches,) = batches_of(1, SMOOTH)
    rank.step(batches, Likelihood())
    rank.step(batches, Likelihood(scale=float("nan")))
    keep(rank, tmp_path, 7)
    expected = torch.rand(3)
    (facts,) = checkpoint.Shards(tmp_path).facts
    named = hashlib.sha256(repr(rank.share(1).manifest).encode()).hexdigest()[:16]
    assert facts == checkpoint.Facts(
        step=7, updates=1, skipped=1, rank=0, ranks=1, zero_stage=0, model=named, device="cpu"
    )
    other, done = start(replace(SMOOTH, max_skipped_steps=1), models["tied"]), list[str]()
    read, wait = checkpoint.Shards.read, engine.barrier
    monkeypatch.setattr(checkpoint.Shards, "read", lambda *a: (done.append("read"), read(*a))[1])
    monkeypatch.setattr(engine, "barrier", lambda: (done.append("wait"), wait())[1])
    assert other.load(tmp_path) == 7
    assert done.index("wait") == len(done) - 1 > 0 and torch.equal(torch.rand(3), expected)
    with pytest.raises(DataError, match="1 updates before it were skipped"):
        other.step(batches, Likelihood(scale=float("nan")))


# ---- two ranks, in processes of their own ----


SMALL = 3000  # bytes of a chunk: many chunks in a tiny model


def _shared(ranks: int, stage: int, dtype: Dtype, **more: int) -> LearnerConfig:
    shape = {"ranks": ranks, "zero_stage": stage, "dtype": dtype, "eps": 1e-8, "lr": 1e-2, "tokens_per_microbatch": 40}
    return replace(SMOOTH, **shape | more)


def run_stages(rank: int, world: int, port: int, folder: Path) -> dict[str, Any]:
    """Three steps under every ZeRO stage and dtype, with a checkpoint in between; what this rank saw."""
    seen: dict[str, Any] = {}
    for stage, dtype in STAGES:
        config, name = _shared(world, stage, dtype, publish_chunk_bytes=SMALL), f"{stage} {dtype.name}"
        learner = rank_of(config, folder / "student")
        learner.setup(rank, world, "127.0.0.1", port)
        lay_down(learner.share(0), folder / f"first {name}")
        reports = [learner.step(batches_of(step, config)[rank], Likelihood()) for step in range(2)]
        keep(learner, folder / f"checkpoint {name}", 2)
        engine.barrier()
        straight, then = learner.step(batches_of(2, config)[rank], Likelihood()), learner.share(3)
        learner = rank_of(config, folder / "student")
        learner.setup(rank, world, "127.0.0.1", port)
        assert learner.load(folder / f"checkpoint {name}") == 2
        reports.append(learner.step(batches_of(2, config)[rank], Likelihood()))
        assert straight == reports[-1], f"{name}: another step than without a checkpoint"
        weights = learner.share(3)
        assert [c.digest for c in then.chunks] == [c.digest for c in weights.chunks], f"{name}: other weights"
        lay_down(weights, folder / f"last {name}")
        learner.export(folder / f"export {name}")
        evaluated = learner.evaluate(batches_of(5, config)[rank], Likelihood())
        foreign = []
        if dtype is Dtype.FLOAT32:  # a checkpoint of one rank without ZeRO, read by two with it
            assert learner.load(folder / "alone") == 2
            foreign = [learner.step(batches_of(2, config)[rank], Likelihood()).loss]
            foreign.append(learner.evaluate(batches_of(5, config)[rank], Likelihood())["loss"])
        seen[name] = {
            "foreign": foreign,
            "losses": [r.loss for r in reports],
            "norms": [r.grad_norm for r in reports],
            "metrics": [dict(r.metrics) for r in reports],
            "tokens": [[r.tokens, r.trained_tokens] for r in reports],
            "evaluated": evaluated,
        }
    learner.close()
    return seen


def test_two_ranks_train_like_one_under_every_stage(start: Start, tmp_path: Path) -> None:
    student = tiny(tmp_path / "student", tied=True, seed=1)
    port = own_port()
    variables = os.environ | environment(Device.CPU) | {"PYTHONPATH": str(HERE.parents[3])}
    arguments = [[sys.executable, str(HERE), str(r), "2", str(port), str(tmp_path)] for r in range(2)]
    config = _shared(1, 0, Dtype.FLOAT32)
    alone = start(config, student)
    first_share = alone.share(0)
    reports = [alone.step(batches_of(step, config)[0], Likelihood()) for step in range(2)]
    keep(alone, tmp_path / "alone", 2)
    ranks = [subprocess.Popen(a, env=variables) for a in arguments]
    try:
        reports.append(alone.step(batches_of(2, config)[0], Likelihood()))
        evaluated = alone.evaluate(batches_of(5, config)[0], Likelihood())
        norms = {n: float(p.double().norm()) for n, p in parameters(alone.share(3)).items()}
        assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"seen_{r}").read_text()) for r in range(2))
    for name, seen in first.items():
        assert seen == second[name], "ranks disagree"
        whole = pick_up(tmp_path / f"first {name}", first_share)
        _check_chunks(whole, SMALL)
        untrained = collect(whole, np.asarray, name).tensors()
        start_of = parameters(first_share)
        assert all(torch.equal(value, start_of[n].to(value.dtype)) for n, value in untrained), name
        published = dict(collect(pick_up(tmp_path / f"last {name}", first_share), np.asarray, name).tensors())
        own = {n: float(p.double().norm()) for n, p in published.items()}
        exact = "FLOAT32" in name.split()
        close: dict[str, float] = {"abs": 1e-4} if exact else {"rel": 2e-2}
        assert seen["tokens"] == [[r.tokens, r.trained_tokens] for r in reports]
        assert seen["losses"] == pytest.approx([r.loss for r in reports], **close), name
        assert seen["evaluated"] == pytest.approx(evaluated, **close), name
        assert seen["norms"] == pytest.approx([r.grad_norm for r in reports], rel=1e-3 if exact else 2e-2), name
        assert own == pytest.approx(norms, rel=1e-4 if exact else 1e-2), name
        if exact:
            assert seen["foreign"] == pytest.approx([reports[2].loss, evaluated["loss"]], abs=1e-5), name
            # ... and the other way: what two ranks of this stage wrote, read by one without ZeRO
            assert alone.load(tmp_path / f"checkpoint {name}") == 2
            assert alone.step(batches_of(2, config)[0], Likelihood()).loss == pytest.approx(reports[2].loss, abs=1e-5)
            assert alone.evaluate(batches_of(5, config)[0], Likelihood()) == pytest.approx(evaluated, abs=1e-4)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"export {name}", dtype="auto")
        assert str(exported.dtype) == f"torch.{name.split()[1].lower()}"
        assert all(torch.equal(published[n], p) for n, p in exported.named_parameters()), name


def _check_chunks(whole: PublishedWeights, most: int) -> None:
    """Both ranks own about half of many small chunks, in turn."""
    assert len(whole.chunks) > 8
    assert [chunk.owner for chunk in whole.chunks] == [i % 2 for i in range(len(whole.chunks))]
    assert all(chunk.nbytes <= most or chunk.last == chunk.first + 1 for chunk in whole.chunks)


def test_the_digest_names_the_content_whoever_published_it(models: dict[str, Path], start: Start) -> None:
    """... and another step is other weights."""
    config = replace(SMOOTH, publish_chunk_bytes=SMALL)
    first, second = start(config, models["tied"]), start(replace(config, zero_stage=3), models["tied"])
    before = assemble([first.share(0)])
    assert assemble([second.share(5)]).digest == before.digest
    first.step(batches_of(1, SMOOTH)[0], Likelihood())
    assert assemble([first.share(1)]).digest != before.digest


@pytest.mark.parametrize(
    ("sender", "read", "refusal"),
    [
        (SharedMemorySender, read, "damaged"),  # its memory holds version 3 now: found, and not loaded
        (partial(PullSender, PullBackend.GLOO, 60.0), pull, "not with the learner any more"),
    ],
    ids=["shared memory", "pulled"],
)
def test_a_transport_carries_two_turns(
    models: dict[str, Path], start: Start, sender: MakeSender, read: Callable[[Any], Any], refusal: str
) -> None:
    rank = start(replace(SMOOTH, publish_chunk_bytes=SMALL), models["tied"], sender=sender)
    one = assemble([rank.share(1)])
    kept = {n: p.clone() for n, p in collect(one, read, "a test").tensors()}
    rank.step(batches_of(1, SMOOTH)[0], Likelihood())
    two = assemble([rank.share(2)])
    assert all(torch.equal(p, kept[n]) for n, p in collect(one, read, "a test").tensors()), "the turn before is kept"
    assert any(not torch.equal(p, kept[n]) for n, p in collect(two, read, "a test").tensors())
    rank.share(3)
    with pytest.raises(DataError, match=refusal):
        collect(one, read, "a test")


def test_a_rank_whose_peer_never_comes_gives_up() -> None:
    """One rank of two, alone: the join ends within its deadline, in a process that then ends."""
    port = own_port()
    code = (
        "from tests.integration.learner.test_learner import *; config = replace(SMOOTH, ranks=2, deadline_s=3.0); "
        f"rank_of(config, HERE).setup(1, 2, '127.0.0.1', {port})"
    )
    variables = os.environ | environment(Device.CPU) | {"PYTHONPATH": str(HERE.parents[3])}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, timeout=200, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "the other ranks" in ended.stderr


def main(rank: int, world: int, port: int, folder: Path) -> None:
    """One rank of several, in a process of its own."""
    seen = run_stages(rank, world, port, folder)
    (folder / f"seen_{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
