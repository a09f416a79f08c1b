"""GPU memory read by another process: what is refused anywhere, and what arrives where there is a GPU."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from opd.errors import DataError
from weight_sync.checksum import checksum
from weight_sync.cuda_ipc import CudaIpcSegment, DeviceBuffers, read_device
from weight_sync.shared_memory import place

ROOT = Path(__file__).resolve().parents[3]
SEGMENT = CudaIpcSegment(
    place=place(),
    pid=1,
    gpu="GPU-of-another",
    nbytes=8,
    handle=b"\0" * 64,
    storage_nbytes=512,
    storage_offset=0,
    counter=b"/torch_1",
    counter_offset=0,
    event=b"\0" * 64,
    event_needed=True,
)
# A learner in a process of its own: publishes its lines' numbers, chunk 0 of turn 1, 2, 3, ...
WRITER = """
import json, sys
from dataclasses import asdict
import torch
from weight_sync.cuda_ipc import CudaIpcSender
outlet = CudaIpcSender()
for turn, line in enumerate(sys.stdin, 1):
    segment = outlet.put(turn, 0, 100_000, lambda room: room.copy_(torch.arange(100_000) * int(line) % 251))
    print(json.dumps({k: v.hex() if isinstance(v, bytes) else v for k, v in asdict(segment).items()}), flush=True)
"""


def test_a_reader_elsewhere_is_refused() -> None:
    with pytest.raises(DataError, match=r"on one machine.*NCCL or OBJECT_STORE"):
        read_device(replace(SEGMENT, place="elsewhere"))
    with pytest.raises(DataError, match=r"on one GPU, but the learner's is GPU-of-another.*NCCL or OBJECT_STORE"):
        read_device(SEGMENT)


def test_a_handle_is_plain_values() -> None:
    assert {type(value) for value in asdict(SEGMENT).values()} == {str, int, bytes, bool}


def test_two_turns_take_turns_in_the_same_memory() -> None:
    rooms = DeviceBuffers(torch.device("cpu"))
    first, second = rooms.room(1, 0, 16), rooms.room(2, 0, 16)
    assert first.data_ptr() != second.data_ptr()
    assert rooms.room(3, 0, 16).data_ptr() == first.data_ptr() != rooms.room(3, 1, 16).data_ptr()
    assert len(rooms.room(4, 0, 24)) == 24


@pytest.mark.gpu
def test_what_is_put_is_read_by_another_process_and_a_dead_learner_is_told() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None

        def put(factor: int) -> CudaIpcSegment:
            writer.stdin.write(f"{factor}\n")
            writer.stdin.flush()
            said = json.loads(writer.stdout.readline())
            return CudaIpcSegment(
                **{k: bytes.fromhex(v) if k in ("handle", "counter", "event") else v for k, v in said.items()}
            )

        for factor in (1, 2, 3, 4):
            expected = (torch.arange(100_000) * factor % 251).to(torch.uint8)
            segment = put(factor)
            view = read_device(segment)
            assert view.is_cuda and checksum(view) == checksum(expected)
        assert read_device(segment).data_ptr() == view.data_ptr(), "opened once"
        del view
        writer.kill()
    with pytest.raises(DataError, match="the learner has ended"):
        read_device(segment)
