"""What a teacher actor is told: plain types, so that OmegaConf can check them."""

from dataclasses import dataclass
from enum import Enum

import torch

from opd.errors import ConfigurationError


class Device(Enum):
    """Where a model runs. `AUTO` is a GPU where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    GPU = "gpu"


class Dtype(Enum):
    """The numbers of weights and activations. `AUTO` is bfloat16 on a GPU and float32 on a CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """One teacher and how many replicas of it.

    `max_batch_tokens` bounds the packed tokens of one forward pass, `head_chunk` the rows of vocabulary-wide logits
    alive at once, `max_k` the support anybody may ask for; `deadline_s` bounds every single wait.
    Example: `TeacherConfig(path="assets/shop/teacher")`.
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
            raise ConfigurationError(f"teacher.deadline_s needs a positive number of seconds, got {self.deadline_s}")

    def torch_device(self) -> torch.device:
        """Where this process puts the model. Raises `ConfigurationError` without the GPU that was asked for."""
        present = torch.cuda.is_available()
        if self.device is Device.GPU and not present:
            raise ConfigurationError(
                "teacher.device is GPU, but this process sees no CUDA device; set teacher.device=AUTO, or "
                "cluster.gpus_per_teacher so that the actor is given one"
            )
        return torch.device("cuda" if present and self.device is not Device.CPU else "cpu")

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype on a resolved device."""
        if self.dtype is Dtype.AUTO:
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        return torch.bfloat16 if self.dtype is Dtype.BFLOAT16 else torch.float32


def environment(device: Device) -> dict[str, str]:
    """Environment variables of a teacher's process, to be set before it imports torch."""
    common = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    gpu = device is Device.GPU or (device is Device.AUTO and torch.cuda.is_available())
    return common if gpu else common | {"OMP_NUM_THREADS": "1"}
