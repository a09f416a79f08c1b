"""Devices and dtypes: one vocabulary for students, teachers and learners."""

from enum import Enum

import torch

from opd.errors import ConfigurationError


class Device(Enum):
    """Device of a model. `AUTO` is a GPU where the process sees one."""

    AUTO = "auto"
    CPU = "cpu"
    GPU = "gpu"


class Dtype(Enum):
    """Dtype of weights and activations. `AUTO` is bfloat16 on a GPU and float32 on a CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def on_gpu(requested: Device) -> bool:
    """Whether a process of this kind will use a GPU (never raises)."""
    return requested is Device.GPU or (requested is Device.AUTO and torch.cuda.is_available())


def resolve_device(requested: Device, role: str) -> torch.device:
    """The device to use. Raises `ConfigurationError` if a GPU is requested and this process sees none."""
    if requested is Device.GPU and not torch.cuda.is_available():
        raise ConfigurationError(
            f"{role}.device is GPU, but this process sees no CUDA device; set {role}.device=AUTO, or "
            "cluster.gpus_per_* so that the actor is given one"
        )
    return torch.device("cuda", 0) if on_gpu(requested) else torch.device("cpu")


def resolve_dtype(requested: Dtype, device: torch.device) -> torch.dtype:
    """The dtype to use on a resolved device."""
    if requested is Dtype.AUTO:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if requested is Dtype.FLOAT32 else torch.bfloat16
