"""From a `StudentConfig` to a running vLLM engine, and the limits of its requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from actors.config import CPU_KV_CACHE_BYTES, InnerTeacher, StudentConfig
from actors.engine_thread import BUDGET
from hf.folder import text_config
from hf.stop_tokens import read_ends
from opd.errors import DataError
from opd.heavy_imports import uncollected
from opd.ports import GenerateRequest, Sampling, Sentinel, TeacherBlend
from opd.settings.devices import resolve_device, resolve_dtype
from weight_sync.rendezvous import be_alone

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Limits set by the checkpoint and its configuration: token ids below `vocabulary`, `longest` tokens in all.

    `ends` are the ids that end a completion, `stop` the texts. `inner` is the name of the teacher inside the engine
    ("": there is none). `experts`: the student is a mixture of them.
    """

    vocabulary: int
    longest: int
    ends: tuple[int, ...]
    inner: str = ""
    stop: tuple[str, ...] = ()
    experts: bool = False

    def check(self, request: GenerateRequest) -> None:
        """Raise `DataError` if `request` cannot be generated."""
        context, most = len(request.context_ids), request.sampling.max_tokens
        subject = f"prompt {request.prompt_id!r} cannot be written"
        if not context:
            raise DataError(
                f"{subject}: its context is empty, but it needs at least one token; check the prompt source"
            )
        if context + most > self.longest:
            raise DataError(
                f"{subject}: {context} context tokens and max_tokens={most} exceed "
                f"student.max_model_len={self.longest}; raise it to {context + most}, or lower max_tokens"
            )
        lowest, highest = int(request.context_ids.min()), int(request.context_ids.max())
        if lowest < 0 or highest >= self.vocabulary:
            raise DataError(
                f"{subject}: token id {lowest if lowest < 0 else highest} is outside the student's vocabulary of "
                f"{self.vocabulary}; check that prompts were made with the student's tokenizer"
            )
        if request.sampling.topk > self.vocabulary:
            raise DataError(
                f"{subject}: topk={request.sampling.topk} exceeds the vocabulary of {self.vocabulary}; lower it"
            )
        if request.blend is not None:
            self._check_blend(request.blend, request.sampling, subject)

    def _check_blend(self, blend: TeacherBlend, sampling: Sampling, subject: str) -> None:
        if blend.teacher != self.inner:
            holds = f"teacher {self.inner!r} alone" if self.inner else "no teacher"
            raise DataError(
                f"{subject}: it asks for a blend with teacher {blend.teacher!r}, but the engine holds {holds}; a part "
                "that asks for blends declares Role.BLENDED among its needs_engines"
            )
        if sampling.temperature == 0 or sampling.top_p < 1:
            raise DataError(
                f"{subject}: temperature={sampling.temperature:g} and top_p={sampling.top_p:g} leave no trust region "
                "around whole distributions; a blend needs a temperature above 0 and top_p=1"
            )

    def check_sentinel(self, sentinel: Sentinel) -> None:
        """Raise `DataError` if the engine cannot read `sentinel`."""
        tokens = len(sentinel.ids)
        if tokens < 2 or tokens >= self.longest or len(sentinel.logprobs) != tokens - 1:
            raise DataError(
                f"the weights' sentinel has {tokens} tokens and {len(sentinel.logprobs)} logprobs, but the "
                f"engine needs 2 to {self.longest - 1} tokens and one logprob less; correct it, or raise "
                "student.max_model_len"
            )

    def params(self, sampling: Sampling, seed: int, blend: TeacherBlend | None = None) -> "SamplingParams":
        """Sampling parameters of one completion for vLLM."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed if sampling.temperature > 0 else None,
            logprobs=sampling.topk,
            flat_logprobs=True,
            stop_token_ids=list(self.ends),
            # Texts are looked for as they are generated, special tokens included; vLLM drops what came after them.
            stop=list(self.stop),
            detokenize=bool(self.stop),
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
            extra_args=None if blend is None else {BUDGET: blend.budget},
        )

    def reading(self) -> "SamplingParams":
        """Sampling parameters for scoring a text: the logprob of each token (vLLM requires one new token, too)."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def read_limits(config: StudentConfig, ends: Sequence[int] = (), inner: str = "") -> EngineLimits:
    """The limits of the checkpoint in `config.path`; `ends` are ids that end completions beside those that it names.

    Raises `ConfigurationError` if the folder is none, `DataError` if no end-of-text token is known.
    """
    named = read_ends(config.path).ids
    text = text_config(config.path, "student")
    return EngineLimits(
        vocabulary=int(text["vocab_size"]),
        longest=config.longest,
        ends=tuple(sorted({*named, *ends})),
        inner=inner,
        stop=config.stop,
        experts=any(text.get(name) for name in _EXPERTS),
    )


