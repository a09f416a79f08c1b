"""How published weights travel: the learner's side of each transport, and where it does not fit.

The receivers' side is `launch.cluster.fetch` for all of them, because a handle says itself where its bytes lie.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import assert_never

from launch.cluster import store
from launch.config import RunConfig
from launch.settings import Placement
from learner.config import Transport
from learner.publishing import Staged
from opd.errors import ConfigurationError
from opd.ports import Outlet
from opd.shared_memory import SharedMemory


def outlet(transport: Transport) -> Callable[[], Outlet]:
    """What a learner rank calls, in its own process, to make the place for its chunks."""
    if transport is Transport.OBJECT_STORE:
        return partial(Staged, store)
    if transport is Transport.SHARED_MEMORY:
        return SharedMemory
    assert_never(transport)


def check_transport(config: RunConfig) -> None:
    """Raise `ConfigurationError` if the run's actors cannot use its transport, as far as the plan can tell."""
    shared = config.learner.transport is Transport.SHARED_MEMORY
    if shared and config.cluster.placement is Placement.SPREAD:
        raise ConfigurationError(
            "learner.transport=SHARED_MEMORY needs all engines and learner ranks on one machine, but "
            "cluster.placement=SPREAD puts them on several; set learner.transport=OBJECT_STORE or "
            "cluster.placement=NONE"
        )


def check_places(places: Mapping[str, str]) -> None:
    """Raise `ConfigurationError` if actors cannot share memory; `opd.shared_memory.place` of each, by name."""
    first, *others = places
    apart = next((name for name in others if places[name] != places[first]), None)
    if apart is None:
        return
    raise ConfigurationError(
        f"learner.transport=SHARED_MEMORY needs all engines and learner ranks on one machine, but {first} and {apart} "
        "are on different ones (or in different containers); set learner.transport=OBJECT_STORE"
    )
