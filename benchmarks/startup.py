"""Start-up and end of one run by role: where its processor seconds and its wall seconds go.

    python benchmarks/startup.py [peer=FOLDER] [OVERRIDE ...]      (default: the embedded demo, 12 steps, no tracker)

Starts `opd train` and looks at its processes from outside, 20 times a second: which stage the run is in (by the lines
that it prints and the files that it writes) and what each process has used. A process that lives for less than a look
is counted by the one that started it. With `peer=FOLDER`, where `pip install --no-deps --target FOLDER trl` went, TRL's
trainer has the same steps after it (`benchmarks/peer_trl.py`), looked at alike. Several programs on a machine make wall
seconds longer, processor seconds hardly.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep

import psutil
from rich.console import Console
from rich.table import Table

STEPS = 12
WARM = 2  # steps that are no part of the cost of a later one
DEFAULTS = ("experiment=shop", f"steps={STEPS}", "evaluation.every=0", "evaluation.teacher=false", "doctor=false")
LOOK_S = 0.05
ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 1800.0


class Stage(Enum):
    """A part of a run, with the column's title."""

    PLAN = "imports, plan"
    RAY = "Ray starts"
    ACTORS = "actors start"
    BEFORE = "evaluation before"
    FIRST = "steps 1, 2"
    STEPS = "later steps"
    EXPORT = "export"
    AFTER = "evaluation after"
    END = "report, end"


# What a run prints when a stage begins; steps begin with the first line of `evaluations.jsonl`, later ones after two of
# `metrics.jsonl`.
PRINTED = {
    "first prompt: ": Stage.RAY,
    "loading the student and its teachers": Stage.ACTORS,
    "first evaluation ...": Stage.BEFORE,
    "exporting the student": Stage.EXPORT,
    "last evaluation of the student": Stage.AFTER,
}
PRINTED_BY_PEER = {
    "training starts": Stage.FIRST,
    f"step {WARM} ": Stage.STEPS,
    f"step {STEPS} ": Stage.END,
}

# The role of a process by a part of its command line; the first that is found counts. Ray names actors `ray::CLASS`.
ROLES = {
    "ray::VLLMEngine": "rollout actor (vLLM)",
    "ray::LearnerRank": "learner rank (DeepSpeed)",
    "ray::TorchTeacher": "teacher actor",
    "ray::VLLMTeacher": "teacher actor",
    "gcs_server": "Ray: control store",
    "raylet/raylet": "Ray: raylet",
    "dashboard/dashboard.py": "Ray: dashboard",
    "autoscaler/_private/monitor.py": "Ray: autoscaler",
    "log_monitor.py": "Ray: log monitor",
    "dashboard/agent.py": "Ray: dashboard agent",
    "ray::DashboardAgent": "Ray: dashboard agent",
    "runtime_env/agent/main.py": "Ray: agent of environments",
    "ray::RuntimeEnvAgent": "Ray: agent of environments",
    "default_worker.py": "Ray: workers without an actor",
    "ray::IDLE": "Ray: workers without an actor",
    "ray_agent.py": "Ray: stand-in for its agent",
    "start_worker.py": "Ray: workers without an actor",
    "launch.cli": "driver",
    "peer_trl.py": "TRL's trainer",
}


@dataclass(slots=True)
class Seen:
    """A process as it was last seen: own seconds, and those of the children that it has waited for."""

    process: psutil.Process
    parent: int
    role: str = ""
    own: float = 0.0
    reaped: float = 0.0

    def look(self) -> None:
        """Look again; a process that has ended keeps what was seen last."""
        try:
            with self.process.oneshot():
                times, command = self.process.cpu_times(), " ".join(self.process.cmdline())
        except psutil.Error:
            return
        self.own = times.user + times.system
        self.reaped = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        known = next((role for part, role in ROLES.items() if part in command), "")
        self.role = known or self.role


@dataclass(slots=True)
class Watch:
    """All processes of a run that were seen, and the seconds of each role when each stage began."""

    driver: psutil.Process
    seen: dict[int, Seen] = field(default_factory=dict)
    began: dict[Stage, float] = field(default_factory=dict)
    spent: dict[Stage, dict[str, float]] = field(default_factory=dict)
    ended: float = 0.0

    def look(self) -> None:
        """Look at every process of the run."""
        try:
            running = [self.driver, *self.driver.children(recursive=True)]
        except psutil.Error:
            running = []
        for process in running:
            if process.pid not in self.seen:
                try:
                    self.seen[process.pid] = Seen(process, process.ppid())
                except psutil.Error:
                    continue
        for one in self.seen.values():
            one.look()

    def enter(self, stage: Stage) -> None:
        """A stage begins now."""
        if stage not in self.began:
            self.look()
            self.began[stage], self.spent[stage] = monotonic(), self.by_role()

    def by_role(self) -> dict[str, float]:
        """Seconds of every role so far."""
        total: dict[str, float] = {}
        children: dict[int, float] = {}
        for one in self.seen.values():
            if not one.process.is_running():
                children[one.parent] = children.get(one.parent, 0.0) + one.own + one.reaped
        for pid, one in self.seen.items():
            unseen = max(0.0, one.reaped - children.get(pid, 0.0))
            role = self._role(one)
            total[role] = total.get(role, 0.0) + one.own + unseen
        return total

    def _role(self, one: Seen) -> str:
        while not one.role and one.parent in self.seen:
            one = self.seen[one.parent]
            if one.role:
                return f"{one.role}: children"
        return one.role or "others"


