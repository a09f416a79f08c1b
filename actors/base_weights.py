"""Checkpoint an engine was started from, as the matrices that published adapters are added to."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf.folder import read_headers
from hf.single_tensor import read_tensor
from opd.errors import DataError
from weight_sync.lora import pairs, with_adapters
from weight_sync.receiver import ReceivedWeights


class BaseWeights:
    """Reader of the base checkpoint's tensors: the page cache keeps the files, and the engine no second copy.

    `fused` are the runs of layers that the engine's model keeps as one, as in `{"qkv_proj": ["q_proj", ...]}`: they can
    only be loaded together.
    """

    def __init__(self, folder: Path, fused: Mapping[str, Sequence[str]]) -> None:
        self._fused = fused
        self._stored = read_headers(str(folder), "student")

    def tensors(self, delivered: ReceivedWeights, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the layers that the delivered adapters touch, merged on `device`.

        Raises:
            DataError: there are no such layers here, or other shapes.
        """
        adapters = pairs((name, value.to(device)) for name, value in delivered.tensors())
        unknown = sorted(layer for layer in adapters if f"{layer}.weight" not in self._stored)
        if unknown:
            raise DataError(
                f"{len(unknown)} adapters are for layers that the engine's checkpoint does not have, the first is "
                f"{unknown[0]}; give learner and engine the same student.path"
            )
        layers = {sibling for layer in adapters for sibling in self._siblings(layer)}
        yield from with_adapters(self._read(layers), adapters, delivered.manifest.lora_scale)

    def _siblings(self, layer: str) -> Iterator[str]:
        parent, _, own = layer.rpartition(".")
        yield layer
        for together in self._fused.values():
            if own in together:
                yield from (f"{parent}.{other}" for other in together)

    def _read(self, layers: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name, stored in self._stored.items():
            if name.rpartition(".")[0] in layers:
                yield name, read_tensor(name, stored)
