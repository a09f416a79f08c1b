"""Which weights an engine keeps when it falls asleep, and which it drops because it can load them again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.sleep import EngineSleep
from opd.errors import ConfigurationError, DataError
from opd.ports import Manifest, PublishedWeights, Sentinel, WeightChunk
from weight_sync.manifest import digest
from weight_sync.receiver import ReceivedWeights


class Engine:
    """A vLLM engine that records what it is told about its memory."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.told.append("wake")

    def reset_prefix_cache(self) -> None:
        self.told.append("no prefixes")

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        self.told.append(f"{method} {(kwargs or {}).get('keep', '')}".strip())


def version(number: int, lora_scale: float = 0.0) -> tuple[PublishedWeights, ReceivedWeights]:
    array = np.full(8, number, np.uint8)
    manifest = Manifest(names=("a",), dtypes=("float32",), shapes=((2,),), nbytes=8, lora_scale=lora_scale)
    sentinel = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
    chunk = WeightChunk(first=0, last=1, nbytes=8, digest=digest(array), owner=0, handle=None)
    sent = PublishedWeights(version=number, manifest=manifest, chunks=(chunk,), digest="d", sentinel=sentinel)
    taken = ReceivedWeights(
        version=number, digest="d", manifest=manifest, runs=((0, 1),), buffers=(torch.from_numpy(array),)
    )
    return sent, taken


def nap(sleep: EngineSleep, engine: Any) -> list[str]:
    """What a sleep and an awakening tell the engine; each is asked for twice and done once."""
    engine.told.clear()
    for _ in range(2):
        sleep.fall(engine)
    with pytest.raises(ConfigurationError, match=r"call wake\(\) before"):
        sleep.check_awake()
    for _ in range(2):
        sleep.end(engine)
    sleep.check_awake()
    return engine.told


def test_weights_that_were_published_whole_are_dropped_and_loaded_again() -> None:
    """On a GPU by vLLM's levels; from the first publication on, and as long as nothing newer was received."""
    sleep, engine = EngineSleep(on_gpu=True, reloads=True), Engine()
    assert nap(sleep, engine) == ["sleep 1", "wake"] and sleep.lacking() is None
    for number in (1, 2):
        sleep.received(*version(number))
        assert sleep.lacking() is None
        for _ in range(2):  # also if it writes nothing in between
            assert nap(sleep, engine) == ["sleep 2", "wake"]
        again = sleep.lacking()
        assert again is not None and again[0].version == number
    sleep.received(*version(3))
    assert sleep.lacking() is None, "what came replaces what was dropped"


def test_on_a_cpu_the_worker_is_told() -> None:
    sleep, engine = EngineSleep(on_gpu=False, reloads=True), Engine()
    assert nap(sleep, engine) == ["no prefixes", "park_memory True", "unpark_memory"]
    sleep.received(*version(1))
    assert nap(sleep, engine) == ["no prefixes", "park_memory False", "unpark_memory"]


@pytest.mark.parametrize(("reloads", "lora_scale"), [(True, 2.0), (False, 0.0)])
def test_what_a_publication_does_not_hold_is_kept(reloads: bool, lora_scale: float) -> None:
    """Of adapters the model that they adapt, of a student with a teacher inside the teacher."""
    sleep, engine = EngineSleep(on_gpu=True, reloads=reloads), Engine()
    sleep.received(*version(1, lora_scale))
    assert nap(sleep, engine) == ["sleep 1", "wake"] and sleep.lacking() is None


def test_weights_that_changed_in_shared_memory_are_not_loaded() -> None:
    sleep, engine = EngineSleep(on_gpu=True, reloads=True), Engine()
    sent, taken = version(1)
    sleep.received(sent, replace(taken, buffers=(taken.buffers[0].clone(),)))
    nap(sleep, engine)
    assert sleep.last is not None
    sleep.last[1].buffers[0][3] = 99
    with pytest.raises(DataError, match="chunk 0 has changed in memory"):
        sleep.lacking()
