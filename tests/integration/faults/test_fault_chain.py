"""One training run that is broken at four places, resumed each time and held up at last, and one whose learner is lost
at four places and starts anew beside a driver that goes on: both end bit by bit as one that was not broken."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fault_matrix import Witness
from tests.fault_plan import entries, plan
from tests.integration.faults.test_faults import Scene, actors, placed, scene
from tests.integration.runs.test_train import lines

__all__ = ["scene"]  # the fixture
pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]  # six starts of a run, one after the other
STEPS, EVERY = 10, 2
OWN = [
    f"steps={STEPS}", "prompts.prompts_per_step=16", "learner.ranks=2", "learner.zero_stage=2", "doctor=false",
    "learner.deterministic=true", "learner.schedule=CONSTANT", f"checkpoint_every={EVERY}", "checkpoint_keep=9",
    "max_staleness=1", "evaluation.every=0", "evaluation.teacher=false", "tracker.mode=DISABLED",
]  # fmt: skip

# Kind, place and deed; how the run ends and what it says. The others wait in a collective for a rank that is gone.
CHAIN = [
    ("driver killed in a checkpoint", "driver committing", "SIGKILL", -signal.SIGKILL, ""),
    ("driver killed again and again", "learner beginning", "kill driver 1 60", -signal.SIGKILL, ""),
    ("learner killed writing a checkpoint", "learner writing", "SIGKILL", 1, "error: OpdError: a learner rank died"),
    ("disk full in a checkpoint", "learner opening", "full", 1, "No space left on device; the checkpoints before"),
]

# In place: kind, place and deed, and the checkpoint that is on the disk when it is planned (0: none will be).
IN_PLACE = [
    ("learner killed in the optimizer", "learner optimizing", "SIGKILL", 0),
    ("learner exits in a forward", "learner forward", "exit", 2),
    ("learner segfaults writing a checkpoint", "learner writing", "segfault 1", 4),  # training goes on for a second
    ("learner hangs in a forward", "learner forward", "SIGSTOP", 8),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that nobody disturbed."""
    with placed(tmp_path_factory.mktemp("whole")) as scene:
        scene.start(*OWN)
        scene.ends(0)
        stale = [line["sample/staleness_max"] for line in lines(scene.run / "metrics.jsonl")]
        assert stale == [float(step % EVERY > 0) for step in range(STEPS)], "it did not run ahead"
        yield scene.run


def saved(run: Path, step: int) -> bool:
    return (run / "checkpoints" / f"step_{step}" / "manifest.json").exists()


def at_a_barrier(run: Path) -> str:
    """Goes on where no text was on its way. (What an error leaves is the last finished step, which may be another.)"""
    return f"resume={max(step for step in range(0, STEPS + 1, EVERY) if saved(run, step))}"


@contextmanager
def held_up(mark: str, seed: int) -> Iterator[list[int]]:
    """Meanwhile actors of the run are stopped and woken at random, so that it goes at other speeds; which ones."""
    stop, paused = threading.Event(), list[int]()

    def hold_up() -> None:
        draw = random.Random(seed)
        while not stop.wait(draw.uniform(0, 0.4)):
            victims = [p for name in ("FaultyEngine", "FaultyTeacher", "FaultyRank") for p in actors(mark, name)]
            if not victims:
                continue
            victim = draw.choice(victims)
            try:
                victim.suspend()
                stop.wait(draw.uniform(0.05, 0.8))
                victim.resume()
            except psutil.NoSuchProcess:  # the run has ended meanwhile
                continue
            paused.append(victim.pid)

    disturber = threading.Thread(target=hold_up)
    disturber.start()
    try:
        yield paused
    finally:
        stop.set()
        disturber.join(5)