def build(
    config: StudentConfig, inner: InnerTeacher | None = None, ends: Sequence[int] = (), *, sleeps: bool = False
) -> "LLMEngine":
    """A running engine; takes seconds, and imports vLLM. `sleeps`: it can use vLLM's sleep mode, on a GPU."""
    with uncollected():
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from actors.weight_loader import BACKEND, EXTENSION

        more = _with_teacher(config, inner, ends) if inner else {}
    device = resolve_device(config.device, "student")
    arguments = EngineArgs(
        **(engine_arguments(config, device) | more),
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls=EXTENSION,
        enable_sleep_mode=sleeps,
    )
    if config.tensor_parallel == 1:
        be_alone(current_platform.dist_backend)
    engine = LLMEngine.from_engine_args(arguments)
    engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
    engine.set_weight_version("0:")
    return engine


def engine_arguments(config: StudentConfig, device: torch.device) -> dict[str, Any]:
    """vLLM's engine arguments on `device`."""
    return {
        "model": config.path,
        "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        "max_model_len": config.longest,
        "max_num_seqs": config.max_num_seqs,
        # vLLM has no default for an engine that is driven step by step, and falls back to 2048.
        "max_num_batched_tokens": config.step_tokens(on_gpu=device.type != "cpu"),
        "tensor_parallel_size": config.tensor_parallel,
        # In a placement group vLLM would choose Ray, for which every worker needs a bundle of its own.
        "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else "uni",
        # Requests and answers are token ids; text is handled elsewhere, unless a text is to end completions.
        "skip_tokenizer_init": not config.stop,
        "generation_config": "vllm",
        "trust_remote_code": False,
        # The distribution that is sampled from, for any k.
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        # With a step in the air an update waits for it (`EngineLoop.drain`).
        "async_scheduling": config.async_scheduling,
        # Requests are taken in the order in which they were added, but for the sentinel, which goes first.
        "scheduling_policy": "priority",
        "disable_log_stats": True,
    } | (_on_cpu(config) if device.type == "cpu" else _on_gpu(config))


def _with_teacher(config: StudentConfig, inner: InnerTeacher, ends: Sequence[int]) -> dict[str, Any]:
    """Engine arguments of a student with a teacher inside; the import registers the model with vLLM."""
    from actors.blend import arguments

    return arguments(config, inner, ends)


def _on_gpu(config: StudentConfig) -> dict[str, Any]:
    """Engine arguments of GPUs only."""
    return {
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        # Told, vLLM does not measure what is free while others allocate on the same device.
        **({"kv_cache_memory_bytes": config.kv_cache_bytes} if config.kv_cache_bytes else {}),
    }


def _on_cpu(config: StudentConfig) -> dict[str, Any]:
    """Engine arguments of CPUs only."""
    from actors.cpu_kernels import PRIORITY

    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": config.kv_cache_bytes or CPU_KV_CACHE_BYTES,
        "kernel_config": {"ir_op_priority": PRIORITY},
        # A prompt must not be cut over two steps: vLLM would rewind the request's generator, which only CUDA
        # generators can (0.32: "CPU Generator does not use offset"), and the engine would stop.
        "enable_chunked_prefill": False,
    }
