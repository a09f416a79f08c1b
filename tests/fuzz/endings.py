"""What is left of a run that ends: real runs are ended at named places after step 5, and what is kept is exported.

`python -m tests.fuzz.endings [places=1-5] [together=1]` prints a line per place and a total, and exits 1 if one of them
does not hold: the newest checkpoint is that of the last finished step (where nobody was left to write it, the newest
that had been written), `opd export` makes a model of it that transformers loads, the program says why it ended in one
sentence and without a traceback, its exit code is the documented one, and no process is left.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.run_directory import RunDirectory
from launch.run.export import export_run
from launch.run.run import SPARE
from opd.errors import OpdError
from tests.command import as_from_a_terminal
from tests.fault_plan import plan
from tests.integration.faults.test_faults import Scene, placed
from tests.integration.runs.test_train import lines
from tests.processes import family

AFTER = 5  # steps that are finished when a fault is laid
SMALL = [
    "prompts.prompts_per_step=4", "prompts.group_size=1", "max_tokens=16", "steps=400", "doctor=false", "tracker=none",
    "evaluation.prompts.prompts_per_step=4", "evaluation.reverse_kl_prompts=2", "evaluation.every=0",
    "evaluation.teacher=false",
]  # fmt: skip
SAVING, ALONE, SHORT = "checkpoint_every=1", "cluster.restarts=0", "steps=7"
UNWRITTEN = "what was on the disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A place at which a run ends.

    `faults` are planned (`fault_plan`) once `AFTER` steps are finished, each so many times; `deed` is done to the run
    from outside then, after the faults have fired if there are any. `said` is found in what the run prints. `behind`:
    so many steps may be newer than the newest checkpoint, for the reason `kept`. Checkpoints are begun in the
    background after each step, and the one before is on the disk by then, so two is all that can be missing.
    """

    name: str
    options: Sequence[str] = ()
    faults: Sequence[tuple[str, str, int]] = ()
    deed: Callable[[Scene], None] | None = None
    code: int = 1
    said: str = "a planned fault"
    behind: int = 0
    kept: str = "the last finished step"


def _sends(*numbers: signal.Signals, group: bool = False) -> Callable[[Scene], None]:
    def deed(scene: Scene) -> None:
        assert scene.driver is not None
        for number in numbers:
            (os.killpg if group else os.kill)(scene.driver.pid, number)
            time.sleep(0.5)

    return deed


def _kills_raylet(scene: Scene) -> None:
    (victim,) = family(scene.mark, "raylet")
    victim.kill()


def _takes_the_folder(scene: Scene) -> None:
    """As a disk that is unmounted: where checkpoints lay there is no folder any more."""
    folder = scene.run / "checkpoints"
    folder.rename(scene.run / "moved")
    folder.touch()


