"""A teacher that vLLM runs, in this process: by hidden states and our own head, or by flat `prompt_logprobs`.

`HiddenTeacher` asks vLLM's pooling runner for the states after the final norm and does the rest itself, so it answers
everything. `PromptLogprobsTeacher` lets vLLM's sampler rank each position: no ids of the caller's choice, no hidden
states (vLLM 0.32 has `prompt_logprob_token_ids`, but only in its second model runner, which needs a GPU). Sequences
are never cut over two engine steps, which bounds vLLM's transient `[tokens, vocabulary]` block by
`teacher.max_batch_tokens`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from hf.folder import text_config
from hf.lm_head import load_head
from hf.tokenizer_check import check_checkpoint
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import ScoreAnswer, ScoreRequest
from opd.settings.devices import resolve_device, resolve_dtype
from teacher_service.backends.torch_forward import microbatches
from teacher_service.call_deadline import in_time
from teacher_service.config import START_S, TeacherConfig, check_supports
from teacher_service.ranked_tokens import most_ids, ranked
from teacher_service.scoring import (
    Bounds,
    Store,
    TeacherStats,
    completion_rows,
    kinds_of,
    length,
    scores_from_hidden,
)
from weight_sync.parked_worker import EXTENSION
from weight_sync.parking import Parked, park, trim
from weight_sync.rendezvous import be_alone

_KEPT = 1  # vLLM's level of sleep in which weights wait in host memory

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine


def engine_arguments(
    config: TeacherConfig, device: torch.device, positions: int, *, sleeps: bool = False
) -> dict[str, Any]:
    """vLLM's engine arguments on `device` that both backends have; sequences have at most `positions` tokens."""
    cpu = device.type == "cpu"
    return {
        "model": config.path,
        "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        "tensor_parallel_size": config.tensor_parallel,
        # In a placement group vLLM would choose Ray, for which every worker needs a bundle of its own.
        "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else "uni",
        "max_model_len": positions,
        "max_num_batched_tokens": max(config.max_batch_tokens, positions),
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,  # scoring every position reads no cache
        "enforce_eager": cpu,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "disable_log_stats": True,
        "enable_sleep_mode": sleeps and not cpu,
        "worker_extension_cls": EXTENSION,
    } | ({"kv_cache_memory_bytes": config.kv_cache_bytes} if cpu else {})


