"""Weights pulled from a learner's memory: between real processes, over gloo, the CPU twin of NCCL.

On machines with two GPUs the same histories run over NCCL (`pytest -m gpu`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from learner.publishing import Publisher
from opd.deadlines import repeated
from opd.errors import DataError, OpdError
from opd.ports import Manifest, PublishedWeights, Sentinel, WeightChunk, WeightShard
from weight_sync.nccl import PullBackend, PullHandle, PullSender, _pass, pull
from weight_sync.receiver import ReceivedWeights, assemble, collect

ROOT = Path(__file__).resolve().parents[3]
SENTINEL = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
ON_TWO_GPUS = pytest.param(
    PullBackend.NCCL,
    marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per process")],
)
# A learner in a process of its own: publishes model(seed) as a version whenever it is told a seed.
LEARNER = """
import sys
from tests.unit.weight_sync.test_nccl import Source
source = Source(sys.argv[1], float(sys.argv[2]))
for line in sys.stdin:
    print(source.publish(int(line)), flush=True)
"""


def model(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(50, 40), (40,), (), (30, 7)]
    kinds = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    return {
        f"p{i}": torch.randn(s, generator=generator).to(k) for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))
    }


class Source:
    """A learner rank that holds `model(seed)`; what it publishes can be written down as JSON."""

    def __init__(self, wire: str, deadline_s: float) -> None:
        device = "cuda:1" if PullBackend(wire) is PullBackend.NCCL else "cpu"
        if device != "cpu":
            torch.cuda.set_device(device)
        first = model(0)
        self.device = device
        self.publisher = Publisher(
            list(first),
            [tuple(t.shape) for t in first.values()],
            [t.dtype for t in first.values()],
            chunk_bytes=2000,
            rank=0,
            ranks=1,
            sender=PullSender(PullBackend(wire), deadline_s),
        )

    def publish(self, seed: int) -> str:
        values = model(seed)
        ordered = [values[name].to(self.device) for name in self.publisher.manifest.names]
        chunks = self.publisher.chunks(lambda first, last: nullcontext(ordered[first:last]))
        plain = [asdict(replace(c, handle=None)) | {"handle": asdict(c.handle)} for c in chunks]
        return json.dumps({"version": seed, "manifest": asdict(self.publisher.manifest), "chunks": plain}, default=str)


def announced(text: str) -> PublishedWeights:
    said = json.loads(text)
    manifest = said["manifest"]
    shapes = tuple(tuple(shape) for shape in manifest["shapes"])
    chunks = [
        WeightChunk(
            **(
                chunk
                | {"handle": PullHandle(**(chunk["handle"] | {"wire": PullBackend[chunk["handle"]["wire"][12:]]}))}
            )
        )
        for chunk in said["chunks"]
    ]
    return assemble(
        [
            WeightShard(
                version=said["version"],
                manifest=Manifest(
                    names=tuple(manifest["names"]),
                    dtypes=tuple(manifest["dtypes"]),
                    shapes=shapes,
                    nbytes=manifest["nbytes"],
                ),
                chunks=tuple(chunks),
                sentinel=SENTINEL,
            )
        ]
    )


class Learner:
    """A `Source` in another process."""

    def __init__(self, wire: PullBackend, deadline_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEARNER, wire.value, str(deadline_s)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def publish(self, seed: int) -> PublishedWeights:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return announced(self.process.stdout.readline())


@contextmanager
def learner(wire: PullBackend = PullBackend.GLOO, deadline_s: float = 60.0) -> Iterator[Learner]:
    made = Learner(wire, deadline_s)
    try:
        yield made
    finally:
        made.process.send_signal(signal.SIGCONT)
        made.process.kill()
        made.process.wait()


def pulled_in_the_end(handle: Any) -> torch.Tensor:
    """What is pulled, with an attempt of its own for each deadline that passes on a machine with much else to do."""
    return repeated(lambda: pull(handle), lambda error: "did not come" in str(error), 60.0, 0.0)


def holds(delivered: ReceivedWeights, seed: int) -> bool:
    values = dict(delivered.tensors())
    return values.keys() == model(seed).keys() and all(torch.equal(values[n].cpu(), t) for n, t in model(seed).items())


@pytest.mark.parametrize("wire", [PullBackend.GLOO, ON_TWO_GPUS])
def test_what_is_published_arrives_in_another_process_and_the_last_two_turns_stay(wire: PullBackend) -> None:
    with learner(wire) as other:
        first, second = other.publish(1), other.publish(2)
        assert len(first.chunks) > 2 and all(chunk.digest.startswith("sum64:") for chunk in first.chunks)
        for _ in range(2):  # asking again is allowed
            assert holds(collect(first, pull, "a test"), 1)
        assert holds(collect(second, pull, "a test"), 2)
        third = other.publish(3)
        assert holds(collect(third, pull, "a test"), 3) and holds(collect(second, pull, "a test"), 2)
        with pytest.raises(DataError, match="of publication 1 is not with the learner any more; publish again"):
            collect(first, pull, "a test")


@pytest.mark.parametrize("wire", [PullBackend.GLOO, ON_TWO_GPUS])
def test_bytes_that_are_not_those_announced_are_refused(wire: PullBackend) -> None:
    with learner(wire) as other:
        weights = other.publish(1)
        wrong = replace(weights.chunks[0], handle=weights.chunks[1].handle)
        forged = replace(weights, chunks=(wrong, *weights.chunks[1:]))
        if wrong.nbytes == weights.chunks[1].nbytes:
            pytest.fail("the chunks should differ in size")
        with pytest.raises(DataError, match="bytes, but"):
            collect(forged, pull, "a test")

        def damaged(handle: Any) -> torch.Tensor:
            data = pull(handle)
            data[len(data) // 2] ^= 4
            return data

        with pytest.raises(DataError, match=r"the digest of chunk \d is sum64:.*, not sum64:.* damaged on the way"):
            collect(weights, damaged, "a test")


@pytest.mark.parametrize("fresh", [True, False])
def test_a_receiver_lets_the_memory_s_last_owner_finish_and_a_sender_does_not_wait_for_training(
    fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's allocator hands out memory whose kernels are still queued on the stream that asks. Streams are words."""
    done: list[str] = []

    class Side:
        def __init__(self, device: torch.device) -> None:
            """Of this device."""

        def wait_stream(self, other: str) -> None:
            done.append(f"after {other}")

        def synchronize(self) -> None:
            done.append("arrived")

    class Group:
        def broadcast(self, rooms: list[Any], options: Any) -> Any:
            done.append("broadcast")
            return SimpleNamespace(wait=lambda deadline: True)

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "Stream", Side)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the engine's")
    _pass(Group(), torch.zeros(8, dtype=torch.uint8).as_subclass(OnGpu), 1.0, fresh=fresh)
    assert done == [*(["after the engine's"] if fresh else []), "broadcast", "arrived"]


