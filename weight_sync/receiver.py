"""Receiver of one version of the student: begin, chunks in any order and any number, commit.

A receiver gives the bytes out only when every chunk has come and has the digest that was announced; until then, and if
anything is wrong, the receiver keeps the weights it has. Nothing here touches a model, a network or a clock.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from opd.errors import DataError
from opd.ports import Manifest, PublishedWeights, WeightChunk, WeightShard
from weight_sync.manifest import digest, flat_bytes, sizes, unpack

# Chunks out of object stores and shared memory are read-only, and are only read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

_READERS = 4  # chunks fetched and hashed at once; both leave Python's lock to others


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedWeights:
    """A version received whole: `buffers[i]` (uint8) holds the parameters of the run `runs[i]`."""

    version: int
    digest: str
    manifest: Manifest
    runs: tuple[tuple[int, int], ...]
    buffers: tuple[Tensor, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter, as views into the buffers."""
        for (first, last), buffer in zip(self.runs, self.buffers, strict=True):
            yield from unpack(self.manifest, first, last, buffer)


def digest_of(manifest: Manifest, chunks: Sequence[WeightChunk]) -> str:
    """Digest of a whole version: xxh3_64 of its manifest and of the name and content of each chunk."""
    named = [manifest.names, manifest.dtypes, manifest.shapes, manifest.nbytes, manifest.lora_scale]
    content = [[chunk.first, chunk.last, chunk.nbytes, chunk.digest] for chunk in chunks]
    return xxhash.xxh3_64_hexdigest(json.dumps([named, content]).encode())


def assemble(shares: Sequence[WeightShard]) -> PublishedWeights:
    """One version from the parts that the ranks published.

    Raises:
        DataError: the ranks speak of different versions or models, or their chunks do not cover the model once.
    """
    first = shares[0]
    for rank, share in enumerate(shares):
        if (share.version, share.manifest) != (first.version, first.manifest):
            raise DataError(
                f"learner rank {rank} publishes version {share.version} and rank 0 version {first.version}, or their "
                "models differ; all ranks must be asked for the same version of one model"
            )
    chunks = tuple(sorted((c for share in shares for c in share.chunks), key=lambda c: c.first))
    whole = PublishedWeights(
        version=first.version,
        manifest=first.manifest,
        chunks=chunks,
        digest=digest_of(first.manifest, chunks),
        sentinel=first.sentinel,
    )
    _check_announcement(whole, f"the learner cannot publish version {first.version}")
    return whole