class _VLLMTeacher(ABC):
    """Common part of both backends: one engine, and the one thread that calls it."""

    spare: int  # tokens of the model's length that vLLM needs besides those that are read

    def __init__(self, config: TeacherConfig, store: Store, sleeps: bool = False) -> None:
        """`store` keeps hidden states; a teacher that `sleeps` can give its memory up on a GPU, too."""
        check_checkpoint(config.path, "teacher")
        self._config, self._store, self._sleeps = config, store, sleeps
        self._device = resolve_device(config.device, "teacher")
        self._dtype = resolve_dtype(config.dtype, self._device)
        model = text_config(config.path, "teacher")
        positions = config.max_model_len or int(model.get("max_position_embeddings") or config.max_batch_tokens)
        self._positions = min(positions, config.max_batch_tokens)
        self._bounds = Bounds(
            vocabulary=int(model["vocab_size"]),
            longest=self._positions - self.spare,
            max_k=config.max_k,
            limits="one forward (the smallest of the model's positions, teacher.max_model_len and "
            "teacher.max_batch_tokens); shorten it or raise the limit",
        )
        self._requests = self._scored = self._read = self._number = 0
        self._busy_s = 0.0
        self._parked: Parked | None = None  # what stands beside the engine, while it sleeps
        self._prepare()
        self._thread = ThreadPoolExecutor(1, "vllm-teacher")
        self._engine: Future[LLMEngine] = self._thread.submit(self._start)

    async def ready(self) -> None:
        """Return when vLLM is loaded."""
        await in_time(self._config, asyncio.wrap_future(self._engine), "starting vLLM", at_least=START_S)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        """Scores per request, in order: float32 logprobs under the full softmax at temperature 1.

        Raises `Unreadable` for a request that cannot be read, `ConfigurationError` for a kind it cannot answer.
        """
        check_supports(self._config, kinds_of(requests), "a scorer")
        self._bounds.check(requests)
        work = asyncio.wrap_future(self._thread.submit(self._scores, list(requests)))
        return await in_time(self._config, work, f"scoring {len(requests)} completions")

    async def sleep(self) -> None:
        """Move the weights from the GPU to host memory, on a CPU to a file. Until `wake` nothing is scored."""
        await in_time(self._config, asyncio.wrap_future(self._thread.submit(self._fall_asleep)), "falling asleep")

    async def wake(self) -> None:
        """Move back what `sleep` moved; does nothing if it is awake."""
        await in_time(self._config, asyncio.wrap_future(self._thread.submit(self._wake)), "waking up")

    def _fall_asleep(self) -> None:
        if self._parked is not None:
            return
        engine = self._engine.result()
        if self._device.type == "cpu":
            engine.collective_rpc("park_memory", kwargs={"keep": True})
        else:
            engine.sleep(level=_KEPT)
        self._parked = park(self._beside())
        trim()

    def _wake(self) -> None:
        if self._parked is None:
            return
        engine = self._engine.result()
        self._parked.unpark()
        if self._device.type == "cpu":
            engine.collective_rpc("unpark_memory")
        else:
            engine.wake_up()
        self._parked = None

    async def stats(self) -> TeacherStats:
        """Counts of this teacher's work so far."""
        return TeacherStats(requests=self._requests, scored=self._scored, read=self._read, busy_s=self._busy_s)

    async def close(self) -> None:
        """End the engine; nothing can be scored afterwards."""
        engine = await asyncio.wrap_future(self._engine)
        await asyncio.wrap_future(self._thread.submit(engine.engine_core.shutdown))
        self._thread.shutdown()

    def _start(self) -> "LLMEngine":
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        if self._config.tensor_parallel == 1:
            be_alone(current_platform.dist_backend)
        common = engine_arguments(self._config, self._device, self._positions, sleeps=self._sleeps)
        return LLMEngine.from_engine_args(EngineArgs(**{**common, **self._arguments()}))

    def _run(self, asked: "Sequence[tuple[list[int], SamplingParams | PoolingParams]]") -> list[Any]:
        """vLLM's outputs, in order; nothing stays in the engine if one fails."""
        engine = self._engine.result()
        names = [str(self._number + i) for i in range(len(asked))]
        self._number += len(asked)
        outputs: dict[str, Any] = {}
        try:
            for name, (ids, params) in zip(names, asked, strict=True):
                engine.add_request(name, {"type": "token", "prompt_token_ids": ids}, params)
            while engine.has_unfinished_requests():
                outputs |= {o.request_id: o for o in engine.step() if o.finished}
        except Exception as error:
            engine.abort_request(names)
            raise OpdError(
                f"vLLM cannot score as the teacher ({type(error).__name__}: {error}); see its log"
            ) from error
        return [outputs[name] for name in names]

    def _scores(self, requests: list[ScoreRequest]) -> list[ScoreAnswer]:
        if self._parked is not None:
            raise ConfigurationError("the teacher's weights are not where it computes: it sleeps; wake it before")
        start = perf_counter()
        answers: list[ScoreAnswer | None] = [None] * len(requests)
        for members in microbatches([length(r) for r in requests], self._config.max_batch_tokens):
            for i, answer in zip(members, self._microbatch([requests[i] for i in members]), strict=True):
                answers[i] = answer
        self._busy_s += perf_counter() - start
        self._requests += len(requests)
        self._scored += sum(len(r.token_ids) for r in requests)
        self._read += sum(length(r) for r in requests)
        return [answer for answer in answers if answer is not None]

    @abstractmethod
    def _prepare(self) -> None:
        """Load what stands beside the engine: before vLLM measures the memory that is free."""

    @abstractmethod
    def _beside(self) -> Sequence[torch.Tensor]:
        """Tensors that `_prepare` loaded."""

    @abstractmethod
    def _arguments(self) -> Mapping[str, Any]:
        """Engine arguments of its own."""

    @abstractmethod
    def _microbatch(self, requests: Sequence[ScoreRequest]) -> Iterator[ScoreAnswer]:
        """Answers to requests of one forward, in order."""


