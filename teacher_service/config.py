"""Settings of a teacher, plain types with their ranges; and the score kinds that each backend supports."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from opd.errors import ConfigurationError
from opd.ports import LastHidden, SampledToken, ScoreKind, ScoreKinds, TopK
from opd.ports.score_kinds import BUILT_IN
from opd.settings.devices import Device, Dtype, on_gpu
from opd.settings.ranges import (
    HARMLESS,
    Bytes,
    Count,
    Deadline,
    Fraction,
    In,
    Line,
    Matches,
    MemoryShare,
    Names,
    Replicas,
    Steps,
    Tokens,
)
from opd.settings.validation import settings
from opd.types import Scores
from teacher_service.known_kinds import known_kinds


class Backend(Enum):
    """Backend that computes a teacher's answers; one file each in `teacher_service/backends/`."""

    TORCH = "torch"  # a plain forward pass in the teacher's actor
    VLLM = "vllm"  # vLLM's pooling runner gives hidden states, our own head does the rest
    VLLM_LOGPROBS = "vllm_logprobs"  # vLLM's flat prompt_logprobs
    HTTP = "http"  # our own server (`opd serve-teacher`), anywhere
    OPENAI = "openai"  # any OpenAI-compatible endpoint that gives prompt_logprobs


SUPPORTS: Mapping[Backend, ScoreKinds] = {
    Backend.TORCH: frozenset(BUILT_IN),
    Backend.VLLM: frozenset(BUILT_IN),
    Backend.VLLM_LOGPROBS: frozenset({SampledToken, TopK}),
    Backend.HTTP: frozenset(BUILT_IN),
    Backend.OPENAI: frozenset({SampledToken, TopK}),
}
"""The kinds of this project that a backend answers."""
COMPUTING = frozenset({Backend.TORCH, Backend.VLLM})
"""Backends that have logits in this process, and so answer any other kind, too."""
REMOTE = frozenset({Backend.HTTP, Backend.OPENAI})
OWN_ENGINE = frozenset({Backend.VLLM, Backend.VLLM_LOGPROBS})
"""Backends with a vLLM engine in the teacher's actor."""
TOKEN_VARIABLE = "OPD_TEACHER_TOKEN"
START_S = 300.0  # a model may take as long to load, however soon its answers are due

_WHY = {
    Backend.VLLM_LOGPROBS: "vLLM's prompt_logprobs rank the teacher's own tokens and score no ids it is given",
    Backend.OPENAI: "prompt_logprobs rank the teacher's own tokens, and no such endpoint gives hidden states",
}


