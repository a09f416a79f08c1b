"""Where processes of a run meet: on the one address that was said, and on no other interface."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from subprocess import PIPE
from typing import Any

import psutil
import pytest
from torch.distributed.rendezvous import rendezvous

from tests.onlooker import Onlooker, looking
from weight_sync.rendezvous import HOST, free_port, hosted_store, loopback, meeting_place, own_host

SOON = timedelta(seconds=10)


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections("inet")
    return {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}


def newly(make: Callable[[], Any]) -> tuple[Any, set[str]]:
    """What was made, and the addresses that are listened on since."""
    before = listening()
    made = make()
    return made, {address for address, _ in listening() - before}


def test_a_store_listens_where_it_is_told() -> None:
    store, addresses = newly(lambda: hosted_store("127.0.0.1", 0, SOON))
    assert addresses == {"127.0.0.1"} and store is not None


def test_ranks_meet_by_an_address_that_torch_and_deepspeed_take() -> None:
    place = meeting_place("127.0.0.1", free_port("127.0.0.1"))
    with ThreadPoolExecutor(2) as pool:

        def meet(rank: int) -> tuple[object, int, int, bytes]:
            store, own, world = next(iter(rendezvous(place, rank, 2, timeout=SOON)))
            store.set(str(own), f"here is {own}")
            return store, own, world, store.get(str(1 - own))  # the store of rank 0 serves as long as it is held

        met, addresses = newly(lambda: list(pool.map(meet, range(2))))
    assert [found[1:] for found in met] == [(0, 2, b"here is 1"), (1, 2, b"here is 0")]
    assert addresses <= {"127.0.0.1"}


def test_processes_of_a_local_session_stay_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in loopback().items():
        monkeypatch.setenv(name, value)
    assert own_host() == "127.0.0.1"
    monkeypatch.delenv(HOST)
    assert own_host() != "0.0.0.0"


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.7", "::ffff:192.0.2.7", "fe80::1"])
def test_the_onlooker_tells_other_addresses_from_the_loopback(address: str) -> None:
    seen = Onlooker(listening={("a", "127.0.0.1"), ("b", "::1"), ("c", "::ffff:127.0.0.1"), ("d", address)})
    assert seen.open_to_others() == {("d", address)}


LISTENS = """
import socket, sys
at = socket.create_server((sys.argv[1], 0))
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def started(address: str) -> Iterator[None]:
    """A process that listens there."""
    with subprocess.Popen([sys.executable, "-c", LISTENS, address], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"\n"
        yield


def test_the_onlooker_sees_what_begins_under_its_eyes_and_nothing_else() -> None:
    with started("0.0.0.0"), socket.create_server(("0.0.0.0", 0)), looking() as seen:
        with started("127.0.0.1"):
            seen.look()
        assert {address for _, address in seen.listening} == {"127.0.0.1"} and not seen.opened
        with started("0.0.0.0"):
            seen.look()
        assert {address for _, address in seen.open_to_others()} == {"0.0.0.0"}
        assert len(seen.opened) == 1 and all(LISTENS in line for line in seen.opened)
        with socket.create_server(("0.0.0.0", 0)):
            seen.look()
        assert len(seen.opened) == 2, "this process is looked at as well"
