"""Sleep of a vLLM worker on a CPU, where vLLM has no sleep mode of its own.

vLLM imports this module in every worker (it is named by `worker_extension_cls`), also in the processes of
tensor-parallel engines, so it imports nothing of an engine's.
"""

from typing import Any

from opd.errors import DataError
from weight_sync.parking import Parked, discard, park, tensors_in, trim

EXTENSION = f"{__name__}.ParkedWorker"


class ParkedWorker:
    """Verbs that a worker gets beside vLLM's own: its memory is given up and taken back."""

    model_runner: Any
    _parked: Parked | None = None

    def park_memory(self, keep: bool) -> None:
        """Give up a CPU worker's caches, and its weights: until `unpark_memory`, or for ever unless `keep`.

        Packed copies of weights, from which vLLM's CPU kernels compute, belong to those kernels: they cannot be parked,
        and are given up with the weights alone.
        """
        model = self.model_runner.model
        discard(tensors_in(self.model_runner.kv_caches))
        if keep:
            self._parked = park([*model.parameters(), *model.buffers()])
        else:
            discard(model.parameters())
            for module in model.modules():
                if hasattr(module, "cpu_linear"):
                    module.cpu_linear = _given_up
        trim()

    def unpark_memory(self) -> None:
        """Take back what was kept."""
        if self._parked is not None:
            self._parked.unpark()
            self._parked = None


def _given_up(*_: Any) -> None:
    raise DataError("the student engine gave its weights up when it fell asleep, and none came since; publish again")
