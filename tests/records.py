"""Everything that is written from the code and compared by a test, written anew: `python -m tests.records`.

Defaults and ranges, the page of settings, layouts of real sizes, figures of memory on the pages, recipes, pictures,
and the page of measured methods. Read the difference before it is committed: it is what a change changes.
"""

import runpy
import subprocess
import tempfile
from pathlib import Path

from tests.command import ROOT


def with_row(page: Path, row: str) -> None:
    """Write `row` of a table in the place of the row with the same first cell.

    Raises:
        ValueError: the page has none, or several.
    """
    start, lines = row[: row.index(" | ") + 3], page.read_text().splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith(start)]
    lines[place] = row
    page.write_text("\n".join(lines) + "\n")


def main() -> None:
    from tests.unit.hub import test_published
    from tests.unit.plan import test_layout, test_one_gpu, test_pages
    from tests.unit.project import test_defaults

    test_defaults.record()
    for script in ("settings_reference", "architecture_svg", "measure_methods"):
        runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
    test_layout.record()
    with tempfile.TemporaryDirectory() as folder:
        test_pages.record(Path(folder))
        test_one_gpu.record(Path(folder))
        test_published.record(Path(folder))
    print(subprocess.run(["git", "diff", "--stat"], cwd=ROOT, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
