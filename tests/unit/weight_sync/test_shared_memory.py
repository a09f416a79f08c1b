"""Shared memory: read where it was written, never by the wrong reader, and gone with the process that wrote."""

import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd.errors import DataError
from tests.processes import open_files
from weight_sync import shared_memory
from weight_sync.shared_memory import SharedMemorySegment, SharedMemorySender, place, read

ROOT = Path(__file__).resolve().parents[3]
WRITER = """
import dataclasses, json, sys
import numpy as np
from weight_sync.shared_memory import SharedMemorySender
fill = lambda room: np.copyto(room, np.arange(100_000) % 251, casting="unsafe")
segment = SharedMemorySender().put(1, 0, 100_000, fill)
print(json.dumps(dataclasses.asdict(segment)), flush=True)
sys.stdin.read()
"""


def put(sender: SharedMemorySender, turn: int, content: bytes) -> SharedMemorySegment:
    return sender.put(turn, 0, len(content), lambda room: np.copyto(room, np.frombuffer(content, np.uint8)))


def test_what_is_put_is_read_and_the_last_two_turns_stay() -> None:
    sender = SharedMemorySender()
    first, second = put(sender, 1, b"one"), put(sender, 2, b"two")
    assert bytes(read(first)) == b"one" and bytes(read(second)) == b"two"
    third = put(sender, 3, b"six")
    assert bytes(read(second)) == b"two" and bytes(read(third)) == b"six"
    assert bytes(read(first)) == b"six", "a turn's memory is used again, which is why digests are checked"
    longer = put(sender, 5, b"longer")
    assert bytes(read(longer)) == b"longer"
    assert bytes(read(put(sender, 6, b""))) == b""
    with pytest.raises(DataError, match=r"not the one that was published|cannot be opened"):
        read(third)
    sender.close()


def test_a_reader_can_change_nothing() -> None:
    sender = SharedMemorySender()
    view = read(put(sender, 1, b"fixed"))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    sender.close()


def test_another_machine_and_another_file_are_refused() -> None:
    sender = SharedMemorySender()
    segment = put(sender, 1, b"here")
    with pytest.raises(DataError, match=r"on one machine.*OBJECT_STORE"):
        read(replace(segment, place="elsewhere"))
    with pytest.raises(DataError, match="not the one that was published"):
        read(replace(segment, inode=segment.inode + 1))
    sender.close()
    with pytest.raises(DataError, match="cannot be opened"):
        read(segment)


def test_nothing_is_left_of_a_learner_that_is_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None

        segment = SharedMemorySegment(**json.loads(writer.stdout.readline()))
        assert segment.pid == writer.pid and segment.place == place()
        held = read(segment)
        writer.send_signal(signal.SIGKILL)
    assert np.array_equal(held, np.arange(100_000) % 251), "what is mapped already stays"
    with pytest.raises(DataError, match="the learner has ended"):
        read(segment)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "opd" in name}


def test_what_is_given_back_is_closed_and_nothing_stays_open_that_is_read() -> None:
    shared_memory._forget_the_dead()

    def opened() -> int:
        """Files of shared memory, and no others: whatever this process has done before may close its own meanwhile."""
        return sum("opd-weights" in place for place in open_files())

    before, sender = opened(), SharedMemorySender()
    segments = [sender.put(turn, number, 8, lambda room: room.fill(1)) for turn in (1, 2) for number in range(3)]
    held = opened()
    assert [sender.put(3, number, 8, lambda room: room.fill(1)) for number in range(3)] == segments[:3]
    assert opened() == held > before
    views = [read(segment) for segment in segments]
    assert opened() <= held + len(segments), "a mapping and the file it was made of"
    held = opened()
    put(sender, 5, b"another size")
    assert opened() == held, "the smaller one is not kept beside it"
    sender.close()
    sender.close()
    assert all(bool((view == 1).all()) for view in views)
    with pytest.raises(DataError, match="cannot be opened"):
        read(segments[0])
    del views
    assert opened() == before


def test_memory_is_mapped_once_and_let_go_when_its_writer_is_gone() -> None:
    """A learner that is started again would double it otherwise."""
    gone, lives = SharedMemorySender(), SharedMemorySender()
    dead, alive = put(gone, 1, b"dead"), put(lives, 1, b"alive")
    views = [read(dead), read(alive)]
    assert all(read(segment) is view for segment, view in zip((dead, alive), views, strict=True))
    held = [weakref.ref(view) for view in views]
    del views
    gone.close()
    newer = put(lives, 2, b"newer")
    assert bytes(read(newer)) == b"newer", "whoever maps anew looks for what is gone, whose descriptor this one has now"
    assert held[0]() is None and held[1]() is read(alive)
    lives.close()
    with pytest.raises(DataError, match="cannot be opened"):
        read(newer)
    assert held[1]() is None, "so does whoever finds nothing"