@pytest.mark.faults(*[kind for kind, *_ in CHAIN], "actors held up")
def test_a_run_broken_at_four_places_and_held_up_ends_as_one_that_was_not(
    scene: Scene, witness: Witness, whole: Path
) -> None:
    checkpoints = scene.run / "checkpoints"
    for number, (kind, place, deed, code, says) in enumerate(CHAIN):
        scene.start(*OWN, "cluster.restarts=0", *([at_a_barrier(scene.run)] if number else []))
        if not number:
            scene.reach(lambda: saved(scene.run, 2), "a checkpoint")
        second = entries(scene.plan, place) + 3 if place == "learner beginning" else 1  # both ranks have taken a step
        plan(scene.plan, place, deed, entry=second)
        output = scene.ends(code)
        assert says in output and "Traceback" not in output, output
        assert [f.place for f in scene.fired()] == [place for _, place, *_ in CHAIN[: number + 1]], output
        if place == "driver committing":
            (begun,) = checkpoints.glob(".step_*.partial")
            assert (begun / "manifest.json").exists(), "it was killed before everything was written"
        elif place == "learner opening":
            assert not list(checkpoints.glob(".*")), "a half checkpoint is left"
        witness(kind)
    with held_up(scene.mark, seed=1) as paused:
        scene.start(*OWN, at_a_barrier(scene.run))
        scene.ends(0)
    assert len(paused) >= 5 and len(set(paused)) >= 3, "not every actor was held up"
    witness("actors held up", len(paused))
    _are_equal(scene.run, whole, ledger=("ledger/trained", "ledger/dropped"))


@pytest.mark.faults(*[kind for kind, *_ in IN_PLACE])
def test_a_run_whose_learner_is_lost_at_four_places_goes_on_by_itself(
    scene: Scene, witness: Witness, whole: Path
) -> None:
    """Before there is any checkpoint, after one, while one is written, and before the last one; nothing is resumed."""
    plan(scene.plan, "learner optimizing", "SIGKILL", entry=4)  # both ranks have taken a step
    scene.start(*OWN, "learner.deadline_s=25")
    for number, (_, place, deed, after) in enumerate(IN_PLACE[1:], 1):
        scene.reach(lambda after=after: saved(scene.run, after), f"the checkpoint of step {after}")
        plan(scene.plan, place, deed, after=number)
    output = scene.ends(0)
    assert [f.place for f in scene.fired()] == [place for _, place, *_ in IN_PLACE], output
    for kind, *_ in IN_PLACE:
        witness(kind)
    assert output.count("all ranks start anew from") == len(IN_PLACE), output
    assert "start anew from the student they began with (calls to repeat: 1)" in scene.alerts()
    assert "start anew from step_2 (" in scene.alerts() and "did not answer within 25 s" in scene.alerts()
    assert "the checkpoint of step 6 is given up with the ranks that wrote it (a learner rank died" in output
    assert "Traceback" not in output, output
    _are_equal(scene.run, whole)


def _are_equal(broken: Path, whole: Path, ledger: tuple[str, ...] = ("ledger/", "sample/")) -> None:
    """Every step once; the same losses, trajectories, weights and moments, to the bit.

    How many trajectories are under way when a step ends is a matter of speed: then only those counts of the `ledger`.
    """
    first, second = lines(whole / "metrics.jsonl"), lines(broken / "metrics.jsonl")
    assert [m["step"] for m in second] == list(range(1, STEPS + 1)) == [m["weights/version"] for m in second]
    kinds = ("actor/", "distill/", "tokens/", "flops/", "response", "sample/staleness", *ledger)
    exact = [k for k in first[0] if k.startswith(kinds)]
    assert len(exact) > 15
    for ours, theirs in zip(second, first, strict=True):
        assert {k: ours[k] for k in exact} == {k: theirs[k] for k in exact}
    assert first[-1]["ledger/trained"] == STEPS * 16 and not first[-1]["ledger/outstanding"]
    places = [Path("export") / "model.safetensors"]
    places += [Path("checkpoints") / f"step_{STEPS}" / "learner" / f"rank_{rank}.safetensors" for rank in (0, 1)]
    for place in places:
        assert (broken / place).read_bytes() == (whole / place).read_bytes(), place
    assert not [name for name in os.listdir(broken / "checkpoints") if name.startswith(".")]
