"""Ray is applied here, and only here: plain service classes become actors, placed and configured.

Ray is imported inside the functions: it reads its token settings when it is imported, and `connected` makes the
token of a local session first.
"""

import logging
import os
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from launch.config.settings import ClusterConfig, Placement
from launch.services.failure_causes import brief
from launch.services.ray_session.address import check_cluster
from launch.services.ray_session.node import Node, bare, on_loopback, start_ray
from launch.services.ray_session.placement import ActorRole, Bundles, Machine, check_fits
from launch.services.replicas import DescribeStacks, no_stack_dump
from launch.services.signals import signals_kept
from launch.services.stack_dumps import StackDumps
from opd.errors import OpdError, ServiceLost
from weight_sync.cuda_ipc import CudaIpcSegment, read_device
from weight_sync.nccl import PullHandle, pull
from weight_sync.rendezvous import loopback
from weight_sync.shared_memory import SharedMemorySegment, place, read


def fetch(handle: Any) -> np.ndarray | Tensor:
    """The array (weights on a GPU: the tensor) behind a handle, which has its location (called in actors)."""
    if isinstance(handle, SharedMemorySegment):
        return read(handle)
    if isinstance(handle, CudaIpcSegment):
        return read_device(handle)
    if isinstance(handle, PullHandle):
        return pull(handle)
    import ray

    return ray.get(handle, timeout=300)


def store(array: np.ndarray) -> Any:
    """A handle of an array put into the object store (called inside actors); it is lost with the actor."""
    import ray

    return ray.put(array)


async def streamed(method: Any, requests: Sequence[Any]) -> AsyncGenerator[tuple[Sequence[int], Sequence[Any]]]:
    """The parts that an actor's generator method yields, as they come."""
    async for part in method.remote(requests):
        yield await part


def end(actor: Any) -> None:
    """Kill an actor; it does not come back by itself."""
    import ray

    ray.kill(actor, no_restart=True)


def is_lost(error: BaseException) -> bool:
    """Whether `error` is the loss of an actor or an object (rather than an actor's refusal)."""
    from ray.exceptions import ObjectLostError, RayActorError

    return isinstance(error, RayActorError | ObjectLostError | ServiceLost)


def has_died(error: BaseException) -> bool:
    """Whether `error` is the loss of an actor (and not of an object)."""
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError)


def place_of(actor: Any) -> Any:
    """A reference to where an actor's process runs (`weight_sync.shared_memory.place`)."""
    return actor.__ray_call__.remote(_place)


def _place(_: Any) -> str:
    return place()


def sees(actor: Any, file: Path) -> Any:
    """A reference to whether a file is there for an actor's process."""
    return actor.__ray_call__.remote(_sees, str(file))


def _sees(_: Any, file: str) -> bool:
    return Path(file).exists()


@cache
def _local_token() -> str:
    """One token per process, inherited or new: Ray keeps the first it sees, also for the sessions of later runs."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


@contextmanager
def connected(config: ClusterConfig) -> Iterator[Node]:
    """A Ray session for the run: started and stopped here if local, joined and left otherwise.

    A local session listens on this machine's loopback alone, and gets a token of its own, so other users of the
    machine cannot reach it.
    """
    local = config.address == "local"
    if local:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = _local_token()
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        # Ray would start a Python for each CPU; actors have environments of their own and would take none of them.
        os.environ.setdefault("RAY_enable_worker_prestart", "0")
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep devices visible to unassigned actors
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    silence()
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    folder = ""
    if local:
        with signals_kept(), on_loopback(), bare():
            session: Any = start_ray(
                lambda: ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet),
                config.start_deadline_s,
            )
        folder = session.address_info["session_dir"]
    else:
        check_cluster(config.address)
        try:
            with signals_kept():
                ray.init(address=config.address, **quiet)
        except Exception as error:
            raise OpdError(
                f"the Ray session at cluster.address={config.address!r} does not take this program ({brief(error)}); "
                "check its token (RAY_AUTH_TOKEN_PATH) and its version, or use cluster=local"
            ) from error
    node = Node.started_here(folder) if local else Node()
    try:
        yield node
    finally:
        whole = node.dead is None
        ray.shutdown()
        node.end_orphans()
        if whole:  # otherwise Ray's logs say why
            node.tidy()
        node.let_go()


def silence() -> None:
    """Keep Ray's reports off the screen, which `log_to_driver` does not stop: callers report what died."""
    from ray._private import worker

    worker.print_to_stdstream = _unprinted


