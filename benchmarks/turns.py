"""Memory of every role in every phase of a step, with all roles resident and with roles that take turns.

    python benchmarks/turns.py [WIDTH] [OVERRIDE ...]      (default: 768)

Makes a random student of 6 layers and a random teacher of 8 that are WIDTH wide, with the tokenizer of the demo, and
goes through two steps of the demo phase by phase, once for each value of `cluster.share`; the second is measured. A
process counts with its proportional set size (`Pss` of /proc/PID/smaps_rollup), in which memory that processes share is
counted once. A role is shown as it is at the end of a phase, all together at the worst moment.
"""

import asyncio
import shutil
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep

import psutil
import torch
from rich.console import Console
from rich.table import Table

from launch.config.run_config import run_config
from launch.config.settings import Sharing
from launch.config.shipped_files import shipped
from launch.plan.plan import make_plan
from launch.run.session import Session, open_session
from launch.services.ray_session.cluster import connected
from opd.method.method import packed, scored, weighed
from opd.types import Prompt

LOOK_S = 0.1
MIB = 2**20
STUDENT_LAYERS, TEACHER_LAYERS = 6, 8
ACTORS = {"engine": "ray::VLLMEngine", "teacher": "ray::TorchTeacher", "learner": "ray::LearnerRank"}
SMALL = ("steps=3", "evaluation.teacher=false", "prompts.prompts_per_step=4", "max_tokens=32")
PHASES = ("generate", "score", "train", "publish", "generate again")


@dataclass(slots=True)
class Seen:
    """Bytes that each role held at the end of a phase, and all together at most; and the phase's seconds."""

    processes: dict[str, int]
    at_end: dict[str, dict[str, int]] = field(default_factory=dict)
    at_once: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    phase: str = ""
    over: bool = False

    def watch(self) -> None:
        """Look at all processes until it is `over`."""
        while not self.over:
            phase, held = self.phase, {role: held_by(pid) for role, pid in self.processes.items()}
            if phase and phase == self.phase:
                self.at_once[phase] = max(sum(held.values()), self.at_once.get(phase, 0))
            sleep(LOOK_S)

    @asynccontextmanager
    async def during(self, phase: str) -> AsyncIterator[None]:
        """A phase of the step that is measured ("": of another)."""
        began, self.phase = perf_counter(), phase
        yield
        self.phase = ""
        if phase:
            self.seconds[phase] = perf_counter() - began
            self.at_end[phase] = {role: held_by(pid) for role, pid in self.processes.items()}
            self.at_once[phase] = max(sum(self.at_end[phase].values()), self.at_once.get(phase, 0))


def held_by(pid: int) -> int:
    """Proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Both ways of sharing, and a table of each."""
    given = sys.argv[1:]
    width = int(given.pop(0)) if given and given[0].isdigit() else 768
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        models = [model(Path(folder), name, width, n) for name, n in (("s", STUDENT_LAYERS), ("t", TEACHER_LAYERS))]
        sizes = " and ".join(f"{size / MIB:.0f} MiB" for _, size in models)
        console.print(f"student and teacher with {sizes} of float32 weights", highlight=False)
        paths = [f"{part}.path={path}" for part, (path, _) in zip(("student", "teacher"), models, strict=True)]
        for share in Sharing:
            seen = measured([*paths, f"cluster.share={share.name}", *given])
            console.print(table(share, seen))


def model(folder: Path, name: str, width: int, layers: int) -> tuple[Path, int]:
    """A random model with the tokenizer of the demo, and the bytes of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    demo = shipped("assets") / "shop" / "student"
    path = Path(shutil.copytree(demo, folder / name, ignore=shutil.ignore_patterns("*.safetensors")))
    config = AutoConfig.from_pretrained(demo)
    config.hidden_size, config.intermediate_size = width, 4 * width
    config.num_hidden_layers, config.num_attention_heads = layers, max(1, width // config.head_dim)
    config.num_key_value_heads, config.layer_types = config.num_attention_heads, None
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), "layer_types": None}))
    made.save_pretrained(path)
    return path, 4 * sum(p.numel() for p in made.parameters())


def measured(overrides: Sequence[str]) -> Seen:
    """Two steps, the second phase by phase."""
    plan = make_plan(run_config(["experiment=shop", *SMALL, *overrides]))

    async def steps() -> Seen:
        session = await open_session(plan)
        seen = Seen(processes())
        watching = threading.Thread(target=seen.watch)
        watching.start()
        try:
            await session.learner.publish(session.engines.student, 0)
            for step in range(2):
                await one_step(session, seen, step, measure=step == 1)
        finally:
            seen.over = True
            watching.join()
            session.close()
        return seen

    with connected(plan.config.cluster):
        return asyncio.run(steps())


def processes() -> dict[str, int]:
    """Process id of each role's actor, by the name that Ray gives to processes."""
    below = [(one.pid, " ".join(one.cmdline())) for one in psutil.Process().children(recursive=True)]
    return {role: next(pid for pid, command in below if part in command) for role, part in ACTORS.items()}


async def one_step(session: Session, seen: Seen, step: int, *, measure: bool) -> None:
    """Generate, score, train, publish, and begin to generate again."""
    config, context, learner = session.plan.config, session.context(step), session.learner
    phases = iter(PHASES if measure else [""] * len(PHASES))
    prompts: list[Prompt] = list(config.prompts(step, session.plan.sources))
    async with seen.during(next(phases)):
        written = list(await config.method.rollout(prompts, context))
    async with seen.during(next(phases)):
        items = await scored(config.method, written, context)
    async with seen.during(next(phases)):
        terms = weighed(config.method, items, context, {})
        batches = packed(config.method, items, terms, learner.layout, turn="")
        await config.method.update(learner, batches, config.method.loss_at(context), context)
    async with seen.during(next(phases)):
        await learner.publish(session.engines.student, step + 1)
    async with seen.during(next(phases)):
        await config.method.rollout(prompts[:1], context)


def table(share: Sharing, seen: Seen) -> Table:
    """A row for each phase, a column for each role."""
    roles = list(seen.processes)
    shown = Table("MiB", *roles, "all, at most", "seconds", title=f"cluster.share={share.name}")
    for column in shown.columns[1:]:
        column.justify = "right"
    for phase in PHASES:
        held = [f"{seen.at_end[phase][role] / MIB:.0f}" for role in roles]
        shown.add_row(phase, *held, f"{seen.at_once[phase] / MIB:.0f}", f"{seen.seconds[phase]:.1f}")
    peak, total = max(seen.at_once.values()), sum(seen.seconds.values())
    shown.add_row("the whole step", *[""] * len(roles), f"{peak / MIB:.0f}", f"{total:.1f}", style="bold")
    return shown


if __name__ == "__main__":
    main()
