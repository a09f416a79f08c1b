"""Which test runs which line of the core: recorded once by coverage.py, kept, and made again where a file changed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import coverage

from opd.errors import OpdError
from tests.mutants.operators import Mutant
from tests.mutants.recorder import DURATIONS
from tests.mutants.scope import PACKAGES, askable, sources

SELECT = ["-m", "not ray and not slow and not gpu", "-k", "not vllm and not VLLM", "-n", "0"]
_DEADLINE_S = 3600
_AT_ONCE = 4  # test files in a process


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """A test that passes: its id, its file, how long it takes, and the lines it runs, by source file."""

    id: str
    file: str
    seconds: float
    lines: Mapping[str, Sequence[int]]


def coverage_map(trees: Sequence[Path], cache: Path) -> list[Covered]:
    """All tests that are asked; what is known of files that have not changed is taken from `cache`.

    The others are recorded in `trees`, equal copies, side by side and some files at a time.
    """
    cache.mkdir(parents=True, exist_ok=True)
    tree = trees[0]
    files = askable(tree)
    core = _digest(tree, sorted({path for paths in sources(tree).values() for path in paths}))
    known = {file: cache / f"{core}-{_digest(tree, [file])}.json" for file in files}
    stale = [file for file in files if not known[file].exists()]
    parts = [stale[i : i + _AT_ONCE] for i in range(0, len(stale), _AT_ONCE)]

    def record(share: Sequence[Sequence[str]], tree: Path) -> None:
        for part in share:
            print(f"which test runs which line: {', '.join(part)}", flush=True)
            found = _recorded(tree, part)
            for file in part:
                known[file].write_text(json.dumps([asdict(test) for test in found if test.file == file]))

    with ThreadPoolExecutor(len(trees)) as pool:
        list(pool.map(record, [parts[i :: len(trees)] for i in range(len(trees))], trees))
    return [Covered(**test) for file in files for test in json.loads(known[file].read_text())]


def asked(mutant: Mutant, tests: Iterable[Covered], most_s: float) -> list[Covered]:
    """The tests that run the line of `mutant`, the shortest first, `most_s` seconds of them.

    What runs when its file is imported has no test of its own: then all tests that run anything of the file.
    """
    first, last = mutant.lines
    lines, ran = set(range(first, last + 1)), list(tests)
    found = [test for test in ran if lines.intersection(test.lines.get(mutant.path, ()))]
    if not mutant.inside:
        found = found or [test for test in ran if mutant.path in test.lines]
    chosen, total = list[Covered](), 0.0
    for test in sorted(found, key=lambda test: (test.seconds, test.id)):
        total += test.seconds
        if chosen and total > most_s:
            break
        chosen.append(test)
    return chosen


def _digest(tree: Path, files: Sequence[str]) -> str:
    return sha256(b"\0".join((tree / file).read_bytes() for file in files)).hexdigest()[:16]


def _recorded(tree: Path, files: Sequence[str]) -> list[Covered]:
    durations, data = tree / "durations.json", tree / "coverage.sqlite"
    for old in (durations, data):
        old.unlink(missing_ok=True)
    measured = [f"--cov={package}" for package in PACKAGES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.mutants.recorder"]
    command += [*SELECT, *measured, "--cov-context=test", "--cov-report=", *files]
    own = {"COVERAGE_FILE": str(data), DURATIONS: str(durations), "PYTHONPATH": str(tree), "COVERAGE_CORE": "ctrace"}
    done = subprocess.run(
        command, cwd=tree, env=os.environ | own, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )
    if not durations.exists() or not data.exists():
        said = f"{done.stdout[-2000:]}{done.stderr[-500:]}"
        raise OpdError(f"the tests could not be run to record what they cover: {said}")
    passed: dict[str, float] = json.loads(durations.read_text())
    lines = _lines(tree, data)
    return [
        Covered(id=name, file=name.split("::")[0], seconds=seconds, lines=lines.get(name, {}))
        for name, seconds in passed.items()
    ]


def _lines(tree: Path, data: Path) -> dict[str, dict[str, list[int]]]:
    """Test -> file -> lines, from what coverage.py wrote."""
    read = coverage.CoverageData(str(data))
    read.read()
    found: dict[str, dict[str, list[int]]] = {}
    for path in read.measured_files():
        for line, contexts in read.contexts_by_lineno(path).items():
            for context in filter(None, contexts):
                of_test = found.setdefault(context.rpartition("|")[0], {})
                of_test.setdefault(str(Path(path).relative_to(tree)), []).append(line)
    return found