class HiddenTeacher(_VLLMTeacher):
    """vLLM's hidden states, our head: any kind of scores (`opd.ports.LogprobTeacher`)."""

    spare = 0

    def _prepare(self) -> None:
        self._head = load_head(self._config.path, self._dtype, self._device)

    def _beside(self) -> Sequence[torch.Tensor]:
        return [self._head]

    def _arguments(self) -> Mapping[str, Any]:
        from vllm.config import PoolerConfig

        # "embed" with no activation: the states as they leave the final norm, not normalized to length 1
        pooler = PoolerConfig(task="token_embed", use_activation=False)
        return {"runner": "pooling", "convert": "embed", "pooler_config": pooler}

    @torch.inference_mode()
    def _microbatch(self, requests: Sequence[ScoreRequest]) -> Iterator[ScoreAnswer]:
        from vllm import PoolingParams

        params = PoolingParams(task="token_embed", use_activation=False)
        sequences, _ = completion_rows(requests)
        outputs = self._run([(ids.tolist(), params.clone()) for ids in sequences])
        states = [o.outputs.data[-len(r.token_ids) :] for o, r in zip(outputs, requests, strict=True)]
        if any(len(s) != len(r.token_ids) for s, r in zip(states, requests, strict=True)):
            raise DataError("vLLM gave fewer hidden states than tokens; use teacher.backend=TORCH and report this")
        hidden = torch.cat(states).to(device=self._device, dtype=self._dtype)
        return scores_from_hidden(
            requests, hidden, lambda h: F.linear(h, self._head).float(), self._config.head_chunk, self._store
        )


class PromptLogprobsTeacher(_VLLMTeacher):
    """vLLM's own `prompt_logprobs`: sampled tokens and the teacher's top-k (`opd.ports.LogprobTeacher`)."""

    spare = 2  # the last token is part of the prompt here, and vLLM insists on writing one more

    def _prepare(self) -> None:
        """Nothing stands beside the engine."""

    def _beside(self) -> Sequence[torch.Tensor]:
        return []

    def _arguments(self) -> Mapping[str, Any]:
        return {"max_logprobs": -1, "generation_config": "vllm", "logprobs_mode": "raw_logprobs"}

    def _microbatch(self, requests: Sequence[ScoreRequest]) -> Iterator[ScoreAnswer]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked: list[tuple[list[int], SamplingParams | PoolingParams]] = [
            (
                [*r.context_ids.tolist(), *r.token_ids.tolist()],
                SamplingParams(
                    max_tokens=1,
                    temperature=0.0,
                    prompt_logprobs=most_ids(r),
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
            for r in requests
        ]
        outputs = self._run(asked)
        return (_answer(r, o.prompt_logprobs) for r, o in zip(requests, outputs, strict=True))


def _answer(request: ScoreRequest, flat: Any) -> ScoreAnswer:
    """From parallel lists of `(1 + k)` entries per position: the prompt's own token, then the likeliest."""
    k = most_ids(request)
    tokens, first = len(request.token_ids), flat.start_indices[len(request.context_ids)]
    ids = np.asarray(flat.token_ids[first:], dtype=np.int32)
    values = np.asarray(flat.logprobs[first:], dtype=np.float32)
    if len(ids) != tokens * (1 + k) or not np.array_equal(ids[:: 1 + k], request.token_ids):
        raise DataError(
            f"vLLM gave {len(ids)} prompt_logprobs for {tokens} tokens at k={k}, or of other tokens; use "
            "teacher.backend=VLLM and report this"
        )
    ids, values = ids.reshape(tokens, 1 + k), values.reshape(tokens, 1 + k)
    return tuple(ranked(kind, values[:, 0].copy(), ids[:, 1:], values[:, 1:]) for kind in request.kinds)