def test_a_learner_that_dies_is_told_at_once_and_its_successor_is_found() -> None:
    with learner() as other, learner() as next_one:
        weights = other.publish(1)
        assert holds(collect(weights, pull, "a test"), 1)
        other.process.kill()
        other.process.wait()
        with pytest.raises(OpdError, match=r"did not come from the learner rank at .* look at its log"):
            collect(weights, pull, "a test")
        assert holds(collect(next_one.publish(5), pull, "a test"), 5)


@pytest.mark.parametrize("linked", [False, True], ids=["before the first chunk", "later"])
def test_a_learner_that_hangs_is_waited_for_until_the_deadline_and_no_longer(linked: bool) -> None:
    with learner(deadline_s=3.0) as other:
        weights = other.publish(1)
        if linked:
            collect(weights, pulled_in_the_end, "a test")
        other.process.send_signal(signal.SIGSTOP)
        with pytest.raises(OpdError, match=r"did not come .* within 3 s .*raise learner\.deadline_s"):
            collect(weights, pull, "a test")
        other.process.send_signal(signal.SIGCONT)
        assert holds(collect(weights, pulled_in_the_end, "a test"), 1), "the link that failed is not used again"


def test_strangers_and_the_dead_do_not_keep_others_from_their_weights() -> None:
    shelf = PullSender(PullBackend.GLOO, deadline_s=2.0)
    content = torch.arange(200, dtype=torch.uint8)
    handle = shelf.put(1, 0, 200, lambda room: torch.as_tensor(room).copy_(content))
    assert "token" not in repr(handle)
    with pytest.raises(OpdError, match="did not come"):
        pull(replace(handle, token="guessed"))
    where = (handle.host, handle.port)
    with socket.create_connection(where) as silent, socket.create_connection(where) as leaving:
        leaving.sendall(json.dumps({"token": handle.token}).encode() + b"\n")  # and never joins the group
        answers: list[torch.Tensor] = []
        threads = [threading.Thread(target=lambda: answers.append(pulled_in_the_end(handle))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert len(answers) == 3 and all(torch.equal(answer, content) for answer in answers)
        del silent
    shelf.close()
