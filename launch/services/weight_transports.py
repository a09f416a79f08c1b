"""Transports of published weights: the learner's side of each, and the runs in which it does not work.

The receivers' side is `launch.services.ray_session.cluster.fetch` for all of them, because a handle has the place of
its bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import assert_never

from launch.config.run_config import RunConfig
from launch.config.settings import Placement
from launch.services.ray_session.cluster import store
from learner.config import Transport
from learner.publishing import StagedSender
from opd.errors import ConfigurationError
from opd.ports import WeightSender
from opd.settings.devices import Device
from weight_sync.cuda_ipc import CudaIpcSender
from weight_sync.nccl import PullBackend, PullSender
from weight_sync.shared_memory import SharedMemorySender


def transport_of(config: RunConfig) -> Transport:
    """The transport of the run's weights; `AUTO` is shared memory where Ray is started on this machine for the run."""
    if config.learner.transport is not Transport.AUTO:
        return config.learner.transport
    alone = config.cluster.address == "local" and config.cluster.placement is not Placement.SPREAD
    return Transport.SHARED_MEMORY if alone else Transport.OBJECT_STORE


def sender(transport: Transport, deadline_s: float) -> Callable[[], WeightSender]:
    """Factory of a learner rank's sender, called in the rank's own process."""
    if transport is Transport.OBJECT_STORE:
        return partial(StagedSender, store)
    if transport is Transport.SHARED_MEMORY:
        return SharedMemorySender
    if transport is Transport.NCCL:
        return partial(PullSender, PullBackend.NCCL, deadline_s)
    if transport is Transport.CUDA_IPC:
        return CudaIpcSender
    assert transport is not Transport.AUTO, "transport_of(config) says which one it is"
    assert_never(transport)


def check_transport(config: RunConfig) -> None:
    """Raise `ConfigurationError` if the run's actors cannot use its transport, as far as the plan can tell."""
    transport = transport_of(config)
    if transport is Transport.OBJECT_STORE:
        return
    if transport is not Transport.NCCL and config.cluster.placement is Placement.SPREAD:
        raise ConfigurationError(
            f"learner.transport={transport.name} needs all engines and learner ranks on one machine, but "
            "cluster.placement=SPREAD puts them on several; set learner.transport=OBJECT_STORE or "
            "cluster.placement=NONE"
        )
    if transport is Transport.SHARED_MEMORY:
        return
    problem = next(_on_gpus(config), None)
    if problem is not None:
        needed, found = problem
        raise ConfigurationError(
            f"learner.transport={transport.name} needs {needed}, but {found}; change that, or set "
            "learner.transport=OBJECT_STORE"
        )


def _on_gpus(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Reasons why weights cannot stay on GPUs all the way: what is needed, and what the run has instead."""
    on_cpu = [role for role in ("learner", "student") if getattr(config, role).device is Device.CPU]
    if on_cpu:
        yield "learner and engines on GPUs", f"{on_cpu[0]}.device=CPU"
    parallel = config.student.tensor_parallel
    if parallel > 1:  # its workers are processes of their own, to which the actor would have to copy
        yield "engines of one GPU each", f"student.tensor_parallel={parallel}"
    following = [name for name, teacher in config.teachers.items() if teacher.mixup]
    if following:
        yield "engines as its only receivers", f"teacher {following[0]!r} follows the student (mixup)"
    ours, theirs = config.cluster.gpus_per_learner, config.cluster.gpus_per_engine
    have = f"cluster.gpus_per_learner={ours:g} and cluster.gpus_per_engine={theirs:g}"
    if config.learner.transport is Transport.NCCL:
        if min(ours, theirs) < 1:
            yield "GPUs of their own for learner ranks and engines (1 or more each)", have
        return
    if ours + theirs > 1 or config.learner.ranks > 1 or not min(ours, theirs):
        yield "one learner rank and the engines on one GPU", f"{have}, learner.ranks={config.learner.ranks}"


def check_places(transport: Transport, places: Mapping[str, str]) -> None:
    """Raise `ConfigurationError` if actors cannot share memory; `weight_sync.shared_memory.place` of each, by name."""
    first, *others = places
    apart = next((name for name in others if places[name] != places[first]), None)
    if apart is None:
        return
    raise ConfigurationError(
        f"learner.transport={transport.name} needs all engines and learner ranks on one machine, but {first} and "
        f"{apart} are on different ones (or in different containers); set learner.transport=OBJECT_STORE"
    )
