"""Settings of a rollout actor: plain types with their ranges; nothing here imports vLLM."""

from dataclasses import dataclass
from typing import Annotated

from opd.settings.auto import Auto
from opd.settings.devices import Device, Dtype, on_gpu
from opd.settings.ranges import HARMLESS, Count, Deadline, In, Matches, MemoryShare, Names, Replicas, Tokens
from opd.settings.validation import settings

STOP_FORM = "of 1 to 1000 characters, a line end as itself"
STOP_BECAUSE = 'in a YAML a line end is written "\\n"; a backslash and an n are two characters'
CPU_KV_CACHE_BYTES = 64 << 20
PREFILL_TOKENS = 8192  # of prompts, read in one engine step, where nothing is told
StopString = Annotated[str, Matches(r"(?!(\\[nrt])+$)[^\x00]{1,1000}", STOP_FORM, because=STOP_BECAUSE)]

# Widths of an attention head that vLLM's CPU kernels have: `CPUAttentionBackend.get_supported_head_sizes` of 0.32.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class StudentConfig:
    """One rollout engine and the number of its replicas.

    `path` is a Hugging Face folder, `max_model_len` counts context plus completion tokens (AUTO is decided when the run
    is planned), `deadline_s` bounds every single wait (starting vLLM: 300 s at least). `kv_cache_bytes=0` is 64 MiB on
    a CPU, and on a GPU what `gpu_memory_utilization` (of the whole device) leaves; more is exactly that many, which an
    engine that shares its GPU needs. `stop` are texts that end a completion, in training and evaluation alike: the
    token that completes one is the last, and all that was generated is trained. `enforce_eager` (no graph capture, no
    compilation) is always on where there is no GPU.
    Example: `StudentConfig(path="assets/shop/student", max_model_len=128)`.
    """

    # Hugging Face folder of the model that is trained
    path: Names
    # tokens of context and completion together, at most; AUTO is 4096, or the model's own context where that is shorter
    max_model_len: Annotated[Tokens | Auto, HARMLESS] = Auto.AUTO
    # AUTO is a GPU where there is one
    device: Annotated[Device, HARMLESS] = Device.AUTO
    # what the engine computes in; AUTO is BFLOAT16 on a GPU and FLOAT32 on a CPU
    dtype: Dtype = Dtype.AUTO
    # texts that end a completion; what was generated up to there is trained, the text included
    stop: tuple[StopString, ...] = ()
    # devices that share one engine's weights
    tensor_parallel: Annotated[int, In(1, 1024), HARMLESS] = 1
    # memory of the key-value cache; 0 lets the engine choose
    kv_cache_bytes: Annotated[int, In(0, 2**50), HARMLESS] = 0
    # share of the whole device that an engine takes on a GPU
    gpu_memory_utilization: Annotated[MemoryShare, HARMLESS] = 0.85
    # sequences that an engine writes at the same time
    max_num_seqs: Annotated[Count, HARMLESS] = 256
    # tokens that an engine reads in one step, of prompts and of running text; 0 is 8192, or more where more is needed
    max_num_batched_tokens: Annotated[int, In(0, 100_000_000), HARMLESS] = 0
    # no graph capture and no compilation (always so without a GPU)
    enforce_eager: Annotated[bool, HARMLESS] = False
    # plan an engine's next step while a GPU computes the one before it
    async_scheduling: Annotated[bool, HARMLESS] = False
    # rollout engines
    replicas: Annotated[Replicas, HARMLESS] = 1
    # seconds that bound every single wait for an engine (starting one: 300 at least)
    deadline_s: Annotated[Deadline, HARMLESS] = 600.0

    @property
    def longest(self) -> int:
        """`max_model_len` of settings that are decided."""
        assert not isinstance(self.max_model_len, Auto), "AUTO is decided when a run is planned"
        return self.max_model_len

    def step_tokens(self, *, on_gpu: bool) -> int:
        """Tokens that one engine step reads at most: one of every sequence, and without a GPU a whole prompt."""
        return self.max_num_batched_tokens or max(PREFILL_TOKENS, self.least_step_tokens(on_gpu=on_gpu))

    def least_step_tokens(self, *, on_gpu: bool) -> int:
        """The fewest tokens of a step with which vLLM starts."""
        return self.max_num_seqs if on_gpu else max(self.max_num_seqs, self.longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerTeacher:
    """Teacher that an engine of the student holds beside it, to sample from blends (`opd.ports.TeacherBlend`).

    `path` is its Hugging Face folder; it computes in the student's precision and shares its key-value cache's memory.
    """

    name: str
    path: str


def environment(device: Device) -> dict[str, str]:
    """Environment variables of an engine's process; they must be set before it imports vLLM.

    On a CPU: one thread (more spin against each other), no dynamo (vLLM's small helpers would be compiled
    with g++ on the first request, whatever `enforce_eager` says), and no pinning (all engines would choose
    the same core).
    """
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the actor's own process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRITON_F32_DEFAULT": "ieee",  # attention in float32 would else be TF32's: 10 bits, far from the learner's
    }
    if on_gpu(device):
        return common
    return common | {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