def main() -> None:
    """Run once, and the peer if it is there, and print the tables."""
    peer = next((a.removeprefix("peer=") for a in sys.argv[1:] if a.startswith("peer=")), "")
    overrides = [a for a in sys.argv[1:] if not a.startswith("peer=")]
    with tempfile.TemporaryDirectory() as runs:
        given = [f"output_dir={runs}", "run_name=startup", "tracker=none", *DEFAULTS, *overrides]
        watch = watched([sys.executable, "-m", "launch.cli", "train", *given], PRINTED, Path(runs) / "startup")
        report(watch, json.loads((Path(runs) / "startup" / "summary.json").read_text()))
    if peer:
        folders = os.pathsep.join([str(ROOT), peer, os.environ.get("PYTHONPATH", "")])
        one_thread = f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '1')}"  # two wait for each other in a loop
        command = ["env", f"PYTHONPATH={folders}", one_thread, sys.executable, str(ROOT / "benchmarks" / "peer_trl.py")]
        report(watched([*command, str(STEPS)], PRINTED_BY_PEER))


def watched(command: Sequence[str], marks: Mapping[str, Stage], folder: Path | None = None) -> Watch:
    """Observations of one command; `marks` begin stages when they are printed, and so do the files in `folder`."""
    printed: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        watch, until = Watch(psutil.Process(run.pid)), monotonic() + DEADLINE_S
        watch.enter(Stage.PLAN)
        stream = run.stdout
        assert stream is not None
        reader = threading.Thread(target=lambda: printed.extend(iter(stream.readline, "")), daemon=True)
        reader.start()
        read = 0
        while run.poll() is None:
            if monotonic() > until:
                run.terminate()
                sys.exit(f"the run was not over within {DEADLINE_S:.0f} s")
            fresh, read = printed[read:], len(printed)
            for part, stage in marks.items():
                if any(part in line for line in fresh):
                    watch.enter(stage)
            if folder is not None:
                _by_files(watch, folder)
            watch.look()
            sleep(LOOK_S)
        reader.join(5.0)
        watch.ended = monotonic()
    if run.returncode or (marks is PRINTED_BY_PEER and Stage.FIRST not in watch.began):
        sys.exit(f"the run ended with {run.returncode}:\n" + "".join(printed)[-4000:])
    return watch


def report(watch: Watch, summary: Mapping[str, float] | None = None) -> None:
    """A row for each role, a column for each stage that the run had; below them the wall seconds."""
    stages = [stage for stage in Stage if stage in watch.began]
    at = [watch.spent[stage] for stage in stages] + [watch.by_role()]
    roles = sorted(at[-1], key=lambda role: -at[-1][role])
    table = Table("CPU seconds", *[stage.value for stage in stages], "all", title="one run by role and stage")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {role: [later.get(role, 0.0) - at[i].get(role, 0.0) for i, later in enumerate(at[1:])] for role in roles}
    for role, row in rows.items():
        table.add_row(role, *[f"{value:.2f}" for value in (*row, sum(row))])
    columns = [sum(row[i] for row in rows.values()) for i in range(len(stages))]
    table.add_row("all", *[f"{value:.2f}" for value in (*columns, sum(columns))])
    walls = [*[watch.began[stage] for stage in stages], watch.ended]
    wall = [later - earlier for earlier, later in pairwise(walls)]
    table.add_row("wall seconds", *[f"{value:.2f}" for value in (*wall, sum(wall))])
    console = Console(width=180)
    console.print(table)
    started = stages.index(Stage.FIRST) if Stage.FIRST in stages else len(stages)
    after = next((i for i, stage in enumerate(stages) if stage in (Stage.EXPORT, Stage.END)), len(stages))
    own = f" ({summary['first_step_s']:.1f} by the run's own summary)" if summary else ""
    later = sum(columns[i] for i, stage in enumerate(stages) if stage is Stage.STEPS) / (STEPS - WARM)
    console.print(
        f"to the first step: {sum(columns[:started]):.1f} CPU s, {sum(wall[:started]):.1f} wall s{own}\n"
        f"a later step, if there are {STEPS}: {later:.2f} CPU s\n"
        f"from the last step to the end: {sum(columns[after:]):.1f} CPU s, {sum(wall[after:]):.1f} wall s"
    )


def _by_files(watch: Watch, folder: Path) -> None:
    points = _lines(folder / "evaluations.jsonl")
    if points >= 1:
        watch.enter(Stage.FIRST)
    if _lines(folder / "metrics.jsonl") >= WARM:
        watch.enter(Stage.STEPS)
    if points >= 2 and Stage.AFTER in watch.began:
        watch.enter(Stage.END)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main()
