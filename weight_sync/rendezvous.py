"""Rendezvous of the processes of a run on one address: torch's own stores listen on every interface.

`OPD_HOST` (set in the actors of a local session) is the address to use; otherwise that of the interface that faces
the other machines is used.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from torch import distributed
from torch._C._distributed_c10d import HashStore, Store, TCPStore  # where torch.distributed has them from
from torch.distributed.rendezvous import register_rendezvous_handler

HOST = "OPD_HOST"
LOOPBACK = "127.0.0.1"
_SCHEME = "opd"


def loopback() -> Mapping[str, str]:
    """Environment variables with which a process of a local session listens on this machine's loopback alone."""
    return {HOST: LOOPBACK, "VLLM_HOST_IP": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def own_host() -> str:
    """This machine as the other processes of the run see it."""
    if os.environ.get(HOST):
        return os.environ[HOST]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing; asks which interface faces the others
            return str(probe.getsockname()[0])
        except OSError:  # there is no network but this machine
            return LOOPBACK


def free_port(host: str) -> int:
    """A port of `host` that is free now."""
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


def hosted_store(host: str, port: int, deadline: timedelta) -> TCPStore:
    """A store for others, which listens on `host` alone (port 0: any free one)."""
    listener = socket.create_server((host, port))
    taken = int(listener.getsockname()[1])
    return TCPStore(
        host, taken, is_master=True, wait_for_workers=False, timeout=deadline, master_listen_fd=listener.detach()
    )


def meeting_place(host: str, port: int) -> str:
    """`init_method` for torch and DeepSpeed: rank 0 has a `hosted_store` at `host:port`."""
    _register()
    return f"{_SCHEME}://{host}:{port}"


def be_alone(backend: str) -> None:
    """Make this process a group of its own, with no store that listens; vLLM uses an existing one."""
    if not distributed.is_initialized():
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


@cache
def _register() -> None:
    register_rendezvous_handler(_SCHEME, _meet)


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    place = urlsplit(url)
    query = dict(part.split("=") for part in place.query.split("&"))
    host, port, rank, world = str(place.hostname), place.port or 0, int(query["rank"]), int(query["world_size"])
    if rank == 0:
        yield hosted_store(host, port, timeout), rank, world
    else:
        yield TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout), rank, world
