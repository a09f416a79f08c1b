"""Processes of a run as the memory plan sees them: what each is for, and the GPUs that it gets."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from actors.config import CPU_KV_CACHE_BYTES
from launch.config.run_config import DEFAULT, RunConfig
from launch.config.settings import Sharing
from launch.plan.checks.blends import inner_teacher
from launch.plan.checks.devices import gpus_of_teacher, writers_here
from launch.plan.checks.numbers import engine_dtype, part_dtype
from launch.plan.memory.footprint import EngineRole, LearnerRole, Role, TeacherRole
from launch.plan.memory.shapes import read_shape
from launch.services.weight_transports import transport_of
from learner.config import Transport
from opd.errors import OpdError
from opd.loss.chunked import DEVICE_CHUNK, HOST_CHUNK
from opd.ports import LastHidden
from opd.settings.devices import Device, Dtype
from teacher_service.config import OWN_ENGINE, REMOTE, Backend

GIB = 2**30
_ASKING_S = 180.0
_USABLE = 0.98  # of a GPU: what other programs and fragments leave


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`count` processes of one role; each gets `gpus` GPUs (0 and `on_gpu`: all such share the first one).

    Those that take `turns` sleep while processes of another name work.
    """

    name: str
    count: int
    gpus: float
    on_gpu: bool
    role: Role
    turns: bool = False


def card_bytes(config: RunConfig) -> int:
    """Usable bytes of one GPU: as set, or of the smallest that torch sees on this machine; 0 if unknown."""
    if config.cluster.gpu_memory_gib:
        return int(_USABLE * config.cluster.gpu_memory_gib * GIB)
    if config.cluster.address != "local" or not torch.cuda.is_available():
        return 0
    return int(_USABLE * _smallest_gpu())


@cache
def _smallest_gpu() -> int:
    """Bytes of the smallest GPU of this machine, by a process of its own: asking leaves a context on the GPU."""
    asking = "import torch; n = range(torch.cuda.device_count()); p = torch.cuda.get_device_properties"
    command = [sys.executable, "-c", f"{asking}; print(min(p(i).total_memory for i in n))"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ASKING_S).stdout
    except subprocess.SubprocessError as error:
        raise OpdError(
            f"torch cannot say how much memory this machine's GPUs have ({type(error).__name__}); see opd env, or set "
            "cluster.gpu_memory_gib"
        ) from error
    return int(answer)


def device_bytes(card: int) -> int:
    """Bytes of a GPU, used or not, of which `card` are usable: what vLLM's shares are shares of."""
    return int(card / _USABLE)


def of_teacher(name: str) -> str:
    """Name of a teacher's actors for people."""
    return "teacher actor" if name == DEFAULT else f"teacher actor {name!r}"


def parts(config: RunConfig, card: int, *, exact: bool = True) -> tuple[Part, ...]:
    """All processes with a model in them; `card` are the usable bytes of a GPU, `exact` as in `Plan.exact_kl`."""
    turns = config.cluster.share is Sharing.TIME
    return tuple(replace(part, turns=turns) for part in _parts(config, card, exact))


def _parts(config: RunConfig, card: int, exact: bool) -> Iterator[Part]:
    cluster, student, on_gpu = config.cluster, config.student, config.student.device is Device.GPU
    inner = inner_teacher(config)
    engine = _engine(config, student.path, card, config.teachers[inner.name].path if inner else "")
    yield Part(name="rollout actor", count=student.replicas, gpus=cluster.gpus_per_engine, on_gpu=on_gpu, role=engine)
    for name in writers_here(config):
        role = _engine(config, config.teachers[name].path, card)
        yield Part(name=f"writing {of_teacher(name)}", count=1, gpus=cluster.gpus_per_engine, on_gpu=on_gpu, role=role)
    for name, teacher in config.teachers.items():
        if teacher.backend not in REMOTE:
            yield Part(
                name=of_teacher(name),
                count=teacher.replicas,
                gpus=gpus_of_teacher(cluster, teacher),
                on_gpu=teacher.device is Device.GPU,
                role=_teacher(config, name, card),
            )
    yield Part(
        name="learner rank",
        count=config.learner.ranks,
        gpus=cluster.gpus_per_learner,
        on_gpu=config.learner.device is Device.GPU,
        role=_learner(config, exact),
    )


def _width(dtype: Dtype) -> int:
    return 2 if dtype is Dtype.BFLOAT16 else 4


def _engine(config: RunConfig, path: str, card: int, inner: str = "") -> EngineRole:
    student, on_gpu = config.student, config.student.device is Device.GPU
    told = student.kv_cache_bytes or (0 if on_gpu else CPU_KV_CACHE_BYTES)
    return EngineRole(
        model=read_shape(path),
        bytes_each=_width(engine_dtype(config)),
        longest=student.longest,
        sequences=student.max_num_seqs,
        step_tokens=student.step_tokens(on_gpu=on_gpu),
        on_gpu=on_gpu,
        parallel=student.tensor_parallel,
        cache=told * student.tensor_parallel,
        reserved=int(student.gpu_memory_utilization * device_bytes(card)) if on_gpu and not told else 0,
        graphs=not student.enforce_eager,
        inner=read_shape(inner).parameters if inner else 0,
        copies=int(on_gpu and transport_of(config) is Transport.NCCL),
    )


def _teacher(config: RunConfig, name: str, card: int) -> TeacherRole:
    teacher, on_gpu = config.teachers[name], config.teachers[name].device is Device.GPU
    model, width = read_shape(teacher.path), _width(part_dtype(teacher))
    reserves = on_gpu and teacher.backend in OWN_ENGINE
    return TeacherRole(
        model=model,
        bytes_each=width,
        tokens=teacher.max_batch_tokens,
        rows=min(teacher.head_chunk, teacher.max_batch_tokens),
        on_gpu=on_gpu,
        reserved=int(teacher.gpu_memory_utilization * device_bytes(card)) if reserves else 0,
        parallel=teacher.tensor_parallel,
        head=model.vocabulary * model.width * width if teacher.backend is Backend.VLLM else 0,
    )


def _learner(config: RunConfig, exact: bool) -> LearnerRole:
    learner, model, on_gpu = config.learner, read_shape(config.student.path), config.learner.device is Device.GPU
    width = _width(learner.dtype)
    shapes = [read_shape(teacher.path) for teacher in config.teachers.values()] if exact else []
    automatic = (DEVICE_CHUNK if on_gpu else HOST_CHUNK) // max(4 * model.vocabulary, 1)
    return LearnerRole(
        model=model,
        bytes_each=width,
        stage=learner.stage,
        ranks=learner.ranks,
        tokens=learner.packed_tokens,
        rows=min(learner.head_chunk or automatic, learner.packed_tokens),
        on_gpu=on_gpu,
        whole=LastHidden in config.method.requires,
        checkpointed=learner.checkpointed,
        adapters=learner.lora.r > 0,
        offloaded=learner.offload_optimizer,
        fused=True,  # as learner.engine sets AdamW up, on GPUs too
        heads=sum(shape.vocabulary * shape.width * width for shape in shapes),
        chunk=learner.publish_chunk_bytes,
        copies=2 * (on_gpu and transport_of(config) in (Transport.CUDA_IPC, Transport.NCCL)),  # by turns
    )
