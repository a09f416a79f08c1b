"""Packages and devices of this machine, and how fast it moves and multiplies numbers."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from packaging.requirements import Requirement

from launch.cli.selftest.rows import Outcome, Row
from launch.plan.environment import environment_lines

_BYTES = 256 << 20  # of a copy: more than any cache
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
_ROUNDS = 5


def packages() -> list[Row]:
    """Check of installed packages against the versions that this project works with."""
    wrong = list(_unmet(requires("opd") or ()))
    if not wrong:
        return [Row(check="packages", name="versions", outcome=Outcome.PASS)]
    return [
        Row(check="packages", name=name, outcome=Outcome.FAIL, figure=has, limit=needs) for name, has, needs in wrong
    ]


def _unmet(requirements: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, what is installed, what is needed) of every requirement that is not met."""
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield requirement.name, "missing", str(requirement.specifier)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield requirement.name, found, str(requirement.specifier)


def devices() -> list[Row]:
    """Lines of `opd env`, a row each; what a run would lack is a failure."""
    return [
        Row(
            check="devices", name=line, outcome=Outcome.FAIL if lacks else Outcome.PASS, said=lacks and f"needs {lacks}"
        )
        for line, lacks in environment_lines()
    ]


def bandwidths() -> list[Row]:
    """Copies, products of matrices and files: figures to read other figures by, without limits."""
    rows = [_rate("copy in host memory", _copy("cpu", "cpu"), 2 * _BYTES, "GB/s")]
    rows += [_rate(f"write to {name}", _write(folder), _BYTES, "GB/s") for name, folder in _folders()]
    places = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    for place in places:
        side = _SIDE[place.split(":")[0]]
        for dtype in (torch.float32, torch.bfloat16):
            name = f"product on {place}, {str(dtype).removeprefix('torch.')}"
            rows.append(_rate(name, _product(place, side, dtype), 2 * side**3, "GFLOP/s"))
    for gpu in places[1:]:
        rows.append(_rate(f"host to {gpu}", _copy("cpu", gpu), _BYTES, "GB/s"))
        rows.append(_rate(f"{gpu} to host", _copy(gpu, "cpu"), _BYTES, "GB/s"))
        rows.append(_rate(f"copy on {gpu}", _copy(gpu, gpu), 2 * _BYTES, "GB/s"))
    rows += [_rate(f"{a} to {b}", _copy(a, b), _BYTES, "GB/s") for a, b in pairwise(places[1:])]
    if len(places) == 1:
        rows.append(Row(check="speed", name="GPU", outcome=Outcome.NOT_HERE, said="torch sees none"))
    return rows


def _folders() -> Iterator[tuple[str, Path]]:
    yield "the current folder", Path.cwd()
    if Path("/dev/shm").is_dir():
        yield "/dev/shm", Path("/dev/shm")


def _rate(name: str, work: Callable[[], None], amount: float, unit: str) -> Row:
    """Median of some rounds; the first one, which is warm-up, left out. What cannot be done here fails with why."""
    try:
        work()
        seconds = median(_timed(work) for _ in range(_ROUNDS))
    except (RuntimeError, OSError) as error:
        return Row(check="speed", name=name, outcome=Outcome.FAIL, said=str(error).splitlines()[0])
    return Row(check="speed", name=name, outcome=Outcome.MEASURED, figure=f"{amount / seconds / 1e9:,.1f} {unit}")


def _timed(work: Callable[[], None]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _copy(source: str, target: str) -> Callable[[], None]:
    def copy() -> None:
        there.copy_(here, non_blocking=True)
        for place in {source, target} - {"cpu"}:
            torch.cuda.synchronize(place)

    pinned = "cuda" in source + target
    here, there = (_bytes(place, pinned=pinned and place == "cpu") for place in (source, target))
    return copy


def _bytes(place: str, *, pinned: bool) -> torch.Tensor:
    return torch.zeros(_BYTES, dtype=torch.uint8, device=place, pin_memory=pinned)


def _product(place: str, side: int, dtype: torch.dtype) -> Callable[[], None]:
    def multiply() -> None:
        torch.mm(a, a, out=b)
        if a.is_cuda:
            torch.cuda.synchronize(place)

    a, b = (torch.ones(side, side, dtype=dtype, device=place) for _ in range(2))
    return multiply


def _write(folder: Path) -> Callable[[], None]:
    def write() -> None:
        if shutil.disk_usage(folder).free < 2 * _BYTES:
            raise OSError(f"{folder} has less than {2 * _BYTES >> 20} MiB free")
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: a copy of this folder must not see it
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    content = bytes(_BYTES)
    return write
