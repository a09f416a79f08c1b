"""A transport that cannot work is refused before a weight is sent, and each makes the outlet it is named after."""

import re

import pytest
import torch

from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from launch.services.weight_transports import check_places, sender, transport_of
from learner.config import Transport
from learner.publishing import StagedSender
from opd.errors import ConfigurationError
from weight_sync.cuda_ipc import CudaIpcSender
from weight_sync.nccl import PullSender
from weight_sync.shared_memory import SharedMemorySender

ON_GPUS = ["experiment=shop", "learner.device=GPU", "student.device=GPU", "cluster.address=auto"]
APART = ["cluster.gpus_per_learner=1", "cluster.gpus_per_engine=1"]
TOGETHER = ["cluster.gpus_per_learner=0.4", "cluster.gpus_per_engine=0.6"]


def made(transport: Transport) -> type | str:
    """The outlet of a transport, or what it says where there is no GPU."""
    try:
        return type(sender(transport, 5.0)())
    except ConfigurationError as error:
        return str(error)


def test_each_transport_has_an_outlet() -> None:
    assert made(Transport.OBJECT_STORE) is StagedSender
    assert made(Transport.SHARED_MEMORY) is SharedMemorySender


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_learner_without_a_gpu_cannot_open_a_transport_between_gpus() -> None:
    assert re.match(r"learner\.transport=NCCL needs a GPU .*OBJECT_STORE", str(made(Transport.NCCL)))
    assert re.match(r"learner\.transport=CUDA_IPC needs a GPU .*SHARED_MEMORY", str(made(Transport.CUDA_IPC)))


@pytest.mark.gpu
def test_a_learner_with_a_gpu_opens_every_transport() -> None:
    assert (made(Transport.NCCL), made(Transport.CUDA_IPC)) == (PullSender, CudaIpcSender)


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        (["learner.transport=NCCL", *APART, "learner.device=CPU"], r"learner and engines on GPUs, but learner\.device"),
        (["learner.transport=NCCL", *APART, "student.device=CPU"], r"learner and engines on GPUs, but student\.device"),
        (
            ["learner.transport=NCCL", *APART, "student.tensor_parallel=2"],
            r"one GPU each, but student\.tensor_parallel=2",
        ),
        (["learner.transport=NCCL", *APART, "teacher.mixup=0.5"], r"teacher 'default' follows"),
        (["learner.transport=NCCL", *TOGETHER], r"GPUs of their own .*gpus_per_learner=0\.4"),
        (["learner.transport=NCCL"], r"GPUs of their own .*gpus_per_learner=0 "),
        (["learner.transport=CUDA_IPC"], r"on one GPU, but cluster\.gpus_per_learner=0 "),
        (["learner.transport=CUDA_IPC", *APART], r"on one GPU, but cluster\.gpus_per_learner=1"),
        (["learner.transport=CUDA_IPC", *TOGETHER, "learner.ranks=2"], r"on one GPU, but .*learner\.ranks=2"),
        (["learner.transport=CUDA_IPC", *TOGETHER, "learner.device=CPU"], r"learner and engines on GPUs"),
        (["learner.transport=CUDA_IPC", *TOGETHER, "cluster.placement=SPREAD"], r"on one machine, but .*SPREAD"),
    ],
)
def test_a_transport_between_gpus_is_refused_where_it_cannot_work(asked: list[str], refusal: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{asked[0]} needs .*{refusal}.*OBJECT_STORE"):
        make_plan(run_config([*ON_GPUS, *asked]))


@pytest.mark.parametrize("fits", [["learner.transport=NCCL", *APART], ["learner.transport=CUDA_IPC", *TOGETHER]])
def test_a_transport_between_gpus_is_planned_where_it_can_work(fits: list[str]) -> None:
    assert make_plan(run_config([*ON_GPUS, *fits])).config.learner.transport.name in fits[0]


def test_shared_memory_over_several_machines_is_refused_when_planned() -> None:
    asked = ["experiment=shop", "learner.transport=SHARED_MEMORY"]
    assert make_plan(run_config(asked)).config.learner.transport is Transport.SHARED_MEMORY
    with pytest.raises(ConfigurationError, match=r"on one machine, but cluster\.placement=SPREAD.*OBJECT_STORE"):
        make_plan(run_config([*asked, "cluster.placement=SPREAD"]))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ([], Transport.SHARED_MEMORY),
        (["cluster.address=auto"], Transport.OBJECT_STORE),
        (["cluster=multi_node"], Transport.OBJECT_STORE),
        (["cluster.placement=SPREAD"], Transport.OBJECT_STORE),
        (["learner.transport=OBJECT_STORE"], Transport.OBJECT_STORE),
        (["cluster.address=auto", "learner.transport=SHARED_MEMORY"], Transport.SHARED_MEMORY),
    ],
)
def test_a_run_on_one_machine_publishes_through_shared_memory_unless_told_otherwise(
    asked: list[str], found: Transport
) -> None:
    assert transport_of(run_config(["experiment=shop", *asked])) is found


def test_an_unknown_transport_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"learner\.transport needs one of .*SHARED_MEMORY"):
        run_config(["experiment=shop", "learner.transport=PIGEON"])


def test_shared_memory_across_machines_is_refused_by_name() -> None:
    check_places(Transport.SHARED_MEMORY, {"learner rank 0": "a", "rollout actor 0": "a"})
    with pytest.raises(ConfigurationError, match=r"learner rank 0 and rollout actor 1 are on different .*OBJECT_STORE"):
        check_places(Transport.CUDA_IPC, {"learner rank 0": "a", "rollout actor 0": "a", "rollout actor 1": "b"})
