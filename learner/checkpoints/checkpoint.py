"""Checkpoint files of the learner: one safetensors file per rank, readable by any number of ranks and any ZeRO stage.

A file holds pieces of the flattened float32 master weights and of Adam's two moments, under the name
`<key>/<start>/<parameter>`, and those of snapshots under `<key>@<snapshot>/<start>/<parameter>`; the pieces of all
files together cover every parameter. No pickle is written or read.
Also here: how directories and files come into being whole or not at all.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opd.errors import ConfigurationError, DataError, OpdError
from opd.settings.validation import shown

FORMAT = "opd learner shard 2"
MASTER, KEYS = "master", ("master", "exp_avg", "exp_avg_sq")
RANDOM = "random"
SNAPSHOT_NAME = r"[A-Za-z0-9._-]{1,64}"
_PIECE = 16 << 20
_ANOTHER = "it is foreign, take another checkpoint"
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Metadata of a checkpoint's file.

    `updates` is the place in the schedule, `model` a digest of names, shapes and dtypes, `skipped`
    the number of updates in a row that were skipped just before, `device` whose random state it has, and `snapshots`
    has the place in the schedule of each snapshot by name (None: without the optimizer).
    """

    step: int
    updates: int
    skipped: int
    rank: int
    ranks: int
    zero_stage: int
    model: str
    device: str
    snapshots: dict = field(default_factory=dict)  # files from before there were any do not say


def shard_name(rank: int) -> str:
    """The file of a rank. Example: `rank_0.safetensors`."""
    return f"rank_{rank}.safetensors"


def piece_name(key: str, start: int, parameter: str) -> str:
    """The tensor's name within a file. Example: `exp_avg/4096/model.norm.weight`."""
    return f"{key}/{start}/{parameter}"


def snapshot_keys(updates: int | None) -> tuple[str, ...]:
    """Keys of a snapshot's tensors per parameter, by its place in the schedule (None: without the optimizer)."""
    return (MASTER,) if updates is None else KEYS


def snapshot_key(key: str, snapshot: str) -> str:
    """The key of a snapshot's pieces. Example: `exp_avg@start`."""
    return f"{key}@{snapshot}"


def write_shard(path: Path, tensors: Mapping[str, Tensor], facts: Facts) -> str:
    """Write host tensors as safetensors, flushed to the disk; returns the file's xxh3_128 (hexadecimal).

    Written piece by piece, so that a training thread gets its turn, and digested from memory: a disk that keeps
    something else is found out when the checkpoint is read.

    Raises:
        OpdError: the disk is full or cannot be written; one sentence.
    """
    hasher = xxhash.xxh3_128()
    try:
        with path.open("wb", buffering=0) as file:
            for data in _serialized(tensors, facts):
                hasher.update(data)
                written = 0
                while written < len(data):  # a nearly full disk takes less than it is given
                    written += file.write(data[written:]) or 0
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error
    return hasher.hexdigest()


