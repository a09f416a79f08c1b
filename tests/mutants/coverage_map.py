"""Which test runs which line of the core: recorded once by coverage.py, kept, and made again where a file changed."""

import ast
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
from tests.mutants.scope import OF_ALL, PACKAGES, ROOT, askable, imports, module_of, sources

SELECT = ["-m", "not ray and not slow and not gpu", "-k", "not vllm and not VLLM", "-n", "0"]
_DEADLINE_S = 3600
_AT_ONCE = 4  # test files in a process
_FORMAT = 2  # of what is kept


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
    known = {file: cache / f"{_FORMAT}-{core}-{_digest(tree, [file])}.json" for file in files}
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


def asked(mutant: Mutant, tests: Iterable[Covered], most_s: float, root: Path = ROOT) -> list[Covered]:
    """The tests that run the line of `mutant`, the shortest first, `most_s` seconds of them.

    What runs when its file is imported (defaults, constants of classes and modules) is run by whichever test imports
    the file first, which says nothing about who notices. Then: all tests that run anything of the file, those of test
    files of `root` that import it, and before them those that look at the defaults of all files.
    """
    first, last = mutant.lines
    lines, ran = set(range(first, last + 1)), list(tests)
    if mutant.inside:
        found = [test for test in ran if lines.intersection(test.lines.get(mutant.path, ()))]
    else:
        module = module_of(mutant.path)
        files = {file for file in {test.file for test in ran} if file in OF_ALL or module in imports(root / file)}
        found = [test for test in ran if mutant.path in test.lines or test.file in files]
    chosen, total = list[Covered](), 0.0
    for test in sorted(found, key=lambda test: (test.file not in OF_ALL or mutant.inside, test.seconds, test.id)):
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
    lines, collecting = _lines(tree, data)
    meant = {file: {p: ran for p, ran in collecting.items() if module_of(p) in imports(tree / file)} for file in files}
    return [
        Covered(id=name, file=file, seconds=seconds, lines=_joined(lines.get(name, {}), meant.get(file, {})))
        for name, seconds in passed.items()
        for file in [name.split("::")[0]]
    ]


def _joined(some: Mapping[str, Sequence[int]], more: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {path: sorted({*some.get(path, ()), *more.get(path, ())}) for path in {*some, *more}}


def _lines(tree: Path, data: Path) -> tuple[dict[str, dict[str, list[int]]], dict[str, list[int]]]:
    """Test -> file -> lines, and file -> lines of functions that ran while tests were collected (their parameters).

    What a function gave at collection is judged by tests that never run it: by any of a file that imports its module.
    """
    read = coverage.CoverageData(str(data))
    read.read()
    found: dict[str, dict[str, list[int]]] = {}
    collecting: dict[str, list[int]] = {}
    for absolute in read.measured_files():
        path = str(Path(absolute).relative_to(tree))
        inner = in_functions((tree / path).read_text())
        for line, contexts in read.contexts_by_lineno(absolute).items():
            for context in filter(None, contexts):
                found.setdefault(context.rpartition("|")[0], {}).setdefault(path, []).append(line)
            if "" in contexts and line in inner:
                collecting.setdefault(path, []).append(line)
    return found, collecting


def in_functions(source: str) -> set[int]:
    """The lines of all function bodies."""
    made = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {line for n in made for line in range(n.body[0].lineno, (n.end_lineno or 0) + 1)}