def _unprinted(data: Mapping[str, Any], **_: Any) -> None:
    logging.getLogger(__name__).debug("%s", data.get("lines"))


class Actors:
    """Makes the run's actors, within one placement group where the cluster asks for it."""

    def __init__(self, config: ClusterConfig, roles: Sequence[ActorRole], stacks: StackDumps | None = None) -> None:
        """`roles` are the actors that will be made; `stacks` watches them.

        Raises:
            ConfigurationError: the cluster does not have what they ask for.
            OpdError: others hold it, and do not give it back in time.
        """
        self._config, self._stacks, self._group = config, stacks, None
        self._roles = {role.name: role for role in roles}
        self._bundles = Bundles([role.name for role in roles for _ in range(role.count) if _shape(role)])
        if not config.elastic:
            check_fits(roles, machines(), "this cluster" if config.address != "local" else "this machine")
        if config.placement is not Placement.NONE:
            from ray.util.placement_group import placement_group

            shapes = [shape for role in roles for _ in range(role.count) if (shape := _shape(role))]
            self._group = placement_group(shapes, strategy=config.placement.value)
            if not self._group.wait(config.start_deadline_s):
                raise OpdError(
                    f"the cluster cannot place {len(shapes)} actors ({shapes}) within "
                    f"{config.start_deadline_s:.0f} s; add nodes or lower replicas, ranks or cluster.gpus_per_*"
                )

    def make(self, cls: type, role: ActorRole, environment: Mapping[str, str], *args: Any, concurrency: int) -> Any:
        """An actor of the plain class `cls`; its process gets `environment` before it imports anything.

        One whose role was not announced takes what the announced ones leave.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options: dict[str, Any] = {
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "max_concurrency": concurrency,
            "runtime_env": {"env_vars": {**environment, **(loopback() if self._config.address == "local" else {})}},
        }
        bundle = None
        if self._group is not None and role.name in self._roles and _shape(role):
            bundle = self._bundles.free(role.name)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=bundle
            )
        actor = ray.remote(cls).options(**options).remote(*args)
        if bundle is not None:
            self._bundles.holders[bundle] = actor
        if self._stacks is not None:
            self._stacks.watch(role.name, actor)
        return actor

    def end(self, actor: Any) -> None:
        """Kill an actor; the next of its role takes its place."""
        end(actor)
        self._bundles.release(actor)

    def __getitem__(self, name: str) -> ActorRole:
        return self._roles[name]

    def check_room(self, role: ActorRole) -> None:
        """Raise `OpdError` if one more such actor would have to wait for others to end."""
        import ray

        free = Machine.of(ray.available_resources())
        if self._config.elastic or role.on(free):
            return
        raise OpdError(
            f"there is no room for a {role.name}: it asks for {role.cpus:g} CPUs and {role.gpus:g} GPUs, of which "
            f"{free.cpus:g} and {free.gpus:g} are free"
        )

    @property
    def stack_dump(self) -> DescribeStacks:
        """Stack dump of actors, if the run has one."""
        return self._stacks.stack_dump if self._stacks is not None else no_stack_dump

    def close(self) -> None:
        """Give the placement group back."""
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)


def machines() -> list[Machine]:
    """CPUs and GPUs of each machine of the session, free or not."""
    import ray

    return [Machine.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _shape(role: ActorRole) -> dict[str, float]:
    return {name: value for name, value in (("CPU", role.cpus), ("GPU", role.gpus)) if value}
