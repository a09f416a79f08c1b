"""The fault matrix: every kind of fault that is injected, who proved that it fired, and the table at the end.

A test that injects faults is marked `@pytest.mark.faults("kind", ...)` with kinds of the catalog, asks for the
fixture `witness`, and calls `witness("kind", count)` when the fault has really fired: a signal delivered, bytes really
flipped, a chunk really withheld. A marked test that passes without a witness of each of its kinds fails, and so does a
run of the whole matrix in which a kind of the catalog has none.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Kind:
    """`state` says where the victim is hit. "itself": it does it to itself, at that very place in its own code."""

    name: str
    role: str
    how: str
    state: str


CATALOGUE = (
    Kind("engine killed", "rollout actor", "SIGKILL", "any, from outside"),
    Kind(
        "all engines killed while idle",
        "rollout actor",
        "SIGKILL of all",
        "asleep, as roles take turns: the learner does it in its step",
    ),
    Kind("engine killed receiving weights", "rollout actor", "SIGKILL", "tensors copied, layers not finished; itself"),
    Kind("engine killed while starting", "rollout actor", "SIGKILL", "a replacement, vLLM being built; itself"),
    Kind("engine segfaults while decoding", "rollout actor", "a wild read", "between two decoding steps; itself"),
    Kind("engine exits while decoding", "rollout actor", "_exit(3)", "between two decoding steps; itself"),
    Kind("engine hangs while decoding", "rollout actor", "SIGSTOP", "between two decoding steps; itself"),
    Kind("engine stuck while decoding", "rollout actor", "its thread sleeps", "between two decoding steps; itself"),
    Kind("engine stops and goes on", "rollout actor", "SIGSTOP, SIGCONT", "as before, woken when others had answered"),
    Kind("engine skips pushes", "rollout actor", "acknowledges, loads nothing", "receiving; itself"),
    Kind("engine holds other weights", "rollout actor", "acknowledges another digest", "receiving; itself"),
    Kind("slow engine", "rollout actor", "sleeps", "between two decoding steps; itself"),
    Kind("teacher killed", "teacher", "SIGKILL", "any, from outside"),
    Kind(
        "teacher killed after its answer",
        "teacher",
        "SIGKILL",
        "asleep, its arrays unread: the learner does it, waits 5 s",
    ),
    Kind("teacher killed while scoring", "teacher", "SIGKILL", "before a forward of its model; itself"),
    Kind("teacher killed before its answer", "teacher", "SIGKILL", "scored, not answered; itself"),
    Kind("teacher killed handing over", "teacher", "SIGKILL", "answers returned, one array of two; itself"),
    Kind("teacher exits while scoring", "teacher", "_exit(3)", "before a forward of its model; itself"),
    Kind("teacher segfaults while scoring", "teacher", "a wild read", "before a forward of its model; itself"),
    Kind("teacher hangs while scoring", "teacher", "SIGSTOP", "before a forward of its model; itself"),
    Kind("teacher server breaks off", "remote teacher", "429, 500, half a body, dead, slow, no frame", "answering"),
    Kind("teacher server lies", "remote teacher", "NaN, shifted, too short, other ids ...", "answering"),
    Kind("teacher server mixes answers up", "remote teacher", "replays and swaps them", "answering"),
    Kind("teacher server changes its model", "remote teacher", "another model answers", "answering"),
    Kind("teacher server restarts", "remote teacher", "closed, started again", "waited for"),
    Kind("learner exits in a forward", "learner", "_exit(3) of a rank", "before a micro-batch; itself"),
    Kind("learner killed in the optimizer", "learner", "SIGKILL of a rank", "gradients there, step not taken; itself"),
    Kind("learner killed writing a checkpoint", "learner", "SIGKILL of a rank", "header written, no tensor; itself"),
    Kind("learner segfaults writing a checkpoint", "learner", "a wild read of a rank", "as before; itself"),
    Kind("learner hangs in a forward", "learner", "SIGSTOP of a rank", "before a micro-batch; itself"),
    Kind("slow learner", "learner", "sleeps", "before a step; itself"),
    Kind("loss is no number", "learner", "NaN, infinity, gradient overflow", "in an update"),
    Kind("learner out of memory", "learner", "a planted allocation failure", "in a forward"),
    Kind("driver killed in a checkpoint", "driver", "SIGKILL", "everything written, not renamed; itself"),
    Kind(
        "driver killed again and again",
        "driver",
        "SIGKILL",
        "in a checkpoint, then between two steps",
    ),
    Kind("actors held up", "all actors", "SIGSTOP, SIGCONT", "any, from outside, all through a run that runs ahead"),
    Kind(
        "driver stops and goes on",
        "driver",
        "SIGSTOP, SIGCONT",
        "training, for longer than its deadlines, from outside",
    ),
    Kind("driver told to stop", "driver", "SIGTERM", "training"),
    Kind("another layout resumes", "driver", "one rank more, another ZeRO stage", "resuming"),
    Kind("machine lost", "Ray", "SIGKILL of a node", "training, two nodes on one host, from outside"),
    Kind("raylet killed", "Ray", "SIGKILL of the node's raylet", "any, from outside"),
    Kind("GCS killed", "Ray", "SIGKILL of Ray's control store", "any, from outside"),
    Kind("disk full in a checkpoint", "disk", "ENOSPC of the kernel (/dev/full)", "a shard of a real run"),
    Kind("disk full elsewhere", "disk", "short writes, ENOSPC, EFBIG of the kernel", "lines, pages, summary, manifest"),
    Kind("disk read-only", "disk", "a folder that may not be written", "start of a run"),
    Kind("checkpoint damaged", "checkpoint", "bits flipped, files cut", "at rest; also one of a real run"),
    Kind("checkpoint foreign or incomplete", "checkpoint", "files missing, foreign, edited, a pickle", "at rest"),
    Kind("checkpoint half renamed", "checkpoint", "what a crash leaves", "between the renames"),
    Kind("chunk damaged", "weights", "bits flipped, bytes cut", "on the way; also to a real vLLM"),
    Kind("chunk lost", "weights", "withheld", "on the way; also to a real vLLM"),
    Kind("chunk repeated or reordered", "weights", "sent twice, swapped, of another version", "also to a real vLLM"),
    Kind("frame damaged", "wire", "bits flipped, cut, swapped, lengthened", "questions and replies"),
    Kind("pickle from outside", "wire", "a pickle that would write a file", "where a frame or a shard belongs"),
    Kind("answers come late or twice", "pool", "a hedge, a slow replica", "stand-ins in virtual time"),
    Kind("everything at once", "pool", "death, hang, invalid answer, silence, 200 times", "stand-ins in virtual time"),
    Kind("wandb down", "tracker", "a port that refuses, one that hangs", "start of a run"),
    Kind("wandb killed", "tracker", "SIGKILL of its process", "training"),
)
NAMES = frozenset(kind.name for kind in CATALOGUE)


@dataclass
class Witness:
    """Counts faults that fired, by kind and by the test that injected them."""

    test: str = ""
    fired: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __call__(self, kind: str, times: int = 1) -> None:
        """`kind` has fired `times` times in the test at hand."""
        assert kind in NAMES, f"no such kind of fault: {kind!r}"
        self.fired[self.test, kind] += times


_witness = Witness()  # of the tests of this process
_cases: dict[str, dict[str, str]] = {}  # kind -> test -> outcome, of all processes
_fired: dict[tuple[str, str], int] = {}  # (test, kind) -> how often, of all processes


@pytest.fixture(scope="session")
def witness() -> Witness:
    """Told of every fault that has fired. Of the session, so that tests of Hypothesis may ask for it."""
    return _witness


def declared(item: pytest.Item) -> list[str]:
    """The kinds that a test declares."""
    return [name for mark in item.iter_markers("faults") for name in mark.args]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A kind that the catalog does not have is a mistake."""
    for item in items:
        strange = sorted(set(declared(item)) - NAMES)
        if strange:
            raise pytest.UsageError(f"{item.nodeid} declares {strange}, which tests/fault_matrix.py does not know")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Whose witness it is."""
    _witness.test = item.nodeid
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """A test that passed although its fault did not fire has not passed."""
    report = yield
    kinds = declared(item)
    if call.when == "call" and report.passed:
        silent = [kind for kind in kinds if not _witness.fired[item.nodeid, kind]]
        if silent:
            report.outcome, report.longrepr = "failed", f"no witness of {silent}: the fault did not fire"
    if call.when == "call" or not report.passed:
        fired = {kind: n for (test, kind), n in _witness.fired.items() if test == item.nodeid}
        report.user_properties.append(("faults", [kinds, fired]))  # travels, if this process is one of several
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What a test declared and what fired in it, wherever it ran."""
    for kinds, fired in (told for name, told in report.user_properties if name == "faults"):
        _fired.update({(report.nodeid, kind): n for kind, n in fired.items()})
        for kind in kinds:
            before = _cases.setdefault(kind, {}).get(report.nodeid, "passed")
            _cases[kind][report.nodeid] = before if before != "passed" else report.outcome


