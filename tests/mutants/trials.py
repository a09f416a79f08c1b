"""Runs chosen tests on a mutant: in a copy of the tree, in a process of its own, with a deadline.

Processes are forked from this one after it has imported what every test imports, which saves each some seconds. The
copy has its own compiled files; a mutated file gets a time of its own, so that no compiled one stands for it.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from time import process_time
from typing import Any

from opd.errors import OpdError
from tests.mutants.coverage_map import SELECT, Covered
from tests.mutants.operators import Mutant
from tests.mutants.recorder import bound_examples
from tests.mutants.scope import PACKAGES, ROOT

SPARE_S, TIMES, MOST_S = (
    60.0,
    2.0,
    150.0,
)  # a trial may take SPARE_S (collection) + TIMES what its tests took, at most MOST_S
_MEMORY = 16 << 30  # bytes of addresses that a mutant may take
_TICK_S = 0.05
_NO_TESTS = 5  # exit code of pytest: none of the chosen tests was found, which says nothing about the mutant
_PRELOADED = (
    "torch",
    "numpy",
    "beartype",
    "jaxtyping",
    "hypothesis.strategies",
    "transformers",
    "aiohttp",
    "deepspeed",
)
_times = count(1_000_000_000, 10)  # seconds since 1970, one for each file that is written


class Result(Enum):
    """What became of a mutant."""

    KILLED = "killed"
    LATE = "killed by the deadline"
    SURVIVED = "survived"
    UNREACHED = "not reached by any test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A mutant with its tests; `mutant` is None for a control, which has to survive."""

    mutant: Mutant | None
    tests: Sequence[Covered]

    @property
    def deadline_s(self) -> float:
        """Processor seconds it may take; on an idle machine it is over before as many have passed on the clock."""
        return min(SPARE_S + TIMES * sum(test.seconds for test in self.tests), MOST_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A trial that is over, and the end of what it printed."""

    trial: Trial
    result: Result
    seconds: float
    printed: str = ""


class _Only:
    """A plugin of pytest: runs the chosen tests alone, the shortest first."""

    def __init__(self, tests: Sequence[Covered]) -> None:
        self._rank = {test.id: rank for rank, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._rank), key=lambda i: self._rank[i.nodeid])
        bound_examples(items)


def preload() -> None:
    """Import what is not mutated and costs seconds, for all forks."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    import importlib

    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as conftest does, which imports a compiler
    for name in _PRELOADED:
        importlib.import_module(name)
    for plugin in entry_points(group="pytest11"):
        plugin.load()


@contextmanager
def copies(number: int, folder: Path) -> Iterator[list[Path]]:
    """So many copies of the work tree as git sees it, whose files may be changed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    made = [folder / f"copy_{i}" for i in range(number)]
    for copy in made:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
    yield made


def run(trials: Sequence[Trial], folders: Sequence[Path]) -> Iterator[Ended]:
    """All trials, one at a time in each of `folders`; as they end."""
    waiting, running = list(trials), dict[Path, _Running]()
    try:
        while waiting or running:
            for folder in folders:
                if waiting and folder not in running:
                    trial = waiting.pop(0)
                    if not trial.tests:
                        yield Ended(trial=trial, result=Result.UNREACHED, seconds=0.0)
                        continue
                    running[folder] = _Running(trial, folder)
            time.sleep(_TICK_S)
            for folder, one in list(running.items()):
                if (ended := one.ended()) is not None:
                    del running[folder]
                    yield ended
    finally:
        for one in running.values():
            one.kill()


class _Running:
    """A trial under way in a forked process."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self._trial, self._folder, self._began = trial, folder, time.monotonic()
        crowd = os.getloadavg()[0] / (os.cpu_count() or 1)  # processes for each processor
        self._deadline_s = trial.deadline_s * max(1.0, crowd)
        self._log = folder.with_suffix(".log")
        self._changed = _change(trial.mutant, folder)
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _in_child(trial, folder, self._log)

    def ended(self) -> Ended | None:
        """How it ended, once it has."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        seconds = time.monotonic() - self._began
        if pid == 0 and seconds < self._deadline_s:
            return None
        if pid == 0:
            self.kill()
            result = Result.LATE
        else:
            _end_group(self._pid)
            code = os.waitstatus_to_exitcode(status)
            if code == _NO_TESTS:
                raise OpdError(f"no chosen test was found for {self._trial.mutant}: {self._log.read_text()[-3000:]}")
            late = code in (-signal.SIGXCPU, -signal.SIGKILL)
            result = Result.SURVIVED if code == 0 else Result.LATE if late else Result.KILLED
        self._restore()
        return Ended(trial=self._trial, result=result, seconds=seconds, printed=self._log.read_text()[-3000:])

    def kill(self) -> None:
        """End it with all that it has started."""
        _end_group(self._pid)
        with suppress(ChildProcessError):  # it was waited for
            os.waitpid(self._pid, 0)

    def _restore(self) -> None:
        if self._trial.mutant is not None:
            _write(self._folder / self._trial.mutant.path, self._changed)


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _change(mutant: Mutant | None, folder: Path) -> bytes:
    """Put the fault in; returns what was there."""
    if mutant is None:
        return b""
    before = (folder / mutant.path).read_bytes()
    _write(folder / mutant.path, mutant.applied(before))
    return before


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    moment = next(_times)
    os.utime(path, (moment, moment))


def _in_child(trial: Trial, folder: Path, log: Path) -> None:
    """Never returns: the process's exit code is that of pytest."""
    code = 9
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        most = int(process_time() + trial.deadline_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        temporary = folder.with_name(f"{folder.name}_tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "TMPDIR": str(temporary)}
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "launch", "actors", "recipes", *PACKAGES)]:
            del sys.modules[name]
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
        import tempfile

        import pytest

        tempfile.tempdir = None
        files = sorted({test.file for test in trial.tests})
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *SELECT, *files]
        code = int(pytest.main(arguments, plugins=[_Only(trial.tests)]))
    except BaseException as error:  # noqa: BLE001 (a fork must never return into what forked it)
        print(f"trial: {type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
