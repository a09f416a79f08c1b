"""The rollout engine on a real vLLM: what it writes, what it says about it, and which weights it holds."""

import os

from actors.config import StudentConfig, environment
from opd.settings.devices import Device, Dtype

os.environ |= environment(Device.CPU)  # before anything imports vLLM

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from actors.engine import VLLMEngine
from actors.engine_thread import EngineLoop, EngineStopped
from actors.startup import read_limits
from learner.publishing import Publisher, StagedSender
from opd.errors import ConfigurationError, DataError, OpdError, ServiceHung
from opd.ports import Completion, GenerateRequest, PublishedWeights, Sampling, Sentinel, WeightAck, WeightShard
from opd.types import StopReason, TopKScores
from tests.fault_matrix import Witness
from tests.tiny_models import EOS, VOCABULARY, impatient, logprobs, tiny_model
from weight_sync.receiver import assemble, digest_of

LONGEST = 96
SEED = 11
SLOTS = 16  # requests that the engine writes at the same time
T = TypeVar("T")


def student(seed: int, tied: bool, **changes: int) -> Qwen3ForCausalLM:
    """A tiny student."""
    return tiny_model(seed, tied=tied, positions=LONGEST, **changes)


def written(model: Qwen3ForCausalLM, ids: np.ndarray, start: int) -> np.ndarray:
    """Logprobs of the tokens from `start` on."""
    full = logprobs(model, ids)[start - 1 : -1]
    return full.gather(1, torch.from_numpy(ids[start:]).long()[:, None])[:, 0].numpy()


def weights(model: Qwen3ForCausalLM, version: int, tolerance: float = 1e-3, without: str = "-") -> PublishedWeights:
    """What a learner holding `model` would publish in small chunks; a handle gives their bytes when called.

    Parameters with `without` in their names are left out.
    """
    named = {n: p for n, p in model.named_parameters() if without not in n}  # tied ones once
    return published(model, named, version, tolerance=tolerance)


def published(
    model: Qwen3ForCausalLM,
    named: Mapping[str, torch.Tensor],
    version: int,
    *,
    tolerance: float,
    chunk_bytes: int = 20_000,
    lora_scale: float = 0.0,
) -> PublishedWeights:
    """`named` as a version of `model`, whose log-probabilities are the sentinel."""
    publisher = Publisher(
        list(named),
        [tuple(p.shape) for p in named.values()],
        [p.dtype for p in named.values()],
        chunk_bytes=chunk_bytes,
        rank=0,
        ranks=1,
        sender=StagedSender(lambda array: partial(frozen, array.copy())),
        lora_scale=lora_scale,
    )
    values = [named[name].detach() for name in publisher.manifest.names]
    ids = np.random.default_rng(5).integers(3, VOCABULARY, 24).astype(np.int32)
    return assemble(
        [
            WeightShard(
                version=version,
                manifest=publisher.manifest,
                chunks=publisher.chunks(lambda first, last: nullcontext(values[first:last])),
                sentinel=Sentinel(ids=ids, logprobs=written(model, ids, 1), tolerance=tolerance),
            )
        ]
    )


def with_handle(value: PublishedWeights, number: int, handle: Callable[[], np.ndarray]) -> PublishedWeights:
    """`value` whose chunk `number` is somewhere else; what is announced stays the same."""
    chunks = [replace(c, handle=handle) if i == number else c for i, c in enumerate(value.chunks)]
    return replace(value, chunks=tuple(chunks))


def requests(sampling: Sampling, prompts: int = 4, samples: int = 3) -> list[GenerateRequest]:
    """Groups of requests about random prompts of different lengths."""
    random = np.random.default_rng(3)
    contexts = [random.integers(3, VOCABULARY, 4 + 3 * p).astype(np.int32) for p in range(prompts)]
    return [
        GenerateRequest(prompt_id=f"p{p}", sample=s, context_ids=contexts[p], sampling=sampling)
        for p in range(prompts)
        for s in range(samples)
    ]


