"""Weight sync: versions as learner ranks publish them, and as receivers fetch and acknowledge them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Names, dtypes and shapes of a model's parameters in the order their `nbytes` bytes are published.

    `lora_scale` > 0: they are adapters (`weight_sync.lora`) on the checkpoint that the receiver started from.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    lora_scale: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentinel:
    """A fixed text and the learner's logprobs of its tokens 1.. , which a rightly loaded engine must repeat.

    `tolerance` > 0 bounds the largest difference in nats. At 0 the bound is measured (`weight_sync.sentinel`) with
    `origin`, the learner's logprobs of the same tokens before its first step, when both hold the same checkpoint.
    """

    ids: Int32[np.ndarray, " S"]
    logprobs: Float32[np.ndarray, " S1"]
    tolerance: float
    origin: Float32[np.ndarray, " S1"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChunk:
    """The parameters `first` .. `last - 1` of a manifest, one after the other in `nbytes` bytes.

    `digest` names their content (`weight_sync.manifest.digest`), `owner` is the learner rank that holds them, and
    `handle` what a receiver's `fetch` turns into the bytes.
    Example: `WeightChunk(first=0, last=3, nbytes=4096, digest="0f..", owner=1, handle=ref)`.
    """

    first: int
    last: int
    nbytes: int
    digest: str
    owner: int
    handle: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShard:
    """The part of a version that one learner rank publishes: the chunks it owns."""

    version: int
    manifest: Manifest
    chunks: tuple[WeightChunk, ...]
    sentinel: Sentinel


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """One version of the student: all its chunks, in the order of the manifest.

    `digest` covers the manifest and the digests of the chunks (`weight_sync.receiver.digest_of`), so it names the
    content: two versions with the same bytes, cut alike, have the same one.
    """

    version: int
    manifest: Manifest
    chunks: tuple[WeightChunk, ...]
    digest: str
    sentinel: Sentinel


Fill = Callable[[np.ndarray | Tensor], None]


class WeightSender(Protocol):
    """Sending side of a transport: it holds a learner rank's chunks for receivers to fetch."""

    def put(self, turn: int, number: int, nbytes: int, fill: Fill) -> Any:
        """The handle of `nbytes` bytes, which `fill` writes into what it is given: an array of host memory, or a tensor
        where the model is.

        `turn` counts publications, `number` chunks. What was put stays readable until the second turn after it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAck:
    """Acknowledgement of an engine that it samples with exactly these weights; `gap`: see `PublishReport`."""

    version: int
    digest: str
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """Outcome of a publication, after all engines have acknowledged it.

    `gap` is the largest |engine - learner| logprob on the sentinel over all engines (nats); `digest` names what was
    published, and what the engines' completions must name (`opd.loop.staleness.unknown_weights`).
    """

    version: int
    gap: float
    nbytes: int
    digest: str = ""


class WeightObserver(Protocol):
    """Anything beside the rollout engines that receives versions: a teacher that follows the student, a measure."""

    async def receive(self, weights: PublishedWeights) -> None:
        """Receive a version; versions come in order, each before an engine samples with it, and the step waits.

        The chunks can be fetched until the second version after this one comes. Where the learner was lost meanwhile,
        the same version may come again.
        """
        ...
