"""A transport that cannot work is refused before a weight is sent, and each makes the outlet it is named after."""

import pytest

from launch.config import run_config
from launch.plan import make_plan
from launch.transports import check_places, outlet
from learner.config import Transport
from learner.publishing import Staged
from opd.errors import ConfigurationError
from opd.shared_memory import SharedMemory


def test_each_transport_has_an_outlet() -> None:
    assert {transport: type(outlet(transport)()) for transport in Transport} == {
        Transport.OBJECT_STORE: Staged,
        Transport.SHARED_MEMORY: SharedMemory,
    }


def test_shared_memory_over_several_machines_is_refused_when_planned() -> None:
    asked = ["experiment=shop", "learner.transport=SHARED_MEMORY"]
    assert make_plan(run_config(asked)).config.learner.transport is Transport.SHARED_MEMORY
    with pytest.raises(ConfigurationError, match=r"on one machine, but cluster\.placement=SPREAD.*OBJECT_STORE"):
        make_plan(run_config([*asked, "cluster.placement=SPREAD"]))


def test_an_unknown_transport_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"learner\.transport needs Transport, one of .*'SHARED_MEMORY'"):
        run_config(["experiment=shop", "learner.transport=PIGEON"])


def test_shared_memory_across_machines_is_refused_by_name() -> None:
    check_places({"learner rank 0": "a", "rollout actor 0": "a"})
    with pytest.raises(ConfigurationError, match=r"learner rank 0 and rollout actor 1 are on different .*OBJECT_STORE"):
        check_places({"learner rank 0": "a", "rollout actor 0": "a", "rollout actor 1": "b"})