def _serialized(tensors: Mapping[str, Tensor], facts: Facts) -> Iterable[memoryview]:
    header: dict[str, object] = {"__metadata__": {"format": FORMAT, "facts": json.dumps(asdict(facts))}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        for begin in range(0, len(data), _PIECE):
            yield data[begin : begin + _PIECE]


class ShardWriter:
    """Writer of a rank's file in a background thread, one file at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[tuple[str, str]] | None = None

    def begin(self, path: Path, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Start; the tensors must not change any more."""

        def work() -> tuple[str, str]:
            return path.name, write_shard(path, tensors, facts)

        self._running = self._pool.submit(work)

    def finish(self, deadline_s: float) -> tuple[str, str]:
        """Name and digest of the file begun last, once it is on the disk. Raises what went wrong."""
        if self._running is None:
            raise OpdError("no checkpoint was begun, so none can be waited for; call save(...) first")
        try:
            return self._running.result(deadline_s)
        except TimeoutError as error:
            raise OpdError(
                f"a checkpoint was not on the disk within {deadline_s:.0f} s; choose a faster disk for output_dir, or "
                "raise learner.deadline_s"
            ) from error

    def close(self) -> None:
        """End the thread, after the file it is at."""
        self._pool.shutdown()


class Shards:
    """All files of a checkpoint, for reading any part of any parameter.

    Raises:
        DataError: a file is missing, foreign or cut off, or files of different checkpoints lie together.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        first, _ = _opened(directory / shard_name(0))
        opened = [_opened(directory / shard_name(rank)) for rank in range(first.ranks)]
        self.facts: Sequence[Facts] = [facts for facts, _ in opened]
        for rank, facts in enumerate(self.facts):
            if (facts.rank, facts.ranks, facts.step, facts.model) != (rank, first.ranks, first.step, first.model):
                raise DataError(
                    f"{directory / shard_name(rank)} is rank {facts.rank} of {facts.ranks} at step {facts.step}, but "
                    f"rank {rank} of {first.ranks} at step {first.step} belongs there; take another checkpoint"
                )
        self._files = [file for _, file in opened]
        self._where: dict[tuple[str, str], list[tuple[int, int, int]]] = {}  # pieces: start, stop, rank
        for rank, file in enumerate(self._files):
            for name in file.keys():  # noqa: SIM118 (no mapping)
                key, _, rest = name.partition("/")
                start, _, parameter = rest.partition("/")
                if key.partition("@")[0] in KEYS:
                    if not start.isdecimal() or len(start) > 18 or file.get_slice(name).get_dtype() != "F32":
                        raise DataError(f"{directory / shard_name(rank)} has a piece {name[:60]!r}; {_ANOTHER}")
                    begin = int(start)
                    length = file.get_slice(name).get_shape()[0]
                    self._where.setdefault((key, parameter), []).append((begin, begin + length, rank))

    def read(self, key: str, parameter: str, start: int, stop: int) -> Tensor:
        """Elements `start:stop` of a flattened parameter's float32 `key`.

        Raises:
            DataError: no file has all of them.
        """
        out = torch.empty(stop - start, dtype=torch.float32)
        at = start
        for begin, end, rank in sorted(self._where.get((key, parameter), [])):
            first, last = max(at, begin), min(stop, end)
            if at == first < last:
                piece = self._files[rank].get_slice(piece_name(key, begin, parameter))[first - begin : last - begin]
                out[first - start : last - start] = piece
                at = last
        if at < stop:
            raise DataError(
                f"the checkpoint {self.directory} has {key} of {parameter} only up to element {at} of {stop}; take "
                "another checkpoint"
            )
        return out

    def random_state(self, rank: int, device: str) -> Tensor | None:
        """The generator's state of `rank` on this kind of device, if one was kept."""
        if rank >= len(self.facts) or self.facts[rank].device != device:
            return None
        if RANDOM not in self._files[rank].keys():  # noqa: SIM118 (no mapping)
            raise DataError(f"{self.directory / shard_name(rank)} lacks the state of its generator; {_ANOTHER}")
        return self._files[rank].get_tensor(RANDOM)


def _opened(path: Path) -> tuple[Facts, "safe_open"]:
    if not path.is_file():
        raise DataError(f"the checkpoint {path.parent} lacks {path.name}; it is foreign or was cut off, take another")
    try:
        file = safe_open(str(path), framework="pt")
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}")
        facts = Facts(**json.loads(metadata["facts"]))
        wrong = [f.name for f in fields(Facts) if type(getattr(facts, f.name)) is not f.type]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {shown(getattr(facts, wrong[0]))}")
        if not all(
            re.fullmatch(SNAPSHOT_NAME, name) and (place is None or type(place) is int)
            for name, place in facts.snapshots.items()
        ):
            raise ValueError(f"its snapshots are {shown(facts.snapshots)}")
        if not 0 <= facts.rank < facts.ranks:
            raise ValueError(f"it says rank {facts.rank} of {facts.ranks}")
        return facts, file
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no {FORMAT!r} ({error}); take another checkpoint") from error


def check_model(directory: Path, saved: Facts, model: str) -> None:
    """Refuse a checkpoint of another model; the number of ranks and the ZeRO stage are free."""
    if saved.model != model:
        raise ConfigurationError(
            f"the checkpoint {directory} needs a student with model={saved.model} (names, shapes and dtypes of its "
            f"parameters), but this one has model={model}; set student.path and learner.dtype back"
        )


# ---- whole or not at all ----


def partial(final: Path) -> Path:
    """Temporary path of `final` before its rename: next to it, so that the rename is atomic."""
    return final.with_name(f".{final.name}.partial")


def replaced(final: Path) -> Path:
    """Path of an older `final` while the new one takes its place."""
    return final.with_name(f".{final.name}.old")


def start(final: Path) -> None:
    """Make an empty `partial(final)`, whatever an interrupted run has left there."""
    try:
        shutil.rmtree(partial(final), ignore_errors=True)
        partial(final).mkdir(parents=True)
    except OSError as error:
        raise unwritable(final, error) from error


def commit(final: Path) -> None:
    """Flush the directory and rename `partial(final)` to `final`; an older `final` is moved out of the way first."""
    try:
        for folder in [partial(final), *(p for p in partial(final).rglob("*") if p.is_dir())]:
            flush_directory(folder)
        shutil.rmtree(replaced(final), ignore_errors=True)
        if final.exists():
            final.rename(replaced(final))
        partial(final).rename(final)
        flush_directory(final.parent)
        shutil.rmtree(replaced(final), ignore_errors=True)
    except OSError as error:
        raise unwritable(final, error) from error


def flush_directory(folder: Path) -> None:
    """Make names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError) -> OpdError:
    """Error for a disk that is full, read-only or gone."""
    return OpdError(
        f"cannot write {path}: {error.strerror or error}; the checkpoints before it are intact, make room or choose "
        "another output_dir"
    )


def digest(path: Path) -> str:
    """xxh3_128 of a file, hexadecimal."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_PIECE):
            hasher.update(block)
    return hasher.hexdigest()
