"""Pinning of docker/'s base images by digest: a later build starts from the same images as today's.

    python scripts/pin_images.py [docker/cpu.Dockerfile ...]

Asks the registry through `docker buildx imagetools inspect` (needs docker, and the network), and rewrites the FROM
lines; an image that has a digest already gets the present one. Run it again to take in security fixes.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FROM = re.compile(r"^(FROM )(\S+?)(@sha256:[0-9a-f]{64})?(?=\s|$)", re.MULTILINE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
DEADLINE_S = 60


def pinned(dockerfile: str, digest_of: Callable[[str], str]) -> str:
    """The text with every base image at its digest."""
    return _FROM.sub(lambda found: f"{found[1]}{found[2]}@{digest_of(found[2])}", dockerfile)


def digest(image: str) -> str:
    """Current digest of this name in the registry. Raises `SystemExit` with a sentence if the query fails."""
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{.Manifest.Digest}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"{image} was not looked up ({error}); nothing was changed") from error
    if not _DIGEST.fullmatch(done.stdout.strip()):
        why = (done.stderr.strip().splitlines() or ["no digest came back"])[-1]
        raise SystemExit(f"{image} was not looked up ({why}); nothing was changed")
    return done.stdout.strip()


def main(arguments: Sequence[str]) -> int:
    """Look up all images first, then write."""
    files = [Path(name) for name in arguments] or sorted((ROOT / "docker").glob("*.Dockerfile"))
    new = {file: pinned(file.read_text(), digest) for file in files}
    for file, text in new.items():
        file.write_text(text)
        print("\n".join(line for line in text.splitlines() if line.startswith("FROM ")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