@dataclass
class House:
    """An engine that serves a whole module, with the loop it lives in and the model it was started from."""

    engine: VLLMEngine
    origin: Qwen3ForCausalLM
    path: Path
    tied: bool
    loop: asyncio.AbstractEventLoop

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 240))

    def generate(self, asked: Sequence[GenerateRequest]) -> list[Completion]:
        return self.run(self.engine.generate(asked))

    async def begun(self, asked: Sequence[GenerateRequest], steps: int) -> "asyncio.Future[list[Completion]]":
        """The call that writes them, once the engine has made so many steps of it."""
        before = (await self.engine.stats()).steps
        writing = asyncio.ensure_future(self.engine.generate(asked))
        while (await self.engine.stats()).steps < before + steps:  # noqa: ASYNC110 (it can only be polled)
            await asyncio.sleep(0.01)  # a job at a time: the engine steps only between them
        return writing

    def receive(self, value: PublishedWeights) -> float:
        receipt = self.run(self.engine.receive(value))
        assert (receipt.version, receipt.digest) == (value.version, value.digest)
        return receipt.gap


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    tied = request.param
    origin = student(0, tied)
    path = tmp_path_factory.mktemp("student")
    origin.save_pretrained(path)
    config = StudentConfig(
        path=str(path),
        max_model_len=LONGEST,
        dtype=Dtype.FLOAT32,
        kv_cache_bytes=16 << 20,
        max_num_seqs=SLOTS,
        deadline_s=60,
    )
    engine = VLLMEngine(config, SEED, lambda handle: handle(), sleeps=True)
    loop = asyncio.new_event_loop()
    house = House(engine=engine, origin=origin, path=path, tied=tied, loop=loop)
    house.run(engine.ready())
    yield house
    house.run(engine.close())
    loop.close()


def test_writes_with_the_checkpoint_s_weights_as_version_0(house: House) -> None:
    asked = requests(Sampling(max_tokens=40))
    for request, answer in zip(asked, house.generate(asked), strict=True):
        ids = np.concatenate([request.context_ids, answer.token_ids])
        expected = written(house.origin, ids, len(request.context_ids))
        np.testing.assert_allclose(answer.behavior.logprobs, expected, atol=1e-4)
        assert set(answer.versions.tolist()) == {0}
        assert answer.digests == {0: ""}, "nobody published these"
        assert answer.token_ids.dtype == answer.versions.dtype == np.int32
        ended = answer.token_ids[-1] == EOS
        assert answer.stop is (StopReason.END if ended else StopReason.LENGTH)
        assert ended or len(answer.token_ids) == 40
        assert EOS not in answer.token_ids[:-1]


