"""The page of every setting is what the dataclasses say, and has all that `--help` finds."""

import runpy

from launch.config.compose import compose
from launch.config.keys import keys
from tests.command import ROOT


def test_the_page_is_what_the_dataclasses_say() -> None:
    source = runpy.run_path(str(ROOT / "scripts/settings_reference.py"))
    written = source["PAGE"].read_text()
    assert written == source["page"](), "run: python scripts/settings_reference.py"
    of_the_run = [key.name for key in keys(compose(source["CHOSEN"]))]
    elsewhere = ("method.", "graders.", "evaluation.prompts.")  # parts, and the prompts once more
    assert not [name for name in of_the_run if not name.startswith(elsewhere) and f"| `{name}`" not in written]
    without_a_line = [line for line in written.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert len(without_a_line) < 8, without_a_line
    assert "number from 1e-12 to 1 (Adam moves" in written, "ranges, and why"
