"""New weights enter a vLLM worker: one flat byte buffer, checked as a whole, loaded layer by layer.

vLLM imports this module in every worker (it is named by `worker_extension_cls`), also in worker processes of
tensor-parallel engines, and the import is what registers the transfer backend there.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd.errors import DataError
from opd.ports import Manifest, Weights

BACKEND = "opd-buffer"
EXTENSION = f"{__name__}.WorkerExtension"

# A buffer from an object store is read-only, and it is only read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def checked(weights: Weights, array: np.ndarray) -> torch.Tensor:
    """The buffer as a uint8 tensor `[nbytes]`, once it is certain to be what the learner sent.

    Raises `DataError` before anything is loaded: wrong length, wrong digest, or a manifest that does not add
    up.
    """
    who = f"student engine refuses weights version {weights.version} and keeps its own"
    buffer = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if buffer.nbytes != weights.manifest.nbytes:
        raise DataError(
            f"{who}: the manifest says {weights.manifest.nbytes} bytes, but {buffer.nbytes} came; publish again"
        )
    expected = sum(_nbytes(*entry) for entry in zip(weights.manifest.dtypes, weights.manifest.shapes, strict=True))
    if expected != weights.manifest.nbytes or len(weights.manifest.names) != len(weights.manifest.shapes):
        raise DataError(
            f"{who}: its manifest lists {len(weights.manifest.names)} tensors of {expected} bytes but says "
            f"{weights.manifest.nbytes}; check how the learner packs its parameters"
        )
    digest = xxhash.xxh3_64_hexdigest(buffer.data)
    if digest != weights.digest:
        raise DataError(
            f"{who}: the buffer's xxh3_64 is {digest}, not {weights.digest} as sent; it was damaged on the "
            "way, publish again"
        )
    return torch.from_numpy(buffer)


def transfer(manifest: Manifest, buffer: torch.Tensor) -> dict[str, Any]:
    """What `update_weights` of vLLM's worker is given."""
    return {"names": manifest.names, "dtypes": manifest.dtypes, "shapes": manifest.shapes, "buffer": buffer}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"a weights manifest names the dtype {name!r}, which torch does not have; check the learner")
    return dtype


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * _dtype(dtype).itemsize


@dataclass
class BufferInit(WeightTransferInitInfo):
    """Nothing needs to be agreed on beforehand."""


@dataclass
class BufferUpdate(WeightTransferUpdateInfo):
    """All parameters of one version: `buffer` holds them one after the other, uint8 `[nbytes]`."""

    names: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    shapes: Sequence[Sequence[int]] = ()
    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every parameter, as views."""
        start = 0
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            wide = _dtype(dtype)
            stop = start + _nbytes(dtype, shape)
            part = self.buffer[start:stop]
            if start % wide.itemsize:  # mixed dtypes: this one does not begin where its words could
                part = part.clone()
            yield name, part.view(wide).view(*shape)
            start = stop


class BufferTransfer(WeightTransferEngine[BufferInit, BufferUpdate]):
    """Loads a buffer into this worker's model through the model's own checkpoint loader."""

    init_info_cls = BufferInit
    update_info_cls = BufferUpdate

    def init_transfer_engine(self, init_info: BufferInit) -> None:
        """Nothing to agree on; quiet a warning about every layer that a checkpoint has no tensors for.

        (Rotary tables, tied heads; `receive_weights` raises where something is really missing.) Not at
        import, because vLLM sets up its logging later.
        """
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def start_weight_update(self) -> None:
        """Put the layers into loading state; on CPUs they run from packed copies that must be made anew."""
        # Asked before: in loading state a tied head is a parameter of its own, which no checkpoint has.
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BufferUpdate) -> None:
        """Load every parameter. Raises `DataError` if the model has parameters that did not come."""
        try:
            load: Any = self.model.load_weights
            loaded = load(update_info.tensors())
        except BaseException:
            # Leave no layer in loading state: the next update would take it for half done and mix versions.
            finalize_layerwise_reload(self.model, self.model_config)
            raise
        missing = sorted(self._expected - set(loaded)) if loaded is not None else []
        if missing:
            finalize_layerwise_reload(self.model, self.model_config)
            raise DataError(f"{len(missing)} parameters of the engine's model did not come, the first is {missing[0]}")

    def finish_weight_update(self) -> None:
        """Make the loaded weights what the layers compute with."""
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A tied output head gets no weights of its own, so the reload leaves its packed copy (CPU) stale.
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to release."""


class WorkerExtension:
    """Adds nothing to a worker; naming it makes the worker import this module."""


WeightTransferEngineFactory.register_engine(BACKEND, BufferTransfer)
