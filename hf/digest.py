"""Digests of model folders and files, by which a model is known."""

from pathlib import Path

import xxhash

_PIECE = 16 << 20


def model_digest(path: str) -> str:
    """xxh3-128 (hex) over the safetensors in `path`, by name; "" if there are none."""
    files = sorted(Path(path).glob("*.safetensors"))
    hasher = xxhash.xxh3_128()
    for file in files:
        hasher.update(f"{file.name}:{file.stat().st_size};".encode())
        _feed(hasher, file)
    return hasher.hexdigest() if files else ""


def file_digest(path: Path) -> str:
    """xxh3-128 (hex) of one file."""
    hasher = xxhash.xxh3_128()
    _feed(hasher, path)
    return hasher.hexdigest()


def _feed(hasher: xxhash.xxh3_128, path: Path) -> None:
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            hasher.update(piece)
