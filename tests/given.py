"""An actor that says what it was given, in a module that imports nothing large."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """GPUs, whether dynamo is off (as an engine's is on a CPU), Ray's node, and whether in a placement group."""

    gpus: tuple[str, ...]
    dynamo_off: bool
    node: str
    grouped: bool


class Given:
    """An actor in the place of an engine, a teacher or a rank."""

    async def report(self) -> Report:
        """What its process has."""
        import ray
        from ray.util import get_current_placement_group

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Report(
            gpus=tuple(visible.split(",")) if visible else (),
            dynamo_off=bool(os.environ.get("TORCHDYNAMO_DISABLE")),
            node=ray.get_runtime_context().get_node_id(),
            grouped=get_current_placement_group() is not None,
        )
