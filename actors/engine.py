"""Rollout engine of the student: vLLM in this process behind `opd.ports.StudentEngine`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from actors.config import InnerTeacher, StudentConfig
from actors.engine_thread import Call, EngineLoop, EngineThread
from actors.sleep import EngineSleep
from actors.startup import EngineLimits, build, read_limits
from opd.deadlines import within
from opd.errors import ConfigurationError, DataError, OpdError, ServiceHung
from opd.ports import Completion, GenerateRequest, PublishedWeights, Sentinel, WeightAck
from opd.rollouts.seeds import sampling_seed
from opd.settings.devices import resolve_device, resolve_dtype
from opd.types import BlendedScores, StopReason, TokenScores, TopKScores
from weight_sync.receiver import ReceivedWeights, collect
from weight_sync.sentinel import NUMERICS, Gap, allowed

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

Result = TypeVar("Result")
SMALLEST_PART = 16  # completions worth a message of their own; with larger parts scoring would wait for the last one
_START_S = 300.0  # a model may take as long to load, however soon its answers are due


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the start: finished completions and their tokens, engine steps, weight updates, seconds in both.

    `version` is the policy version that writes now, `digest` names its weights (`opd.ports.PublishedWeights.digest`).
    """

    requests: int
    tokens: int
    steps: int
    busy_s: float
    updates: int
    update_s: float
    version: int
    digest: str