Attempt = Annotated[float, In(0.1, 24 * 3600.0)]  # seconds for one try of several
ClassPath = Annotated[
    str, Matches(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", "that is the path of a class, e.g. my_kinds.Margin")
]
Url = Annotated[str, Matches(r"(https?://[^\s/?#@]+[^\s?#]*)?", "http://HOST:PORT without a login, or none at all")]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TeacherConfig:
    """One teacher and how many of it.

    `path` is a Hugging Face folder; a remote teacher needs only its config.json and tokenizer here, or the
    weights too where a method reads the whole vocabulary (the learner applies the head). `max_batch_tokens`
    bounds one forward (sequences times the longest of them), `head_chunk` the rows that have logits over the
    vocabulary at the same time, `max_k` what a scorer may ask for per token, `deadline_s` every wait (loading
    a model: 300 s at least).

    vLLM: `kv_cache_bytes` is used on CPUs, `gpu_memory_utilization` (of the whole device) on GPUs; `max_model_len=0` is
    the model's own limit. Remote: `url` is the server's root, `model` the name an OpenAI-compatible endpoint serves,
    `fingerprint` the model digest that `opd serve-teacher` printed ("" takes the digest of the weights in `path`, or
    else what the server says first), `connect_s` and `read_s` bound one attempt, `retries` the further ones (waits
    start at `backoff_s` and double), `max_consecutive_failures` the wrong answers in a row after which the teacher is
    not asked again. The token is read from the environment variable OPD_TEACHER_TOKEN and never from here.
    `score_kinds` are classes that may be imported and whose questions are read from the wire; nothing else is.

    A teacher that follows its student: at every `mixup_every`-th published version its weights become
    `mixup` times the student's plus `1 - mixup` times its own (TRL's `ref_model_mixup_alpha` and
    `ref_model_sync_steps`; a moving average with decay `1 - mixup`). 0 is a teacher that never changes.
    Example: `TeacherConfig(path="assets/shop/teacher")`.
    """

    # Hugging Face folder of the teacher; a remote one needs only its config and tokenizer here
    path: Annotated[Names, HARMLESS]
    # TORCH, VLLM or VLLM_LOGPROBS in an actor of this run; HTTP or OPENAI on a server
    backend: Annotated[Backend, HARMLESS] = Backend.TORCH
    # AUTO is a GPU where there is one
    device: Annotated[Device, HARMLESS] = Device.AUTO
    # what the teacher computes in; AUTO is BFLOAT16 on a GPU and FLOAT32 on a CPU
    dtype: Dtype = Dtype.AUTO
    # actors that score for this teacher
    replicas: Annotated[Replicas, HARMLESS] = 1
    # GPUs of one node that share the weights of one actor (VLLM and VLLM_LOGPROBS)
    tensor_parallel: Annotated[int, In(1, 1024), HARMLESS] = 1
    # tokens of one forward: sequences times the longest of them
    max_batch_tokens: Annotated[Tokens, HARMLESS] = 16384
    # rows whose logits over the vocabulary are alive at the same time
    head_chunk: Annotated[Count, HARMLESS] = 1024
    # largest top-k that a scorer may ask for
    max_k: Annotated[Count, HARMLESS] = 1024
    # seconds that bound every wait for an answer (loading a model: 300 at least)
    deadline_s: Annotated[Deadline, HARMLESS] = 600.0
    # longest sequence; 0 is the model's own limit
    max_model_len: Annotated[int, In(0, 100_000_000), HARMLESS] = 0
    # vLLM on a CPU: memory of its key-value cache
    kv_cache_bytes: Annotated[Bytes, HARMLESS] = 64 << 20
    # vLLM on a GPU: its share of the whole device
    gpu_memory_utilization: Annotated[MemoryShare, HARMLESS] = 0.85
    # root of the server, http://HOST:PORT (backends HTTP and OPENAI)
    url: Annotated[Url, HARMLESS] = ""
    # name under which an OpenAI-compatible endpoint serves the model
    model: Annotated[Line, HARMLESS] = ""
    # digest that opd serve-teacher printed; empty trusts the weights in path, or what the server says first
    fingerprint: Annotated[Line, HARMLESS] = ""
    # seconds to connect to a server
    connect_s: Annotated[Attempt, HARMLESS] = 10.0
    # seconds that one attempt may take
    read_s: Annotated[Attempt, HARMLESS] = 120.0
    # further attempts after one that failed
    retries: Annotated[int, In(0, 1000), HARMLESS] = 6
    # seconds before the first further attempt; each later wait doubles
    backoff_s: Annotated[float, In(0.001, 3600), HARMLESS] = 0.5
    # wrong answers in a row after which a teacher is not asked again
    max_consecutive_failures: Annotated[int, In(1, 1000), HARMLESS] = 5
    # score kinds outside the project that travel over HTTP, by the path of their class; the same on both sides
    score_kinds: tuple[ClassPath, ...] = ()
    # share of the student's weights that the teacher takes over (ref_model_mixup_alpha of TRL); 0 never changes it
    mixup: Fraction = 0.0
    # published versions between two such mixtures (ref_model_sync_steps of TRL)
    mixup_every: Steps = 1

    def __post_init__(self) -> None:
        if self.mixup and self.backend is not Backend.TORCH:
            raise ConfigurationError(
                f"TeacherConfig.mixup={self.mixup} makes the teacher follow the student, which TeacherConfig.backend="
                f"{self.backend.name} cannot; set TeacherConfig.backend=TORCH or TeacherConfig.mixup=0"
            )
        if self.tensor_parallel > 1 and self.backend not in OWN_ENGINE:
            raise ConfigurationError(
                f"teacher.tensor_parallel={self.tensor_parallel} spreads a teacher's weights over GPUs, which "
                f"teacher.backend={self.backend.name} cannot; set teacher.backend=VLLM or teacher.tensor_parallel=1"
            )
        if self.backend in REMOTE and not self.url:
            raise ConfigurationError(
                f"TeacherConfig.backend={self.backend.name} needs TeacherConfig.url=http://HOST:PORT, got "
                f"{self.url!r}; set it"
            )
        if self.backend is Backend.OPENAI and not self.model:
            raise ConfigurationError(
                "TeacherConfig.backend=OPENAI needs TeacherConfig.model, the name under which the endpoint serves it; "
                "set it"
            )

    @property
    def supports(self) -> ScoreKinds:
        """Score kinds that this teacher is known to support; a backend that computes them supports others, too.

        One that follows the student gives no hidden states: the learner's copy of its output matrix would stay behind.
        """
        named = frozenset(known_kinds(self.score_kinds).values()) if self.backend is Backend.HTTP else frozenset()
        return (SUPPORTS[self.backend] | named) - ({LastHidden} if self.mixup else set())


def check_supports(config: TeacherConfig, requires: ScoreKinds, subject: str) -> None:
    """Raise `ConfigurationError` if `subject` requires score kinds that the teacher's backend does not support."""
    lacking = sorted(requires - config.supports, key=_place)
    if config.backend in COMPUTING:
        lacking = [kind for kind in lacking if kind in BUILT_IN]
    if not lacking:
        return
    asked = lacking[0].asked()
    if config.mixup:
        raise ConfigurationError(
            f"{subject} asks for {asked}, but a teacher that follows the student "
            f"(teacher.mixup={config.mixup}) changes its output matrix, of which the learner has a fixed copy; "
            "choose a method over a top-k or the sampled token, or set teacher.mixup=0"
        )
    if config.backend is Backend.HTTP:
        path = f"{lacking[0].__module__}.{lacking[0].__qualname__}"
        raise ConfigurationError(
            f"{subject} asks for {asked}, a kind of scores that travels only where both sides name its class; set "
            f"teacher.score_kinds=[{path}] here and for opd serve-teacher, or teacher.backend=TORCH"
        )
    able = [b.name for b in Backend if requires <= SUPPORTS[b] or b in COMPUTING]
    raise ConfigurationError(
        f"{subject} asks for {asked}, which teacher.backend={config.backend.name} cannot answer "
        f"({_WHY[config.backend]}); set teacher.backend to one of {', '.join(able)}, or choose another method"
    )


def _place(kind: type[ScoreKind[Scores]]) -> tuple[int, str]:
    """The project's own kinds in their order, then the others by name."""
    return BUILT_IN.index(kind) if kind in BUILT_IN else len(BUILT_IN), kind.wire_name()


def environment(device: Device, backend: Backend = Backend.TORCH) -> dict[str, str]:
    """Environment variables of a teacher's process, set before it imports torch.

    One thread on a CPU: actors share the cores, and threads that spin against each other are slower than
    none. vLLM's: the engine lives in the teacher's own process, compiles nothing on a CPU, and is not pinned.
    """
    common = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if backend in OWN_ENGINE:
        common |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if not on_gpu(device):
            common |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return common if on_gpu(device) else common | {"OMP_NUM_THREADS": "1"}