def test_behavior_is_the_distribution_that_was_sampled_from(house: House) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.7, top_p=0.9)
    asked = requests(sampling)
    for request, answer in zip(asked, house.generate(asked), strict=True):
        start = len(request.context_ids)
        ids = np.concatenate([request.context_ids, answer.token_ids])
        tempered = (logprobs(house.origin, ids)[start - 1 : -1] / 0.7).softmax(-1)
        ordered, order = tempered.sort(descending=True)
        kept = torch.zeros_like(tempered, dtype=torch.bool)
        kept.scatter_(1, order, ordered.cumsum(-1) - ordered < 0.9)  # up to the token that fills the nucleus
        nucleus = torch.where(kept, tempered, 0.0)
        nucleus /= nucleus.sum(-1, keepdim=True)
        chosen = nucleus.gather(1, torch.from_numpy(answer.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(answer.behavior.logprobs, chosen.log().numpy(), atol=2e-4)


def test_topk_is_the_writer_s_own_and_the_written_token_may_lie_outside(house: House) -> None:
    asked = requests(Sampling(max_tokens=30, topk=3)) + requests(Sampling(max_tokens=30, topk=7), samples=1)
    outside = 0
    for request, answer in zip(asked, house.generate(asked), strict=True):
        behavior = answer.behavior
        assert isinstance(behavior, TopKScores)
        start = len(request.context_ids)
        ids = np.concatenate([request.context_ids, answer.token_ids])
        full = logprobs(house.origin, ids)[start - 1 : -1]
        values, best = full.topk(request.sampling.topk)
        assert np.array_equal(behavior.topk_ids, best.numpy())
        np.testing.assert_allclose(behavior.topk_logprobs, values.numpy(), atol=1e-4)
        np.testing.assert_allclose(behavior.logprobs, written(house.origin, ids, start), atol=1e-4)
        outside += int((best.numpy() != answer.token_ids[:, None]).all(-1).sum())
    assert outside > 0


def test_greedy_writes_the_likeliest_token_and_says_its_logprob(house: House) -> None:
    # a mixed batch, because vLLM takes another path when all of it is greedy
    asked = requests(Sampling(max_tokens=20, temperature=0.0)) + requests(Sampling(max_tokens=20), samples=1)
    for answers in (house.generate(asked), house.generate(asked[:12])):
        for request, answer in zip(asked[:12], answers[:12], strict=True):
            start = len(request.context_ids)
            full = logprobs(house.origin, np.concatenate([request.context_ids, answer.token_ids]))[start - 1 : -1]
            best, likeliest = full.max(-1)
            assert np.array_equal(answer.token_ids, likeliest.numpy())
            np.testing.assert_allclose(answer.behavior.logprobs, best.numpy(), atol=1e-4)


def test_tokens_depend_on_the_request_and_the_version_only(house: House) -> None:
    asked = requests(Sampling(max_tokens=30))
    once = {key(r): a.token_ids for r, a in zip(asked, house.generate(asked), strict=True)}
    assert len({tuple(t) for t in once.values()}) == len(asked)  # samples of a group differ

    async def twice() -> list[list[Completion]]:
        return await asyncio.gather(house.engine.generate(asked[::-2]), house.engine.generate(asked[-2::-2]))

    halves = house.run(twice())
    for part, answers in zip((asked[::-2], asked[-2::-2]), halves, strict=True):
        for request, answer in zip(part, answers, strict=True):
            assert np.array_equal(answer.token_ids, once[key(request)])
    house.receive(weights(house.origin, 1))  # the same weights as another version
    later = house.generate(asked)
    changed = [not np.array_equal(a.token_ids, once[key(r)]) for r, a in zip(asked, later, strict=True)]
    assert sum(changed) > len(asked) // 2
    assert all(set(a.versions.tolist()) == {1} for a in later)


def key(request: GenerateRequest) -> tuple[str, int]:
    """What names a completion."""
    return request.prompt_id, request.sample


def test_received_weights_write(house: House) -> None:
    asked = requests(Sampling(max_tokens=40))
    for version in (7, 8):
        model = student(version, house.tied)
        held = weights(model, version)
        assert len(held.chunks) > 5
        gap = house.receive(held)
        assert 0 <= gap < 1e-4
        for request, answer in zip(asked, house.generate(asked), strict=True):
            ids = np.concatenate([request.context_ids, answer.token_ids])
            expected = written(model, ids, len(request.context_ids))
            np.testing.assert_allclose(answer.behavior.logprobs, expected, atol=1e-4)
            assert set(answer.versions.tolist()) == {version}
            assert answer.digests == {version: held.digest}
    stats = house.run(house.engine.stats())
    assert (stats.version, stats.digest) == (8, held.digest)
    assert stats.updates >= 2
    assert stats.tokens > stats.requests > 0
    assert stats.busy_s > 0


def test_an_engine_that_slept_writes_what_it_would_have(house: House) -> None:
    """With weights that it kept itself, with those that it received, and with others that came when it woke."""
    asked = requests(Sampling(max_tokens=20, topk=2))

    def slept() -> None:
        house.run(house.engine.sleep())
        house.run(house.engine.sleep())
        with pytest.raises(ConfigurationError, match=r"the student engine sleeps, .* call wake\(\) before"):
            house.generate(asked)
        with pytest.raises(ConfigurationError, match="the student engine sleeps"):
            house.receive(weights(house.origin, 30))
        house.run(house.engine.wake())
        house.run(house.engine.wake())

    house.engine._sleep.last = None  # as before anything was received
    before = house.generate(asked)
    slept()
    assert same(house.generate(asked), before)
    for version in (31, 32):
        house.receive(weights(student(version, house.tied), version))
        before, stats = house.generate(asked), house.run(house.engine.stats())
        slept()
        assert same(house.generate(asked), before)
        assert house.run(house.engine.stats()).digest == stats.digest
        slept()  # the next version is the first that is loaded


def same(answers: Sequence[Completion], before: Sequence[Completion]) -> bool:
    """Whether completions are equal bit by bit, the weights that wrote them too."""
    return all(
        np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.behavior.logprobs, b.behavior.logprobs)
        and (a.digests, a.versions.tolist()) == (b.digests, b.versions.tolist())
        for a, b in zip(answers, before, strict=True)
    )


def test_an_engine_that_sleeps_drops_what_has_no_caller_and_finds_weights_that_changed(house: House) -> None:
    held = weights(student(33, house.tied), 33)
    kept = [np.array(chunk.handle()) for chunk in held.chunks]  # as shared memory is: others may write there
    lent = replace(held, chunks=tuple(replace(c, handle=lambda a=a: a) for c, a in zip(held.chunks, kept, strict=True)))
    house.receive(lent)

    async def left() -> None:
        call = await house.begun(requests(Sampling(max_tokens=64)), 2)
        await house.engine.sleep()
        with pytest.raises(OpdError, match="was put to sleep while it wrote"):
            await call

    house.run(left())
    house.run(house.engine.wake())
    kept[2][:] = 0
    with pytest.raises(DataError, match=r"cannot load weights version 33 again: chunk 2 has changed in memory"):
        house.generate(requests(Sampling(max_tokens=4)))
    house.receive(held)
    assert house.generate(requests(Sampling(max_tokens=4)))


def frozen(array: np.ndarray) -> np.ndarray:
    """As an object store gives it: read-only."""
    array.flags.writeable = False
    return array


def crossing(
    house: House, held: PublishedWeights, chunk: int
) -> tuple[list[tuple[GenerateRequest, Completion]], WeightAck]:
    """Requests, with their answers, in the middle of whose writing `held` arrived, `chunk` last."""
    asked = requests(Sampling(max_tokens=64), prompts=6)
    before = house.run(house.engine.stats()).steps

    def arrive_after_ten_steps() -> np.ndarray:
        while True:
            stats = asyncio.run_coroutine_threadsafe(house.engine.stats(), house.loop).result(20)
            if stats.steps >= before + 10:
                return held.chunks[chunk].handle()

    async def both() -> tuple[list[Completion], WeightAck]:
        late = with_handle(held, chunk, arrive_after_ten_steps)
        return await asyncio.gather(house.engine.generate(asked), house.engine.receive(late))

    answers, receipt = house.run(both())
    crossed = [(r, a) for r, a in zip(asked, answers, strict=True) if len(set(a.versions.tolist())) == 2]
    assert len(crossed) > 2
    return crossed, receipt


def assert_each_wrote_its_part(
    crossed: Sequence[tuple[GenerateRequest, Completion]], models: Mapping[int, Qwen3ForCausalLM]
) -> None:
    """Every token has the log-probability that the model of its version gives it, the older version first."""
    old, new = models
    for request, answer in crossed:
        ids, start = np.concatenate([request.context_ids, answer.token_ids]), len(request.context_ids)
        said = {version: written(model, ids, start) for version, model in models.items()}
        assert set(answer.versions.tolist()) == {old, new} and (np.diff(answer.versions) >= 0).all()
        expected = np.where(answer.versions == old, said[old], said[new])
        np.testing.assert_allclose(answer.behavior.logprobs, expected, atol=1e-4)


def test_weights_that_arrive_in_flight_write_the_rest(house: House) -> None:
    models = {version: student(version, house.tied) for version in (20, 21)}
    first, held = (weights(model, version) for version, model in models.items())
    house.receive(first)
    crossed, receipt = crossing(house, held, chunk=3)
    assert receipt.gap < 1e-4
    assert_each_wrote_its_part(crossed, models)
    assert all(answer.digests == {20: first.digest, 21: held.digest} for _, answer in crossed)


def test_the_sentinel_does_not_wait_for_the_queue(house: House) -> None:
    """New weights come while four times as many requests are open as the engine writes at once."""
    asked = requests(Sampling(max_tokens=48), prompts=8, samples=8)
    assert len(asked) == 4 * SLOTS
    sentinel = np.random.default_rng(5).integers(3, VOCABULARY, 24).tolist()

    def steps_of_it(loop: EngineLoop) -> int:
        assert loop.engine.get_num_unfinished_requests() > 2 * SLOTS, "there is no queue"
        loop.engine.reset_prefix_cache(reset_running_requests=True)  # as new weights do
        before = loop.steps
        loop.finish(sentinel, read_limits(house.engine._config).reading())
        return loop.steps - before

    async def both() -> tuple[list[Completion], int]:
        writing = await house.begun(asked, 5)
        steps = await asyncio.wrap_future(house.engine._thread.run(steps_of_it))
        return await writing, steps

    answers, steps = house.run(both())
    assert steps <= 3
    assert len(answers) == len(asked) and all(len(a.token_ids) for a in answers)


@pytest.mark.faults("chunk damaged", "chunk lost", "chunk repeated or reordered")
def test_chunks_that_are_damaged_lost_or_mixed_up_are_refused_and_the_old_weights_serve_on(
    house: House, witness: Witness
) -> None:
    good = weights(student(30, house.tied), 30)
    house.receive(good)
    asked = requests(Sampling(max_tokens=12))
    before = house.generate(asked)
    bad = weights(student(31, house.tied), 31)

    def flipped(number: int, bit: int) -> Callable[[], np.ndarray]:
        data = bad.chunks[number].handle().copy()
        data[bit // 8] ^= 1 << bit % 8
        return lambda: data

    def lost() -> np.ndarray:
        raise DataError("the learner has ended")

    last = len(bad.chunks) - 1
    damaged, absent, mixed = "chunk damaged", "chunk lost", "chunk repeated or reordered"
    for kind, wrong, why in (
        (damaged, with_handle(bad, last, flipped(last, 7)), f"chunk {last} is .* damaged"),
        (damaged, with_handle(bad, 0, flipped(0, 8 * 1000 + 3)), "chunk 0 is .* damaged"),
        (damaged, with_handle(bad, 1, lambda: bad.chunks[1].handle()[:-4]), "bytes, but"),
        (mixed, with_handle(bad, 2, bad.chunks[3].handle), "chunk 2"),  # in another's place
        (mixed, with_handle(bad, 2, good.chunks[2].handle), "chunk 2 is .* damaged"),  # of the version before
        (absent, with_handle(bad, 2, lost), "the learner has ended"),
        (mixed, replace(bad, chunks=(*bad.chunks, bad.chunks[-1])), "overlaps"),  # repeated
        (mixed, replace(bad, chunks=bad.chunks[::-1]), "leaves out"),  # reordered in the announcement
        (absent, replace(bad, chunks=bad.chunks[:-1]), "its chunks end at"),
        (damaged, replace(bad, manifest=replace(bad.manifest, nbytes=bad.manifest.nbytes - 4)), "manifest lists"),
        (damaged, replace(bad, digest=good.digest), "calls itself"),
    ):
        with pytest.raises(DataError, match=why):
            house.receive(wrong)
        witness(kind)
    after = house.generate(asked)
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(before, after, strict=True))
    assert after[0].digests == {30: good.digest}
    assert house.receive(bad) < 1e-4, "the same version, undamaged, is welcome"


def test_wrong_weights_are_found_and_nothing_is_written_until_good_ones_come(house: House) -> None:
    good, other = weights(student(40, house.tied), 40), weights(student(41, house.tied), 41)
    asked = requests(Sampling(max_tokens=64), prompts=6)

    async def both() -> list[object]:
        pretending = replace(good, sentinel=other.sentinel)
        writing, receiving = house.engine.generate(asked), house.engine.receive(pretending)
        return await asyncio.gather(writing, receiving, return_exceptions=True)

    for outcome in house.run(both()):
        assert isinstance(outcome, DataError)
        assert "does not hold version 40 as the learner has it" in str(outcome)
    with pytest.raises(DataError, match="does not hold version 40"):
        house.generate(asked)
    assert house.receive(good) < 1e-4
    assert set(house.generate(asked)[0].versions.tolist()) == {40}


def test_weights_of_another_model_are_refused_and_the_next_good_ones_load(house: House) -> None:
    good = weights(student(50, house.tied), 50)
    renamed = tuple(n.replace("0.mlp.gate_proj", "0.mlp.gate_projection") for n in good.manifest.names)
    manifest = replace(good.manifest, names=renamed)
    foreign = replace(good, manifest=manifest, digest=digest_of(manifest, good.chunks))
    missing = weights(student(50, house.tied), 50, without="layers.1.self_attn.q_norm")
    for wrong, why in ((foreign, "does not load"), (missing, "q_norm")):
        with pytest.raises(DataError, match=why):
            house.receive(wrong)
        with pytest.raises(DataError, match="no usable weights"):
            house.generate(requests(Sampling(max_tokens=4)))
        assert house.receive(good) < 1e-4


def test_more_prompt_than_a_step_of_vllm_usually_takes(house: House) -> None:
    random = np.random.default_rng(4)
    asked = [
        GenerateRequest(
            prompt_id=f"long{p}",
            sample=0,
            context_ids=random.integers(3, VOCABULARY, 80).astype(np.int32),
            sampling=Sampling(max_tokens=8),
        )
        for p in range(60)
    ]
    together = house.generate(asked)
    for request, answer in zip(asked[::12], together[::12], strict=True):
        assert np.array_equal(house.generate([request])[0].token_ids, answer.token_ids)


def test_requests_that_cannot_be_written_are_refused_by_name(house: House) -> None:
    def ask(context: list[int], sampling: Sampling) -> None:
        ids = np.asarray(context, dtype=np.int32)
        house.generate([GenerateRequest(prompt_id="shop/17", sample=0, context_ids=ids, sampling=sampling)])

    few = Sampling(max_tokens=4)
    with pytest.raises(DataError, match=r"'shop/17'.*max_model_len=96.*raise it to 100"):
        ask([5] * 96, few)
    with pytest.raises(DataError, match=r"'shop/17'.*empty"):
        ask([], few)
    with pytest.raises(DataError, match=r"'shop/17'.*160 is outside"):
        ask([4, VOCABULARY], few)
    with pytest.raises(DataError, match=r"'shop/17'.*topk=161"):
        ask([4], Sampling(max_tokens=4, topk=VOCABULARY + 1))
    assert house.generate([]) == []


def test_a_wait_has_a_deadline_and_what_nobody_waits_for_is_dropped(house: House) -> None:
    config = house.engine._config
    house.engine._config = impatient(config)
    try:
        with pytest.raises(
            ServiceHung, match=r"did not finish (admitting requests|writing \d+ of 90 completions) within"
        ):
            house.generate(requests(Sampling(max_tokens=64), prompts=6, samples=15))
    finally:
        house.engine._config = config
    unfinished = house.engine._thread.run(lambda loop: loop.engine.get_num_unfinished_requests())
    assert unfinished.result(20) == 0


def test_what_vllm_cannot_start_says_why(house: House, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        VLLMEngine(StudentConfig(path=str(tmp_path), max_model_len=32), 0, lambda handle: handle)
    shutil.copy(house.path / "config.json", tmp_path)  # and no weights
    broken = VLLMEngine(StudentConfig(path=str(tmp_path), max_model_len=32), 0, lambda handle: handle)
    with pytest.raises(EngineStopped, match="the student engine stopped"):
        house.run(broken.ready())


def test_when_the_engine_dies_everybody_is_told(
    house: House,
) -> None:  # last: it takes the module's engine along
    asked = requests(Sampling(max_tokens=64))

    def break_it(loop: EngineLoop) -> None:
        def step() -> None:
            raise RuntimeError("out of memory")

        loop.engine.step = step

    async def scene() -> list[object]:
        writing = await house.begun(asked, 1)
        await asyncio.wrap_future(house.engine._thread.run(break_it))
        return await asyncio.gather(writing, return_exceptions=True)

    (outcome,) = house.run(scene())
    assert isinstance(outcome, EngineStopped)
    assert "out of memory" in str(outcome)
    with pytest.raises(EngineStopped, match="out of memory"):
        house.generate(asked)
    with pytest.raises(EngineStopped, match="out of memory"):
        house.receive(weights(house.origin, 60))