class VLLMEngine:
    """A vLLM engine that generates completions and loads new weights; several calls may be open at once.

    `fetch` turns a handle (of a chunk of weights) into the bytes behind it. Until the first `receive` the
    engine writes with the checkpoint's own weights, as version 0 with the digest "".
    """

    def __init__(
        self,
        config: StudentConfig,
        run_seed: int,
        fetch: Callable[[Any], np.ndarray],
        ends: Sequence[int] = (),
        inner: InnerTeacher | None = None,
        sleeps: bool = False,
    ) -> None:
        """Start the engine; `ends` are ids that end a completion beside those in the checkpoint's own files.

        With an `inner` teacher it can sample from blends of both (`GenerateRequest.blend`). One that `sleeps` can give
        its memory up for a while.
        """
        self._config = config
        self._run_seed = run_seed
        self._fetch = fetch
        self._limits: EngineLimits = read_limits(config, ends, inner.name if inner else "")
        self._version, self._digest = 0, ""
        self._refusal: str | None = None
        self._floor: Gap | None = None  # what engine and learner differed by on the checkpoint itself
        self._receiving = asyncio.Lock()
        self._updates, self._update_s = 0, 0.0
        on_gpu = sleeps and resolve_device(config.device, "student").type != "cpu"
        self._sleep = EngineSleep(on_gpu=on_gpu, reloads=sleeps and inner is None)
        self._thread = EngineThread(partial(build, config, inner, self._limits.ends, sleeps=on_gpu))

    async def ready(self) -> None:
        """Return when the engine can generate. Raises its start-up error otherwise."""
        await self._soon(asyncio.wrap_future(self._thread.started), "starting vLLM", at_least=_START_S)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in order, when all are done.

        `behavior` holds logprobs of the distribution that was sampled from: after temperature, then cut to
        the nucleus and renormalized if `top_p` < 1 (ids outside it have -inf). Greedy writing (temperature 0)
        samples from no distribution; there `behavior` is the policy's own softmax at temperature 1. A
        completion that ended itself includes its end-of-text token. Raises `DataError` for a request that
        cannot be written, naming its prompt.
        """
        answers: dict[int, Completion] = {}
        async for positions, completions in self.generate_in_parts(requests):
            answers |= zip(positions, completions, strict=True)
        return [answers[i] for i in range(len(requests))]

    async def generate_in_parts(
        self, requests: Sequence[GenerateRequest]
    ) -> AsyncIterator[tuple[list[int], list[Completion]]]:
        """As `generate`, but completions come with their positions as they are done.

        A part is an eighth of the call, or `SMALLEST_PART` completions: parts cost a message each. Where they are cut
        depends on how many are done and not on time, so a call that is repeated alone is cut alike.
        """
        for request in requests:
            self._limits.check(request)
        if not requests:
            return
        await self.ready()
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def deliver(part: "list[tuple[int, RequestOutput]]") -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        call = Call(deliver, max(SMALLEST_PART, len(requests) // 8))
        call.future.add_done_callback(lambda done: loop.call_soon_threadsafe(parts.put_nowait, done.exception()))
        self._thread.watch(call.future)
        left = len(requests)
        try:
            await self._within(self._thread.run(partial(self._admit, call, requests)), "admitting requests")
            while left:
                part = await self._soon(parts.get(), f"writing {left} of {len(requests)} completions")
                if isinstance(part, BaseException):
                    raise part
                yield [slot for slot, _ in part], [_completion(o, requests[slot]) for slot, o in part]
                left -= len(part)
        finally:
            self._drop(call)

    def _admit(self, call: Call, requests: Sequence[GenerateRequest], loop: EngineLoop) -> None:
        self._sleep.check_awake()
        if self._refusal is not None:
            raise DataError(self._refusal)
        if (lacking := self._sleep.lacking()) is not None:
            self._load(*lacking, loop)
        loop.admit(call, [(r.context_ids.tolist(), self._params(r)) for r in requests])

    def _params(self, request: GenerateRequest) -> "SamplingParams":
        seed = sampling_seed(self._run_seed, request.prompt_id, request.sample, self._version)
        return self._limits.params(request.sampling, seed, request.blend)

    def _drop(self, call: Call) -> None:
        if not call.future.done():
            with suppress(OpdError):  # an engine that is gone has dropped it already
                self._thread.run(lambda loop: loop.abort(call))

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        """Make `weights` live for all tokens written from now on.

        Chunks that are damaged or lost are found before the model is touched, and the old weights go on serving. If
        the loaded model does not repeat the sentinel, everything being written fails, and the engine refuses to
        write until a good `receive`: both raise `DataError`. Requests in flight are continued by the new
        weights (their caches are computed anew), and their tokens say which version wrote them.
        """
        self._limits.check_sentinel(weights.sentinel)
        async with self._receiving:
            await self.ready()
            collecting = asyncio.to_thread(collect, weights, self._fetch, "the student engine")
            # Not the engine's own fault: a call stuck here waits for the learner.
            delivered = await self._soon(collecting, f"fetching weights version {weights.version}", raises=OpdError)
            job = partial(self._load, weights, delivered)
            return await self._within(self._thread.run(job), f"loading weights version {weights.version}")

    def _load(self, weights: PublishedWeights, delivered: ReceivedWeights, loop: EngineLoop) -> WeightAck:
        from actors.weight_loader import transfer

        self._sleep.check_awake()
        sentinel, start = weights.sentinel, perf_counter()
        workers = loop.engine.collective_rpc
        if self._floor is None and sentinel.origin is not None:
            self._floor = self._calibrated(sentinel.ids, sentinel.origin, delivered, loop)
        loop.drain()
        try:
            workers("start_weight_update")
            workers("update_weights", kwargs={"update_info": transfer(delivered)})
            workers("finish_weight_update")
        except Exception as error:
            self._refusal = (
                f"the student engine holds no usable weights: version {delivered.version} does not load "
                f"({type(error).__name__}: {error}); publish again, and check that learner and engine start "
                "from the same checkpoint"
            )
            loop.fail(DataError(self._refusal))
            raise DataError(self._refusal) from error
        loop.engine.set_weight_version(_label(delivered.version, delivered.digest))
        # Running requests included: vLLM resets nothing while one of them holds a block, and does not fail.
        loop.engine.reset_prefix_cache(reset_running_requests=True)
        gap = Gap.of(self._read(sentinel.ids, loop), sentinel.logprobs)
        bound = self._bound(sentinel, delivered)
        if not gap.within(bound):
            self._refusal = (
                f"the student engine does not hold version {delivered.version} as the learner has it: their "
                f"log-probabilities of the sentinel differ by {gap}, but may by {bound}; a tensor is missing, "
                "misplaced or of another version (or learner.sentinel_tolerance is too small): publish again"
            )
            loop.fail(DataError(self._refusal))
            raise DataError(self._refusal)
        self._refusal, self._version, self._digest = None, delivered.version, delivered.digest
        self._sleep.received(weights, delivered)
        self._updates += 1
        self._update_s += perf_counter() - start
        return WeightAck(version=delivered.version, digest=delivered.digest, gap=gap.greatest)

    def _bound(self, sentinel: Sentinel, delivered: ReceivedWeights) -> Gap:
        if sentinel.tolerance:
            return Gap(mean=inf, high=inf, greatest=sentinel.tolerance)
        floor = self._floor or Gap(mean=0.0, high=0.0, greatest=0.0)
        return allowed(floor, coarse=self._coarse(delivered), experts=self._limits.experts)

    def _calibrated(self, ids: np.ndarray, origin: np.ndarray, delivered: ReceivedWeights, loop: EngineLoop) -> Gap:
        """Gap of engine and learner on the checkpoint that both have loaded themselves: rounding alone."""
        floor = Gap.of(self._read(ids, loop), origin)
        most = NUMERICS[self._coarse(delivered)]
        if not floor.mean <= most:
            raise ConfigurationError(
                f"engine and learner read the unchanged checkpoint {self._config.path!r} differently: their "
                f"log-probabilities of the run's first prompt differ by {floor}, which is more than rounding "
                f"({most} on average); set student.dtype and learner.dtype alike, or choose an architecture that vLLM "
                "and transformers compute alike"
            )
        return floor

    def _coarse(self, delivered: ReceivedWeights) -> bool:
        """Whether the engine or the learner computes in bfloat16."""
        own = resolve_dtype(self._config.dtype, resolve_device(self._config.device, "student"))
        return own is torch.bfloat16 or "bfloat16" in delivered.manifest.dtypes

    def _read(self, ids: np.ndarray, loop: EngineLoop) -> np.ndarray:
        """Log-probabilities of the tokens 1.. of a text."""
        output: Any = loop.finish(ids.tolist(), self._limits.reading()).prompt_logprobs
        return np.asarray(output.logprobs, dtype=np.float32)

    async def sleep(self) -> None:
        """Give up the memory of weights and caches until `wake`; all work is refused meanwhile.

        Completions that are still being written have no caller any more and are dropped. Weights that were received
        whole are loaded again from host memory before the next completion, unless others came before; other weights are
        kept by the engine.
        """
        await self.ready()
        await self._within(self._thread.run(self._fall_asleep), "falling asleep")

    def _fall_asleep(self, loop: EngineLoop) -> None:
        loop.fail(OpdError("the student engine was put to sleep while it wrote; wake it, and ask again"))
        self._sleep.fall(loop.engine)

    async def wake(self) -> None:
        """Take back what `sleep` gave up; does nothing if the engine is awake."""
        await self.ready()
        await self._within(self._thread.run(lambda loop: self._sleep.end(loop.engine)), "waking up")

    async def stats(self) -> EngineStats:
        """Counters of this engine since its start."""
        await self.ready()
        return await self._within(self._thread.run(self._stats), "reading statistics")

    def _stats(self, loop: EngineLoop) -> EngineStats:
        return EngineStats(
            requests=loop.requests,
            tokens=loop.tokens,
            steps=loop.steps,
            busy_s=loop.busy_s,
            updates=self._updates,
            update_s=self._update_s,
            version=self._version,
            digest=self._digest,
        )

    async def close(self) -> None:
        """End the engine; unfinished completions fail."""
        await asyncio.to_thread(self._thread.close)

    async def _within(self, future: Future[Result], what: str) -> Result:
        return await self._soon(asyncio.wrap_future(future), what)

    async def _soon(
        self, work: Awaitable[Result], what: str, at_least: float = 0.0, raises: type[OpdError] = ServiceHung
    ) -> Result:
        deadline_s = max(self._config.deadline_s, at_least)
        late = raises(
            f"the student engine did not finish {what} within {deadline_s:.0f} s; raise student.deadline_s, or ask for "
            "less at once"
        )
        return await within(deadline_s, work, late)


def _completion(output: "RequestOutput", request: GenerateRequest) -> Completion:
    written, sampling = output.outputs[0], request.sampling
    flat: Any = written.logprobs
    tokens, width = len(written.token_ids), sampling.topk + 1
    # vLLM puts the sampled token first and then the top-k, whether or not it is among them.
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(tokens, width)
    behavior = (TokenScores if request.blend is None else BlendedScores)(logprobs=logprobs[:, 0].copy())
    if sampling.topk:
        ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(tokens, width)
        behavior = TopKScores(logprobs=behavior.logprobs, topk_ids=ids[:, 1:], topk_logprobs=logprobs[:, 1:])
    versions, digests, labeled = np.empty(tokens, dtype=np.int32), dict[int, str](), 0
    for span in written.weight_versions or ():
        version, digest = _read_label(span.version)
        versions[span.start : span.end] = version
        labeled += span.start == labeled and span.end - span.start
        # One number for two contents (a learner that was set back): the sum is no published digest.
        digests[version] = digest if digests.get(version, digest) == digest else f"{digests[version]}+{digest}"
    if labeled != tokens:
        raise DataError(
            f"vLLM wrote {tokens} tokens but says only of the first {labeled} which weights wrote them; install the "
            "vLLM of requirements/"
        )
    return Completion(
        token_ids=np.asarray(written.token_ids, dtype=np.int32),
        behavior=behavior,
        versions=versions,
        stop=StopReason.LENGTH if written.finish_reason == "length" else StopReason.END,
        digests=digests,
    )


def _label(version: int, digest: str) -> str:
    """Label of the weights at vLLM, which returns it with every run of tokens that they generated."""
    return f"{version}:{digest}"


def _read_label(label: str) -> tuple[int, str]:
    version, _, digest = label.partition(":")
    return int(version), digest
