"""A processor of other instructions than this machine's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.plan import environment


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives the plan a processor with other instructions than this machine's."""

    def has(flags: str) -> None:
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} ht\n\nprocessor\t: 1\nflags\t\t: fpu {flags} ht\n")
        monkeypatch.setattr(environment, "_PROCESSOR", file)

    return has
