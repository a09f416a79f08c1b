"""Looks at a run from outside while it lasts: what its processes listen on, their arguments, and Ray's own files."""

import ipaddress
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PERIOD_S = 1.0


@dataclass(slots=True)
class Onlooker:
    """What was seen of this process and its new descendants; `secrets` are texts that must stand nowhere.

    What it had started and opened before belongs to something else: other tests have run in it.
    """

    secrets: tuple[str, ...] = ()
    older: frozenset[psutil.Process] = frozenset()  # equal only to the same process, also when its number is used anew
    before: frozenset[tuple[str, int]] = frozenset()  # address and port of what this process listened on already
    arguments: set[str] = field(default_factory=set)
    listening: set[tuple[str, str]] = field(default_factory=set)  # name of the process, address
    opened: set[str] = field(default_factory=set)  # what listens on more than the loopback: port, command line
    told: set[str] = field(default_factory=set)  # "file: secret"
    sizes: dict[Path, int] = field(default_factory=dict)

    def open_to_others(self) -> set[tuple[str, str]]:
        """Sockets that listen on more than the loopback."""
        return {(name, at) for name, at in self.listening if not _is_loopback(at)}

    def look(self) -> None:
        """Look once."""
        own = psutil.Process()
        for process in (own, *_descendants(own, self.older)):
            try:
                found = _listening(process) - (self.before if process == own else set())
                command, name = " ".join(process.cmdline()), process.name()
                self.arguments.add(command)
                self.listening |= {(name, address) for address, _ in found}
                self.opened |= {f"{address}:{port} {command}" for address, port in found if not _is_loopback(address)}
            except psutil.Error:  # it has just ended
                continue
        self.read(_session_files())

    def read(self, files: Iterable[Path]) -> None:
        """Look for the secrets in files that have grown."""
        for path in files:
            try:
                size = path.stat().st_size
                if path.is_file() and self.sizes.get(path) != size:
                    self.sizes[path] = size
                    text = path.read_bytes()
                    self.told |= {f"{path.name}: {secret}" for secret in self.secrets if secret.encode() in text}
            except OSError:  # a socket, or gone
                continue


def _descendants(process: psutil.Process, without: Collection[psutil.Process]) -> Iterator[psutil.Process]:
    """Those of a process, without the branches that begin at one of `without`."""
    try:
        children = process.children()
    except psutil.Error:  # it has just ended
        return
    for child in children:
        if child not in without:
            yield child
            yield from _descendants(child, without)


def _listening(process: psutil.Process) -> set[tuple[str, int]]:
    sockets = process.net_connections("inet")
    return {(s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN}


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _session_files() -> Iterator[Path]:
    from ray._private import worker

    node = worker._global_node
    if node is not None:
        yield from Path(node.get_session_dir_path()).rglob("*")


@contextmanager
def looking(secrets: Iterable[str] = ()) -> Iterator[Onlooker]:
    """An onlooker that looks every second until the block ends, at what begins in it."""
    own = psutil.Process()
    onlooker = Onlooker(tuple(secrets), frozenset(own.children()), frozenset(_listening(own)))
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(PERIOD_S):
            onlooker.look()

    thread = threading.Thread(target=watch, name="onlooker", daemon=True)
    thread.start()
    try:
        yield onlooker
    finally:
        ended.set()
        thread.join(60)
