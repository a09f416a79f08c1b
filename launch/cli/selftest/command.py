"""`opd selftest`: every check of this machine, a table, and a file to attach to a bug report."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter, strftime

from rich.console import Console

from launch.cli.flags import file_to_write
from launch.cli.selftest.programs import PROGRAMS, rows_of
from launch.cli.selftest.rows import Outcome, Row, table, verdict, write_json
from launch.cli.selftest.short_runs import short_runs
from launch.plan.environment import package_versions
from opd.errors import ConfigurationError

RUNS = "runs"
CHECKS = (*PROGRAMS, RUNS)
_PROGRAM_S, _RUN_S = 120.0, 300.0  # longest wait for one of them


def run_selftest(own: Mapping[str, str], console: Console) -> int:
    """Run the checks that `own` asks for (`only=A,B`, `output=FILE`); 1 if one of them failed.

    Raises:
        ConfigurationError: there is no such check, or the file cannot be written.
    """
    chosen = _chosen(own.get("only", ""))
    output = file_to_write("selftest", own.get("output", "selftest.json"))
    began, rows = perf_counter(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="opd-selftest-") as scratch:
        for name in chosen:
            with console.status(f"{name} ..."):
                rows += _rows(name, Path(scratch))
    console.print(table(rows))
    facts = {
        "made": strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(perf_counter() - began, 1),
        "packages": package_versions(),
    }
    write_json(output, facts, rows)
    took = f"in {perf_counter() - began:.0f} s"
    console.print(f"{verdict(rows)}, {took}; {output} has it for a bug report", soft_wrap=True)
    return int(any(row.outcome is Outcome.FAIL for row in rows))


def _chosen(only: str) -> Sequence[str]:
    names = only.split(",") if only else CHECKS
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise ConfigurationError(f"opd selftest has no check {unknown[0]!r}; only=... takes {', '.join(CHECKS)}")
    return names


def _rows(name: str, scratch: Path) -> Iterator[Row]:
    if name == RUNS:
        yield from short_runs(scratch, _RUN_S)
    else:
        yield from rows_of(name, scratch, _PROGRAM_S)
