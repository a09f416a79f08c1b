"""Requests to the hub through `huggingface_hub`, each with a deadline: what a repository holds, and its files.

The only module beside `push.py` that opens a connection. Without one the library's cache answers, if it can.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, TypeVar

from httpx2 import ConnectTimeout, ReadError, RemoteProtocolError, TimeoutException, TransportError, WriteError
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers, close_session, get_session, hf_raise_for_status, logging, tqdm

from hf.hub.cache import Snapshot, cached, folder_of, is_here, keep_in_mind, storing
from hf.hub.failures import Refused, Unreachable, reason_of, refusal
from hf.hub.ids import HubId, Kind
from opd.deadlines import repeated
from opd.errors import ConfigurationError, DataError, OpdError

Result = TypeVar("Result")
Arrived = Callable[[int], None]
"""Told how many further bytes have arrived; called by several threads."""

DEADLINE_S = 60.0  # of one question, attempts included
ATTEMPT_S = 10.0
PAUSE_S = 1.0
AT_ONCE = 4  # files that are fetched side by side
SLOWEST = 20_000.0  # bytes per second below which a download is given up, ...
GRACE_S = 300.0  # ... beside so many seconds
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own bound


def snapshot(name: HubId, key: str) -> Snapshot:
    """Snapshot of a repository at the requested revision, from the hub or else from the cache.

    Raises:
        ConfigurationError: there is no such repository or revision, it is not open to this user, or there is no
            connection and the cache does not have it.
    """
    try:
        with storing(f"{key} {str(name)!r}"):
            return _online(name, key)
    except Unreachable as error:
        kept = cached(name, key)
        if kept is None:
            raise ConfigurationError(error.without_cache(name, key)) from error
        return kept


def _online(name: HubId, key: str) -> Snapshot:
    def ask() -> Any:
        return HfApi().repo_info(
            name.repo, repo_type=name.kind.value, revision=name.branch, timeout=ATTEMPT_S, files_metadata=True
        )

    try:
        info = answered(ask)
    except Refused as error:
        raise refusal(error, name, key, _revisions(name)) from error
    files = {one.rfilename: -1 if one.size is None else int(one.size) for one in info.siblings or ()}
    return Snapshot(name=name, key=key, commit=str(info.sha), files=files)


def answered(ask: Callable[[], Result]) -> Result:
    """Answer of the hub, requested again while it is busy or the connection fails.

    Raises:
        Refused: the hub answers no.
        Unreachable: there is no answer within the deadline, or no connection is wanted (HF_HUB_OFFLINE).
    """
    logging.set_verbosity_error()  # its warnings repeat URLs, and a URL may carry a signature
    try:
        return repeated(ask, _is_transient, DEADLINE_S, PAUSE_S)
    except OfflineModeIsEnabled as error:
        raise Unreachable("HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        if _is_transient(error):
            raise Unreachable(reason_of(error)) from error
        raise Refused(error) from error
    except TransportError as error:
        raise Unreachable(reason_of(error)) from error


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _TRANSIENT
    broken = isinstance(error, TimeoutException | ReadError | WriteError | RemoteProtocolError)
    return broken and not isinstance(error, ConnectTimeout)  # nothing is there; the cache may help


def _revisions(name: HubId) -> list[str]:
    """Branches and tags that exist; none where the hub does not say."""
    try:
        refs = answered(lambda: HfApi().list_repo_refs(name.repo, repo_type=name.kind.value))
    except (Refused, Unreachable):
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


# --- files ---------------------------------------------------------------------------------------------------------


def fetch(known: Snapshot, files: Sequence[str], arrived: Arrived) -> Path:
    """Fetch the files that are not here yet, several at once; returns their folder.

    A connection that breaks is taken up again where it broke, and whole files are never fetched twice.

    Raises:
        OpdError: the connection is lost, too slow or refused, the disk is full, or the cache lacks a file.
    """
    with storing(known.part):
        return _fetch(known, files, arrived)


def _fetch(known: Snapshot, files: Sequence[str], arrived: Arrived) -> Path:
    lacking = [file for file in files if not is_here(known, file)]
    if lacking and known.offline:
        raise OpdError(
            f"{known.part}: there is no connection to the hub, and the cache {constants.HF_HUB_CACHE} has commit "
            f"{known.commit} without {lacking[0]!r}; connect once, or copy a whole cache here"
        )
    if lacking:
        _check_room(known, lacking)
        _fetch_all(known, lacking, arrived)
    keep_in_mind(known)
    return folder_of(known)


def _fetch_all(known: Snapshot, files: Sequence[str], arrived: Arrived) -> None:
    counter = _Counter(arrived)
    deadline = monotonic() + GRACE_S + sum(max(0, known.files.get(file, 0)) for file in files) / SLOWEST
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waits = [pool.submit(_fetch_one, known, file, counter) for file in files]
        try:
            for wait in waits:
                wait.result(max(0.0, deadline - monotonic()))
        except BaseException as error:
            counter.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            close_session()  # ends requests that wait
            if isinstance(error, TimeoutError):
                slow = Unreachable(f"fewer than {SLOWEST / 1000:g} kB arrive in a second")
                raise OpdError(slow.broken(known.name, known.key, "its files")) from error
            raise


def _check_room(known: Snapshot, files: Sequence[str]) -> None:
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    state = os.statvfs(place)
    free, wanted = state.f_bavail * state.f_frsize, sum(max(0, known.files.get(file, 0)) for file in files)
    if wanted > free:
        raise OpdError(
            f"{known.part} needs {wanted / 1e9:.2f} GB, but {constants.HF_HUB_CACHE} has {free / 1e9:.2f} GB free; "
            "make room, or set HF_HOME to a larger disk"
        )


def _fetch_one(known: Snapshot, file: str, counter: "_Counter") -> None:
    def ask() -> str:
        return hf_hub_download(
            known.name.repo,
            file,
            repo_type=known.name.kind.value,
            revision=known.commit,
            etag_timeout=ATTEMPT_S,
            tqdm_class=counter.bar(),
        )

    try:
        answered(ask)
    except Refused as error:
        raise refusal(error, known.name, known.key, []) from error
    except Unreachable as error:
        raise OpdError(error.broken(known.name, known.key, file)) from error
    except LocalEntryNotFoundError as error:  # the library asked for the file's head and had no answer
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise OpdError(Unreachable(reason_of(cause)).broken(known.name, known.key, file)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # the library counts bytes, and some are missing
        raise OpdError(Unreachable(reason_of(error)).broken(known.name, known.key, file)) from error


class _Stopped(Exception):
    """Another file of the same snapshot could not be fetched."""


@dataclass(slots=True)
class _Counter:
    """Bytes of all files of a snapshot, as they arrive."""

    arrived: Arrived
    stopped: bool = False
    lock: Any = field(default_factory=Lock)

    def bar(self) -> type[tqdm]:
        """A class that the library takes for its bar, and that shows nothing."""
        counter = self

        class Bar(tqdm):
            """Counter in the place of a bar."""

            def __init__(self, *given: Any, **named: Any) -> None:
                self.counts = "downloading bytes" not in str(named.get("desc"))  # xet's second bar for the same bytes
                super().__init__(*given, **{**named, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                if self.counts:
                    counter.count(int(n or 0))

        return Bar

    def count(self, more: int) -> None:
        """Count bytes that arrived."""
        if self.stopped:
            raise _Stopped
        with self.lock:
            self.arrived(more)


def read_start(known: Snapshot, file: str) -> bytes:
    """The header of a safetensors file, with the 8 bytes of its length, by requests for ranges.

    Raises:
        DataError: it is no safetensors file.
        OpdError: there is no connection.
    """
    first = _range(known, file, 0, 8)
    length = int.from_bytes(first, "little")
    if len(first) != 8 or not 0 < length <= _LONGEST_HEADER:
        raise DataError(f"{known.part} has a damaged {file!r} (no header of safetensors); name another revision")
    return first + _range(known, file, 8, length)


def _range(known: Snapshot, file: str, start: int, count: int) -> bytes:
    prefix = "datasets/" if known.name.kind is Kind.DATA else ""
    url = f"{constants.ENDPOINT}/{prefix}{known.name.repo}/resolve/{known.commit}/{file}"
    headers = build_hf_headers() | {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}

    def ask() -> bytes:
        with get_session().stream("GET", url, headers=headers, timeout=ATTEMPT_S) as response:
            hf_raise_for_status(response)
            if start and response.status_code != 206:
                raise DataError(f"{known.part}: the hub gives no part of {file!r} alone, so dry_run cannot look at it")
            got = b""
            for piece in response.iter_bytes():
                got += piece
                if len(got) >= count:
                    break
            return got[:count]

    try:
        return answered(ask)
    except Refused as error:
        raise refusal(error, known.name, known.key, []) from error
    except Unreachable as error:
        raise OpdError(error.broken(known.name, known.key, file)) from error
