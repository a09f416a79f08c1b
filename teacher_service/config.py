"""What a teacher actor is told: plain types, so that OmegaConf can check them."""

from dataclasses import dataclass

from opd.devices import Device, Dtype, on_gpu
from opd.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """One teacher and how many of it.

    `path` is a Hugging Face folder. `max_batch_tokens` bounds one forward (sequences times the longest of
    them), `head_chunk` the rows that have logits over the vocabulary at the same time, `max_k` what a scorer
    may ask for per token, `deadline_s` every wait. Example: `TeacherConfig(path="assets/shop/teacher")`.
    """

    path: str
    device: Device = Device.AUTO
    dtype: Dtype = Dtype.AUTO
    replicas: int = 1
    max_batch_tokens: int = 16384
    head_chunk: int = 1024
    max_k: int = 1024
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("replicas", "max_batch_tokens", "head_chunk", "max_k"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"teacher.{name} needs at least 1, got {getattr(self, name)}; raise it")
        if self.deadline_s <= 0:
            raise ConfigurationError(
                f"teacher.deadline_s needs a positive number of seconds, got {self.deadline_s}; raise it"
            )


def environment(device: Device) -> dict[str, str]:
    """Environment variables of a teacher's process, set before it imports torch.

    One thread on a CPU: actors share the cores, and threads that spin against each other are slower than
    none.
    """
    common = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return common if on_gpu(device) else common | {"OMP_NUM_THREADS": "1"}
