"""Bytes of a run in Ray's object store, against what this machine has for it."""

import os
import shutil
from pathlib import Path

from launch.config.run_config import RunConfig
from launch.plan.checks.numbers import part_dtype
from launch.plan.memory.parts import GIB
from launch.plan.memory.shapes import read_shape
from launch.services.weight_transports import transport_of
from learner.config import Transport
from opd.ports import LastHidden
from opd.settings.devices import Dtype
from opd.settings.validation import walk

SHARED = Path("/dev/shm")
_SHARE = 0.3  # of the machine's memory: Ray's own proportion (`DEFAULT_OBJECT_STORE_MEMORY_PROPORTION`)


def texts_of_step(config: RunConfig) -> int:
    """Texts of one step, as far as the settings of a prompt source say it; 1 where they do not."""
    sizes: dict[str, dict[str, int]] = {}
    for name, _, value in walk(config.prompts, "prompts"):
        where, _, field = name.rpartition(".")
        if field in ("prompts_per_step", "group_size") and isinstance(value, int):
            sizes.setdefault(where, {})[field] = value
    return max((s.get("prompts_per_step", 1) * s.get("group_size", 1) for s in sizes.values()), default=1)


def hidden_bytes(config: RunConfig) -> int:
    """Most bytes of hidden states that teachers send for one step; 0 where the method reads none."""
    if LastHidden not in config.method.requires:
        return 0
    widths = [
        read_shape(teacher.path).width * (2 if part_dtype(teacher) is Dtype.BFLOAT16 else 4)
        for teacher in config.teachers.values()
    ]
    return texts_of_step(config) * config.max_tokens * max(widths, default=0)


def published_bytes(config: RunConfig) -> int:
    """Bytes of the two versions that wait in the store, if weights travel that way; adapters count as none."""
    if transport_of(config) is not Transport.OBJECT_STORE or config.learner.lora.r:
        return 0
    width = 2 if config.learner.dtype is Dtype.BFLOAT16 else 4
    return 2 * width * read_shape(config.student.path).parameters


def capacity() -> int:
    """Bytes that Ray keeps in memory on this machine: the smaller of its share and /dev/shm."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = shutil.disk_usage(SHARED).total if SHARED.is_dir() else 0
    return int(min(_SHARE * total, shared))


def store_notes(config: RunConfig, room: int) -> list[str]:
    """Note on what does not fit `room` bytes of the object store; of machines that are joined nothing is known."""
    hidden, published = (1 + config.max_staleness) * hidden_bytes(config), published_bytes(config)
    if config.cluster.address != "local" or hidden + published <= room:
        return []
    parts = {f"hidden states of {1 + config.max_staleness} steps": hidden, "published weights": published}
    of = " and ".join(f"{size / GIB:.1f} GiB of {what}" for what, size in parts.items() if size)
    ways = ["give the container more /dev/shm (docker run --shm-size)"]
    ways += ["ask for fewer or shorter texts a step, or choose a top-k method"] if hidden else []
    return [
        f"note: up to {of} wait in Ray's object store, which has {room / GIB:.1f} GiB here (three tenths of memory, at "
        f"most /dev/shm) and puts the rest on the disk; {', or '.join(ways)}"
    ]
