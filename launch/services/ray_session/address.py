"""Check that a Ray cluster answers at an address; Ray itself would try for minutes, whatever listens there."""

import os
import socket

from opd.errors import OpdError

DEADLINE_S = 30.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and empty settings
_HEADER, _SETTINGS = 9, 4  # bytes of a frame's header, and the kind of the first frame that a server sends


def check_cluster(address: str, deadline_s: float = DEADLINE_S) -> None:
    """Raise a sentence unless Ray's control store answers at `address` (`auto`: where Ray itself would look)."""
    place = _resolved(address)
    host, colon, port = place.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        raise _nobody(address, f"{place!r} is not of the form HOST:PORT")
    try:
        answer = _first_bytes(host.strip("[]"), int(port), deadline_s)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise _nobody(address, f"{place}: {reason}") from error
    if len(answer) < _HEADER or answer[3] != _SETTINGS:
        raise _nobody(address, f"what answers at {place} is not Ray")


def _resolved(address: str) -> str:
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return canonicalize_bootstrap_address_or_die("auto")
    except Exception as error:
        raise _nobody(address, "no running one was found on this machine, and RAY_ADDRESS names none") from error


def _first_bytes(host: str, port: int, deadline_s: float) -> bytes:
    """The first bytes that a gRPC server sends; with TLS only a connection is made."""
    with socket.create_connection((host, port), timeout=deadline_s) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return bytes([0, 0, 0, _SETTINGS]).ljust(_HEADER)
        connection.sendall(_PREFACE)
        answer = b""
        while len(answer) < _HEADER and (more := connection.recv(_HEADER - len(answer))):
            answer += more
        return answer


def _nobody(address: str, why: str) -> OpdError:
    return OpdError(
        f"no Ray session at cluster.address={address!r} ({why}); start one with `ray start --head`, correct the "
        "address (the control store's, port 6379 as a rule), or use cluster=local"
    )
