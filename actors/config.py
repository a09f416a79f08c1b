"""What a rollout actor is told: plain types, so that OmegaConf can check them; nothing here imports vLLM."""

from dataclasses import dataclass

from opd.devices import Device, Dtype, on_gpu
from opd.errors import ConfigurationError

CPU_KV_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """One rollout engine and how many of them.

    `path` is a Hugging Face folder, `max_model_len` counts context plus completion tokens, `deadline_s`
    bounds every single wait (starting vLLM: 300 s at least). `kv_cache_bytes=0` is 64 MiB on a CPU, and on a GPU what
    `gpu_memory_utilization` (of the whole device) leaves; more is exactly that many, which an engine that shares its
    GPU needs. `enforce_eager` (no graph capture, no compilation) is always on where there is no GPU.
    Example: `StudentConfig(path="assets/shop/student", max_model_len=128)`.
    """

    path: str
    max_model_len: int
    device: Device = Device.AUTO
    dtype: Dtype = Dtype.AUTO
    tensor_parallel: int = 1
    kv_cache_bytes: int = 0
    gpu_memory_utilization: float = 0.85
    max_num_seqs: int = 256
    enforce_eager: bool = False
    replicas: int = 1
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        counts = ("max_model_len", "tensor_parallel", "max_num_seqs", "replicas")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"student.{name} needs at least 1, got {getattr(self, name)}; raise it")
        if self.kv_cache_bytes < 0:
            raise ConfigurationError(
                f"student.kv_cache_bytes needs 0 (chosen by the device) or more, got {self.kv_cache_bytes}; raise it"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigurationError(
                "student.gpu_memory_utilization is a share of the device in (0, 1], got "
                f"{self.gpu_memory_utilization}; correct it"
            )
        if self.deadline_s <= 0:
            raise ConfigurationError(f"student.deadline_s needs a positive number of seconds, got {self.deadline_s}")


def environment(device: Device) -> dict[str, str]:
    """Environment variables of an engine's process; they must be set before it imports vLLM.

    On a CPU: one thread (more spin against each other), no dynamo (vLLM's small helpers would be compiled
    with g++ on the first request, whatever `enforce_eager` says), and no pinning (all engines would choose
    the same core).
    """
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor's own process
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