class WeightReceiver:
    """Receiver of one version at a time; errors name `subject`.

    What is wrong is refused with a `DataError` and changes nothing: a good chunk may still follow a damaged one, and
    a chunk that comes twice is taken once. Beginning another version forgets what came of the one before. Threads may
    call `chunk` at once.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._open: PublishedWeights | None = None
        self._parts: dict[int, Tensor] = {}

    def begin(self, weights: PublishedWeights) -> None:
        """Begin receiving the version that `weights` announces. A repeated call is harmless.

        Raises:
            DataError: its chunks overlap, leave a gap or do not add up, or its digest is not theirs.
        """
        _check_announcement(weights, self._refusing(weights.version))
        again = self._open is not None and _name(self._open) == _name(weights)
        if not again:
            self._open, self._parts = weights, {}

    def chunk(self, version: int, number: int, data: np.ndarray | Tensor) -> None:
        """Take in chunk `number` of `version`: an array, or the bytes (uint8) on a device.

        Raises:
            DataError: no such version was begun, it has no such chunk, or the bytes are not those announced.
        """
        subject, chunks = self._refusing(version), self._announced(version).chunks
        if not 0 <= number < len(chunks):
            raise DataError(f"{subject}: chunk {number} came, but it announced {len(chunks)}; check the learner")
        chunk, buffer = chunks[number], data if isinstance(data, Tensor) else flat_bytes(data)
        if buffer.nbytes != chunk.nbytes:
            raise DataError(
                f"{subject}: chunk {number} should have {chunk.nbytes} bytes, but {buffer.nbytes} came; publish again"
            )
        found = digest(buffer)
        if found != chunk.digest:
            raise DataError(
                f"{subject}: the digest of chunk {number} is {found}, not {chunk.digest} as announced; it was damaged "
                "on the way, publish again"
            )
        self._parts.setdefault(number, buffer if isinstance(buffer, Tensor) else torch.from_numpy(buffer))

    def commit(self, version: int, digest: str) -> ReceivedWeights:
        """All of `version`, verified.

        Raises:
            DataError: it was not begun, is not what `digest` names, or chunks are missing; what came is kept.
        """
        subject, announced = self._refusing(version), self._announced(version)
        if digest != announced.digest:
            raise DataError(
                f"{subject}: {digest} is to be committed, but {announced.digest} was announced; publish again"
            )
        lost = [number for number in range(len(announced.chunks)) if number not in self._parts]
        if lost:
            raise DataError(
                f"{subject}: {len(lost)} of its {len(announced.chunks)} chunks did not come, the first is chunk "
                f"{lost[0]}; publish again"
            )
        delivered = ReceivedWeights(
            version=version,
            digest=digest,
            manifest=announced.manifest,
            runs=tuple((chunk.first, chunk.last) for chunk in announced.chunks),
            buffers=tuple(self._parts[number] for number in range(len(announced.chunks))),
        )
        self.abort(version)
        return delivered

    def abort(self, version: int) -> None:
        """Discard what arrived of `version`; harmless if it was not begun."""
        if self._open is not None and self._open.version == version:
            self._open, self._parts = None, {}

    def _refusing(self, version: int) -> str:
        return f"{self._subject} refuses weights version {version} and keeps its own"

    def _announced(self, version: int) -> PublishedWeights:
        if self._open is None or self._open.version != version:
            state = "none is" if self._open is None else f"version {self._open.version} is"
            raise DataError(f"{self._refusing(version)}: it was not begun ({state}); publish again")
        return self._open


def collect(weights: PublishedWeights, fetch: Callable[[Any], np.ndarray | Tensor], subject: str) -> ReceivedWeights:
    """Fetch and verify all chunks, several at once; `fetch` turns a handle into its bytes and bounds its own wait.

    Raises:
        DataError: in the name of `subject`, before anything is given out.
    """
    receiver = WeightReceiver(subject)
    receiver.begin(weights)

    def one(number: int) -> None:
        receiver.chunk(weights.version, number, fetch(weights.chunks[number].handle))

    with ThreadPoolExecutor(min(_READERS, len(weights.chunks))) as readers:
        list(readers.map(one, range(len(weights.chunks))))
    return receiver.commit(weights.version, weights.digest)


def check_unchanged(weights: PublishedWeights, delivered: ReceivedWeights, subject: str) -> None:
    """Raise `DataError` in the name of `subject` if bytes that were received are not what was announced any more."""
    for number, (chunk, buffer) in enumerate(zip(weights.chunks, delivered.buffers, strict=True)):
        if digest(buffer.numpy() if buffer.device.type == "cpu" else buffer) != chunk.digest:
            raise DataError(
                f"{subject} cannot load weights version {weights.version} again: chunk {number} has changed in memory "
                "that it shares with the learner; publish again"
            )


def _name(weights: PublishedWeights) -> tuple[int, str]:
    return weights.version, weights.digest


def _check_announcement(weights: PublishedWeights, subject: str) -> None:
    """Raise if the chunks are not the whole model, once, or the digest is not theirs."""
    try:
        each = sizes(weights.manifest)
    except DataError as error:
        raise DataError(f"{subject}: {error}") from error
    end = 0
    for number, chunk in enumerate(weights.chunks):
        if chunk.first != end or chunk.last <= chunk.first:
            why = "overlaps the one before" if chunk.first < end else "leaves out parameters or has none"
            raise DataError(
                f"{subject}: chunk {number} has parameters {chunk.first} to {chunk.last - 1} where {end} should be the "
                f"first, so it {why}; check how the learner cuts its chunks"
            )
        if chunk.nbytes != sum(each[chunk.first : chunk.last]):
            raise DataError(
                f"{subject}: its manifest gives chunk {number} {sum(each[chunk.first : chunk.last])} bytes, but "
                f"{chunk.nbytes} are announced; check how the learner cuts its chunks"
            )
        end = chunk.last
    if end != len(each):
        raise DataError(f"{subject}: its chunks end at parameter {end} of {len(each)}; check how the learner cuts them")
    if weights.digest != digest_of(weights.manifest, weights.chunks):
        raise DataError(
            f"{subject}: it calls itself {weights.digest}, but its manifest and chunks are "
            f"{digest_of(weights.manifest, weights.chunks)}; the announcement was damaged, publish again"
        )