HANGS = ("engine decoding", "sleep 200", 1)
ENDINGS = (
    Ending(name="a group cannot be written", faults=[("driver writing", "error", 1)]),
    Ending(name="a row of a step fails", faults=[("driver prompting", "error", 1)]),
    Ending(name="the teacher raises while it scores", faults=[("teacher scoring", "bug", 1)]),
    Ending(
        name="the grader raises",
        options=["method=grpo", "prompts.group_size=2"],
        faults=[("driver grading", "error", 1)],
    ),
    Ending(name="an observer raises", faults=[("driver showing", "error", 1)]),
    Ending(
        name="an evaluation in the middle fails",
        options=["evaluation.every=3"],
        faults=[("driver evaluating", "error", 1)],
    ),
    Ending(name="the engine raises", options=[ALONE], faults=[("engine decoding", "bug", 1)]),
    Ending(
        name="the last engine is killed",
        options=[ALONE],
        faults=[("engine decoding", "SIGKILL", 1)],
        said="rollout actor",
    ),
    Ending(
        name="the last teacher is killed",
        options=[ALONE],
        faults=[("teacher scoring", "SIGKILL", 1)],
        said="teacher actor",
    ),
    Ending(
        name="a publication fails",
        options=[ALONE],
        faults=[("engine acknowledging", "lie", 1)],
        said="rollout actor",
    ),
    Ending(
        name="a learner rank is killed and replaced",
        options=["steps=9"],
        faults=[("learner optimizing", "SIGKILL", 1)],
        code=0,
        said="all ranks start anew",
    ),
    Ending(
        name="a learner rank is killed for good",
        options=[ALONE, SAVING],
        faults=[("learner optimizing", "SIGKILL", 1)],
        said="learner rank",
        behind=2,
        kept=UNWRITTEN,
    ),
    Ending(
        name="Ray's raylet is killed",
        options=[SAVING],
        deed=_kills_raylet,
        said="a process of Ray itself",
        behind=2,
        kept=UNWRITTEN,
    ),
    Ending(
        name="the disk is full once", options=[SAVING], faults=[("learner opening", "full", 1)], said="No space left"
    ),
    Ending(
        name="the disk stays full",
        options=[SAVING],
        faults=[("learner opening", "full", 20)],
        said="No space left",
        kept="the last finished step, on another disk",
    ),
    Ending(
        name="the checkpoints' folder is gone",
        options=[SAVING],
        deed=_takes_the_folder,
        said="cannot write",
        kept="the last finished step, beside it",
    ),
    Ending(name="a checkpoint cannot be renamed", options=[SAVING], faults=[("driver committing", "error", 1)]),
    Ending(
        name="the last evaluation fails", options=[SHORT], faults=[("driver evaluating", "error", 1)], code=0,
        said="warning: the student's last evaluation failed: a planned fault",
    ),
    Ending(
        name="the teacher's evaluation fails", options=[SHORT, "evaluation.teacher=true"],
        faults=[("driver evaluating the teacher", "error", 1)], code=0,
        said="warning: the evaluation of the teacher .* failed: a planned fault",
    ),
    Ending(name="the export fails", options=[SHORT], faults=[("learner exporting", "error", 1)]),
    Ending(name="SIGTERM", deed=_sends(signal.SIGTERM), code=75, said="stopped by SIGTERM after step"),
    Ending(name="SIGHUP", deed=_sends(signal.SIGHUP), code=75, said="stopped by SIGHUP after step"),
    Ending(name="Ctrl-C", deed=_sends(signal.SIGINT, group=True), code=130, said="stopped by SIGINT after step"),
    Ending(
        name="SIGTERM in a step that hangs", options=["grace_s=15"], faults=[HANGS], deed=_sends(signal.SIGTERM),
        code=75, said="stopped by SIGTERM after step",
    ),
    Ending(
        name="SIGTERM twice", options=[SAVING, "grace_s=60"], faults=[HANGS],
        deed=_sends(signal.SIGTERM, signal.SIGTERM), code=130, said="interrupted", behind=2, kept=UNWRITTEN,
    ),
    Ending(
        name="SIGKILL", options=[SAVING], deed=_sends(signal.SIGKILL), code=-signal.SIGKILL, said="", behind=2,
        kept=UNWRITTEN,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a run has left: its last finished step, the newest checkpoint, and what is wrong ("" for nothing)."""

    ending: Ending
    run: Path
    finished: int = 0
    newest: int = 0
    seconds: float = 0.0
    wrong: str = ""


def ended(ending: Ending, folder: Path) -> Left:
    """Run and end it in `folder`."""
    began = time.monotonic()
    with placed(folder) as scene:
        try:
            _end(ending, scene)
        except AssertionError as error:
            return Left(ending=ending, run=scene.run, wrong=f"{error}")
        finished = max((line["step"] for line in lines(scene.run / "metrics.jsonl")), default=0)
        newest = max([step for store in _stores(scene.run) for step in store.steps()], default=0)
        return Left(
            ending=ending, run=scene.run, finished=finished, newest=newest, seconds=time.monotonic() - began,
            wrong=_wrong(ending, scene.output, finished, newest),
        )  # fmt: skip


def _end(ending: Ending, scene: Scene) -> None:
    _temporary(scene.folder).mkdir()
    # Ray's own stays where it is: the names of sockets must be short.
    scene.start(
        *SMALL, *ending.options, TMPDIR=str(_temporary(scene.folder)), RAY_TMPDIR=os.environ.get("TMPDIR", "/tmp")
    )
    scene.reach(lambda: scene.steps() >= AFTER, f"{AFTER} steps", 240)
    for place, how, times in ending.faults:
        for entry in range(1, times + 1):
            plan(scene.plan, place, how, entry=entry)
    if ending.deed is not None:
        if ending.faults:
            scene.reach(scene.fired, "the fault")
        ending.deed(scene)
    scene.ends(ending.code, 150)
    assert not ending.faults or scene.fired(), "the fault did not fire"
    if (scene.run / "moved").exists():
        (scene.run / "checkpoints").unlink()
        (scene.run / "moved").rename(scene.run / "checkpoints")


def _temporary(folder: Path) -> Path:
    """Temporary files of a run, as if on another disk."""
    return folder / "tmp"


def _stores(run: Path) -> list[CheckpointStore]:
    """Where checkpoints of a run may lie."""
    spare = _temporary(run.parents[1]).glob(f"{SPARE}*")
    return [CheckpointStore(folder) for folder in (RunDirectory(run).checkpoints, RunDirectory(run).rescued, *spare)]


def _wrong(ending: Ending, output: str, finished: int, newest: int) -> str:
    if finished < AFTER:
        return f"it ended after step {finished}"
    if not finished - ending.behind <= newest <= finished:
        return f"the newest checkpoint is of step {newest}, the last finished step is {finished}: {output}"
    if "Traceback" in output:
        return f"a traceback: {output}"
    if not re.search(ending.said, output):
        return f"it does not say {ending.said!r}: {output}"
    if ending.code == 1 and output.count("error:") != 1:
        return f"it does not say one sentence: {output}"
    if ending.code > 0 and f"step {newest} is kept" not in output:
        return f"it does not say how to go on: {output}"
    return ""


def exported(left: Left) -> str:
    """What is wrong with the export of the newest checkpoint; "" for nothing."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    target = left.run / "exported"
    try:
        (place,) = (store.path(left.newest) for store in _stores(left.run) if left.newest in store.steps())
        export_run(str(place), str(target))
        model = AutoModelForCausalLM.from_pretrained(target)
    except (OpdError, OSError, ValueError) as error:
        return f"it cannot be exported: {error}"
    return "" if all(bool(p.isfinite().all()) for p in model.parameters()) else "the export has weights that are none"


def line(number: int, left: Left) -> str:
    """The row of a place."""
    ending = left.ending
    how = f"code {ending.code:4}, finished {left.finished:3}, kept {left.newest:3} ({ending.kept}), exported"
    return f"{number:2} {ending.name:40} {how}, {left.seconds:.0f} s" if not left.wrong else (
        f"{number:2} {ending.name:40} MISSING: {left.wrong[-3000:]}"
    )  # fmt: skip


def chosen(text: str) -> list[int]:
    """`"3"`, `"2-5"` or `"1,4-6"` as numbers of places, from 1; all for ""."""
    if not text:
        return list(range(1, len(ENDINGS) + 1))
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def rows(numbers: Iterable[int], folder: Path, together: int) -> list[Left]:
    """End a run at each place, `together` at once; a row is printed when it is there."""
    numbers = list(numbers)
    for number in numbers:
        (folder / str(number)).mkdir()
    made: list[Left] = []
    with ThreadPoolExecutor(together) as pool:
        for number, left in zip(
            numbers, pool.map(lambda n: ended(ENDINGS[n - 1], folder / str(n)), numbers), strict=True
        ):
            wrong = left.wrong or exported(left)
            whole = replace(left, wrong=wrong)
            print(line(number, whole), flush=True)
            made.append(whole)
    return made


def main(arguments: Sequence[str]) -> int:
    """Print a row per place and the total; 1 if one of them is missing."""
    as_from_a_terminal()
    given = dict(argument.split("=", 1) for argument in arguments)
    with TemporaryDirectory(prefix="opd-endings-") as folder:
        made = rows(chosen(given.get("places", "")), Path(folder), int(given.get("together", 1)))
    right = sum(not left.wrong for left in made)
    print(f"{right} of {len(made)} places: a checkpoint is kept and becomes a model; {len(ENDINGS)} places are known")
    return 0 if right == len(made) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
