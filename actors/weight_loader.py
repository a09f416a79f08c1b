"""Loading of new weights in a vLLM worker: chunks of bytes, all verified beforehand, loaded layer by layer.

vLLM imports this module in every worker (it is named by `worker_extension_cls`), also in worker processes of
tensor-parallel engines, and the import is what registers the transfer backend there.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from actors.base_weights import BaseWeights
from opd.errors import DataError
from opd.ports import Manifest
from weight_sync.parked_worker import ParkedWorker
from weight_sync.receiver import ReceivedWeights

BACKEND = "opd-chunks"
# vLLM adds this class to its worker's for good, and refuses a second one with the same verbs: teachers and students
# that live in one process name the same. Named by this module, it makes every worker of a student import the module.
EXTENSION = f"{__name__}.{ParkedWorker.__name__}"


def transfer(delivered: ReceivedWeights) -> dict[str, Any]:
    """Request to `update_weights` of vLLM's worker."""
    return {"delivered": delivered}


_NOTHING = ReceivedWeights(
    version=0, digest="", manifest=Manifest(names=(), dtypes=(), shapes=(), nbytes=0), runs=(), buffers=()
)


@dataclass
class ChunksInit(WeightTransferInitInfo):
    """Empty initialization message: nothing needs to be agreed on beforehand."""


@dataclass
class ChunksUpdate(WeightTransferUpdateInfo):
    """All parameters of one version, verified."""

    delivered: ReceivedWeights = field(default_factory=lambda: _NOTHING)


class ChunksTransfer(WeightTransferEngine[ChunksInit, ChunksUpdate]):
    """Loads chunks into this worker's model through the model's own checkpoint loader."""

    init_info_cls = ChunksInit
    update_info_cls = ChunksUpdate
    _checkpoint: BaseWeights | None = None

    @property
    def _student(self) -> Any:
        """The model whose weights are published; a teacher may stand beside it (`actors.blend`)."""
        return getattr(self.model, "student", self.model)

    def init_transfer_engine(self, init_info: ChunksInit) -> None:
        """Quiet a warning about every layer that a checkpoint has no tensors for; there is nothing to agree on.

        (Rotary tables, tied heads; `receive_weights` raises where something is really missing.) Not at
        import, because vLLM sets up its logging later.
        """
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def start_weight_update(self) -> None:
        """Put the layers into loading state; on CPUs they run from packed copies that must be made anew."""
        # Asked before: in loading state a tied head is a parameter of its own, which no checkpoint has.
        self._expected = {name for name, _ in self._student.named_parameters()}
        self._kernels = dict(_expert_kernels(self._student))
        for method in self._kernels:  # on a CPU they pack the experts when they are made, and never again (vLLM 0.32)
            method.moe_kernel = None
        initialize_layerwise_reload(self._student)

    def receive_weights(self, update_info: ChunksUpdate) -> None:
        """Load every parameter, or the layers that adapters touch, merged with the checkpoint's own.

        Raises `DataError` if the model has parameters that did not come.
        """
        delivered = update_info.delivered
        adapters = bool(delivered.manifest.lora_scale)
        try:
            load: Any = self._student.load_weights
            loaded = load(self._base().tensors(delivered, self.device) if adapters else delivered.tensors())
        except BaseException:
            # Leave no layer in loading state: the next update would take it for half done and mix versions.
            self._finalize()
            raise
        missing = sorted(self._expected - set(loaded)) if loaded is not None and not adapters else []
        stale = [] if adapters else sorted(self._untouched())
        if missing or stale:
            self._finalize()
        if missing:
            raise DataError(f"{len(missing)} parameters of the engine's model did not come, the first is {missing[0]}")
        if stale:
            raise DataError(
                f"{len(stale)} parameters of the engine's {type(self._student).__name__} would keep old values, first "
                f"{stale[0]!r} (vLLM loads it past what takes new weights); choose a student of another family"
            )

    def _untouched(self) -> Iterator[str]:
        """Expected parameters of layers that still wait for weights, and have got none for them."""
        for name, layer in self._student.named_modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                own = {f"{name}.{parameter}" for parameter, _ in layer.named_parameters(recurse=False)}
                yield from (own & self._expected) - {f"{name}.{parameter}" for parameter, _ in info.loaded_weights}

    def _base(self) -> BaseWeights:
        if self._checkpoint is None:
            fused = getattr(self._student, "packed_modules_mapping", {})
            self._checkpoint = BaseWeights(Path(self.model_config.model), fused)
        return self._checkpoint

    def finish_weight_update(self) -> None:
        """Finish the update: layers compute with the loaded weights."""
        self._finalize()
        for module in self._student.modules():
            # A tied output head gets no weights of its own, so the reload leaves its packed copy (CPU) stale.
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def _finalize(self) -> None:
        finalize_layerwise_reload(self._student, self.model_config)
        for method, kernel in self._kernels.items():
            method.moe_kernel = method.moe_kernel or kernel  # of experts that got no weights

    def shutdown(self) -> None:
        """Nothing to release."""


def _expert_kernels(model: Any) -> Iterator[tuple[Any, Any]]:
    """The kernels of a model's experts on a CPU, by what makes them (`moe_kernel`)."""
    if current_platform.is_cpu():
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                yield method, method.moe_kernel


WeightTransferEngineFactory.register_engine(BACKEND, ChunksTransfer)
