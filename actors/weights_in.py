"""New weights enter a vLLM worker: one flat byte buffer, checked as a whole, loaded layer by layer.

vLLM imports this module in every worker (it is named by `worker_extension_cls`), also in worker processes of
tensor-parallel engines, and the import is what registers the transfer backend there.
"""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd.errors import DataError
from opd.manifest import unpack
from opd.ports import Manifest

BACKEND = "opd-buffer"
EXTENSION = f"{__name__}.WorkerExtension"

# A buffer from an object store is read-only, and it is only read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def transfer(manifest: Manifest, buffer: torch.Tensor) -> dict[str, Any]:
    """What `update_weights` of vLLM's worker is given."""
    return {"manifest": manifest, "buffer": buffer}


@dataclass
class BufferInit(WeightTransferInitInfo):
    """Nothing needs to be agreed on beforehand."""


@dataclass
class BufferUpdate(WeightTransferUpdateInfo):
    """All parameters of one version: `buffer` holds them one after the other, uint8 `[nbytes]`."""

    manifest: Manifest = field(default_factory=lambda: Manifest(names=(), dtypes=(), shapes=(), nbytes=0))
    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every parameter, as views."""
        yield from unpack(self.manifest, self.buffer)


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