def table(*, whole: bool) -> tuple[list[str], list[str]]:
    """The matrix as lines, and the kinds that did not hold: of the whole catalog, or of those that were tried."""
    rows, missing = [f"{'kind':37} {'role':15} {'cases':>5} {'fired':>9}  verdict"], []
    for kind in CATALOGUE:
        cases = _cases.get(kind.name, {})
        if not cases and not whole:
            continue
        fired = sum(n for (_, name), n in _fired.items() if name == kind.name)
        held = bool(cases) and bool(fired) and set(cases.values()) == {"passed"}
        verdict = "held" if held else "NOT RUN" if not cases else "BROKEN"
        rows.append(f"{kind.name:37} {kind.role:15} {len(cases):5} {fired:9,}  {verdict}")
        missing += [] if held else [kind.name]
    total = sum(_fired.values())
    held_of = f"{len(rows) - 1 - len(missing)} of {len(rows) - 1} kinds held"
    rows.append(f"{held_of}, {total:,} faults fired; the catalog has {len(CATALOGUE)}")
    return rows, missing


def is_whole(config: pytest.Config) -> bool:
    """Is this the whole matrix, and not a part that somebody chose?"""
    left_out = config.getoption("deselect", None) or config.getoption("ignore", None)
    chosen = config.option.keyword or config.option.collectonly or left_out
    return config.option.markexpr == "faults" and not chosen and config.args_source.name == "TESTPATHS"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The whole matrix with a kind that did not hold is a failure. A worker knows a part only, and does not judge."""
    if not hasattr(session.config, "workerinput") and is_whole(session.config) and table(whole=True)[1]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, if faults were injected."""
    if _cases:
        terminalreporter.section("fault matrix")
        for row in table(whole=is_whole(terminalreporter.config))[0]:
            terminalreporter.write_line(row)
