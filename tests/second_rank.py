"""A second process for what only several ranks do, forked for every piece of work from one that has done nothing yet.

A fork of the test's own process would be no rank: whatever threads it has (those of gloo, of a store, of an earlier
test) may hold a lock that a fork then never sees released, and it waits in a place where no deadline of ours is.
"""

import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from ray import cloudpickle

DEADLINE_S = 60  # for its start, and from the end of rank 0; the waits of a group have shorter ones

# Torch, DeepSpeed and ours are imported once, set up as in the test's own process.
_MODULES = ["tests.conftest", "tests.small_learner", "learner.training"]


@cache
def _clean() -> ForkServerContext:
    """The process that all second ranks are forked from, begun anew.

    Python has one in a process: where earlier tests had answers graded it has other modules, and every rank would take
    the time for these that a wait for it allows.
    """
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    return context


def on_both(work: Callable[[int], Any], deadline_s: float = DEADLINE_S) -> list[Any]:
    """What `work(rank)` returns: rank 0 in this process, rank 1 in another one, whose traceback is kept.

    `work` goes there by value: what it patches it patches itself, and the ranks share files, not variables.
    """
    here, there = _clean().Pipe(duplex=False)
    second = _clean().Process(target=_work, args=(cloudpickle.dumps(work), there, 2 * deadline_s), daemon=True)
    second.start()
    there.close()
    given = None
    try:
        mine, (_, failed) = (None, ""), _received(here, DEADLINE_S)
        if not failed:  # it is there: no deadline of the two counts the time that it needs to start
            mine = _result(work, 0)
            given, failed = _received(here, deadline_s)
    finally:
        second.kill()  # it has said all that it had to
        second.join(deadline_s)
        here.close()
    for rank, error in ((1, failed), (0, mine[1])):
        assert not error, f"rank {rank} failed:\n{error}"
    return [mine[0], given]


def _received(here: Connection, deadline_s: float) -> tuple[Any, str]:
    """What rank 1 says next, or what became of it."""
    if not here.poll(deadline_s):
        return None, f"nothing came from it within {deadline_s:g} s"
    try:
        return here.recv()
    except EOFError:
        return None, "it ended without a word"


def _work(work: bytes, there: Connection, seconds: float) -> None:
    """The whole life of rank 1."""
    from tests.small_learner import group_of_its_own

    faulthandler.dump_traceback_later(seconds, exit=True)
    with group_of_its_own():
        own = cloudpickle.loads(work)
        there.send((None, ""))  # it has begun
        there.send(_result(own, 1))


def _result(work: Callable[[int], Any], rank: int) -> tuple[Any, str]:
    """What it returns, or the traceback of its failure."""
    try:
        return work(rank), ""
    except BaseException:  # noqa: BLE001 (the other rank's traceback is wanted, too)
        return None, traceback.format_exc()
