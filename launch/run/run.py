"""One run while it lasts: start everything, train, evaluate, save, export, stop everything."""

import asyncio
import gc
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

import yaml
from rich.console import Console

from launch.artifacts.checkpoint_state import DriverState, described
from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory, write_text
from launch.artifacts.summary import Outcome, RunSummary
from launch.checkpoint.best import best_so_far
from launch.checkpoint.resume import ResumePoint, fingerprints, history
from launch.checkpoint.saver import Retention, Saver
from launch.checkpoint.step_end import Boundary, until_spent
from launch.config.run_config import DEFAULT, RunConfig
from launch.monitors.accounting import TrainingCpu
from launch.monitors.callbacks import CallbackTracker, MakeTracker
from launch.monitors.progress import Progress, due_sets
from launch.monitors.step_metrics import Meter
from launch.monitors.trace import TraceTracker
from launch.monitors.tracked_run import PlannedRun, Tracker
from launch.monitors.trackers import make_trackers
from launch.plan.environment import package_versions
from launch.plan.hub import model_key, sized
from launch.plan.plan import Plan
from launch.run.costs import costs
from launch.run.doctor import as_json, consult
from launch.run.evaluate import Evaluator, TrainingCost, make_evaluator
from launch.run.export import export_student, write_card
from launch.run.session import Session, open_session
from launch.run.step_roofline import staffing, step_limit
from launch.services.failure_causes import brief, find_own
from launch.services.signals import StopRequest
from launch.services.stack_dumps import StackDumps
from opd.loop.ledger import Ledger
from opd.loop.train import StepRecord, train

SPARE = "opd-rescued-"  # begins the name of a folder for a last step that cannot be written in its place


class Run:
    """The state of one run while it lasts: what is known so far, for the summary."""

    def __init__(
        self,
        plan: Plan,
        directory: RunDirectory,
        console: Console,
        stop: StopRequest,
        resumed: ResumePoint | None,
        trackers: Sequence[MakeTracker] = (),
    ) -> None:
        self._plan, self._directory, self._console = plan, directory, console
        self._config: RunConfig = plan.config
        self._stop, self._resumed, self._make_more = stop, resumed, trackers
        self._before = resumed.state if resumed else None
        self._first = self._before.step if self._before else 0  # steps that are done
        self._ledger = Ledger.from_json(self._before.ledger) if self._before else Ledger()
        self._ledger.reopen()  # what was outstanding is asked for again
        self._fingerprints: asyncio.Task[dict[str, str]] | None = None
        self._started = float(os.environ.pop("OPD_STARTED", monotonic()))  # of the program, for its first run
        self._start: EvaluationPoint | None = None
        self._end: EvaluationPoint | None = None
        self._teacher: EvaluationPoint | None = None
        self._best = best_so_far(self._config, directory)
        self._last: StepRecord | None = None
        self._session: Session | None = None
        self._boundary: Boundary | None = None
        self._warnings: list[str] = []
        self.exported = False  # the student lies in export/: what comes now is measured only
        self._meter = self._new_meter(lambda: 0.0)
        self._ready_s = self._first_step_s = 0.0

    def _new_meter(self, read_cpu: Callable[[], float]) -> Meter:
        spending = costs(self._plan)
        meter = Meter(
            spending,
            before=self._before.totals if self._before else None,
            read_cpu=read_cpu,
            staffing=staffing(self._plan),
            limit=step_limit(self._plan, spending),
        )
        meter.recall(history(self._directory))
        return meter

    async def everything(self) -> None:
        """Start, measure, train, export, measure again."""
        plan, config = self._plan, self._config
        self._say(f"run {self._directory.path}: starting {config.method.name} ...")
        # Read meanwhile; a large teacher takes minutes. Known already where a checkpoint was compared with them.
        self._fingerprints = asyncio.create_task(asyncio.to_thread(fingerprints, config))
        self._say("loading the student and its teachers ...")
        stacks = StackDumps(self._directory.stacks)
        session = self._session = await open_session(plan, stacks, self._directory.path.resolve())
        gc.collect()
        gc.freeze()  # what start-up made stays: no garbage collection need look at it at every step
        try:
            self._ready_s = monotonic() - self._started
            await self._see_doctor(session)
            if self._resumed is not None:
                await session.restore(self._resumed.checkpoint, self._resumed.state.followers)
            cpu = TrainingCpu()
            self._meter = self._new_meter(cpu)
            with ExitStack() as stack:
                trackers = self._trackers(stack)
                evaluator = make_evaluator(plan, session)
                await self._measure_start(session, evaluator, trackers, cpu)
                self._first_step_s = monotonic() - self._started
                await self._train(session, evaluator, trackers, cpu)
                await self._export(session)
                await self._measure_end(session, evaluator, trackers, cpu)
        finally:
            gc.unfreeze()
            self._fingerprints.cancel()
            session.close()

    async def _export(self, session: Session) -> None:
        """Before anything else is measured: from here on nothing that was trained can be lost."""
        self._say(f"exporting the student to {self._directory.export} ...")
        await export_student(session.learner, self._directory, self._facts(), None)
        self.exported = True

    async def _measure_end(
        self, session: Session, evaluator: Evaluator, trackers: Sequence[Tracker], cpu: TrainingCpu
    ) -> None:
        """Run the last evaluation and report; they may fail, for the student is trained and exported."""
        with self._warned("the student's last evaluation"):
            self._say("last evaluation of the student ...")
            await self._measure_student(evaluator, trackers, cpu, self._done)
            write_card(self._directory, self._facts(), self._end)
        if _teacher_can_be_measured(self._plan):
            with self._warned("the evaluation of the teacher (evaluation.teacher=false leaves it out)"):
                self._say("evaluation of the teacher ...")
                await self._measure_teacher(session, evaluator, trackers)

    @contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (it is a warning; the run has done its work)
            self.warn(what, error)

    def warn(self, what: str, error: Exception) -> None:
        """Something after the export has failed."""
        own = find_own(error)
        sentence = f"{what} failed: {own or brief(error)}; the student is trained and exported all the same"
        self._warnings.append(sentence)
        self._say(f"warning: {sentence}")

    def _say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    async def _measure_start(
        self, session: Session, evaluator: Evaluator, trackers: Sequence[Tracker], cpu: TrainingCpu
    ) -> None:
        """The student before the first step of this directory; of a run that goes on, what was measured then."""
        data = RunData.read(self._directory)
        if data.student:
            self._start, self._end = data.before_training, data.student[-1]
            return
        if not self._config.evaluation.on_start:
            return self._say("first evaluation: left out (evaluation.on_start=false)")
        self._say("first evaluation ...")
        if self._first:  # another run's student: no step of this one has published it yet
            await session.learner.publish(session.engines.student, self._first)
        await self._measure_student(evaluator, trackers, cpu, self._first)
        self._start = self._end
        if self._end is not None and self._end.truncation_rate == 1:
            self._say(
                f"first evaluation: not one answer ended within {self._end.max_tokens} tokens; if they are meant to be "
                "shorter, the student ends texts with another token than those that end them here (eos_token_id)"
            )

    async def _see_doctor(self, session: Session) -> None:
        if not (self._config.doctor or self._config.doctor_everything):
            self._say("doctor: skipped (doctor=false); nothing says that this teacher fits")
            return
        self._say("examining the teacher (doctor) ...")
        write_text(self._directory.path / "doctor.json", as_json(await consult(session, self._console)))

    def _trackers(self, stack: ExitStack) -> list[Tracker]:
        config = self._config
        made = make_trackers(
            config.tracker,
            self._directory,
            self._meter,
            PlannedRun(
                method=config.method.name,
                steps=config.steps,
                resolved=yaml.safe_load(config.text),
                decode=self._plan.sources.tokenizer.decode,
                first=self._first,
            ),
            self._console,
        )
        traced = [TraceTracker(self._directory)] if config.trace else []
        more = [make(self._meter, config.steps) for make in self._make_more]
        return [stack.enter_context(tracker) for tracker in (*made, *traced, *more)]

    async def _train(
        self, session: Session, evaluator: Evaluator, trackers: Sequence[Tracker], cpu: TrainingCpu
    ) -> None:
        config = self._config
        store = CheckpointStore(self._directory.checkpoints)
        retention = Retention(
            keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every, best=lambda: self._best.kept
        )
        saver = Saver(store, session.learner, session.followers, retention, self._first)
        progress = self._progress()
        boundary = self._boundary = Boundary(
            config,
            saver,
            self._stop,
            self._state_of,
            cpu.apart,
            self._first,
            elsewhere=rescue_folders(config, self._directory),
            spent=lambda: progress.spent or any(t.stops for t in trackers if isinstance(t, CallbackTracker)),
            best=lambda step: self._best.step == step,
        )

        async def remember(record: StepRecord) -> None:
            self._last = record
            boundary.ended(record)

        async def measure(record: StepRecord) -> None:
            due = due_sets(config.evaluation, record.step, config.steps, main=progress.see(self._meter(record)))
            if due and record.live and not progress.spent:
                await self._measure_student(evaluator, trackers, cpu, record.step, due)

        self._stop.waits = True
        try:
            with until_spent():
                await train(
                    config.method,
                    config.prompts,
                    self._plan.sources,
                    session.engines,
                    session.learner,
                    [remember, *trackers, measure, boundary],
                    start=self._first,
                    steps=config.steps,
                    seed=config.seed,
                    schedule=config.staleness_schedule,
                    ledger=self._ledger,
                )
            await saver.finish()
            await boundary.stop_if_asked()
        except BaseException as error:
            await boundary.rescue(error, session.learner)
            raise
        finally:
            self._stop.waits = False

    def _progress(self) -> Progress:
        config, lines = self._config, history(self._directory)
        state = {"step": float(self._first), **self._before.totals} if self._before else None
        return Progress(
            config.stop_after,
            config.steps,
            parts=config.evaluation.parts,
            every=config.evaluation.every,
            before=lines[-1] if lines else state,
        )

    @property
    def _done(self) -> int:
        """Number of steps done."""
        return self._last.step if self._last else self._first

    def ray_is_gone(self) -> None:
        """Record that Ray is gone: no actor can be called any more."""
        if self._boundary is not None:
            self._boundary.hopeless = True

    @property
    def rescued(self) -> Path | None:
        """Folder of the last step, if it could not be written in its place."""
        return None if self._boundary is None else self._boundary.rescued

    async def _state_of(self, step: int) -> DriverState:
        return self._state(step, await self._known())

    async def _known(self) -> dict[str, str]:
        assert self._fingerprints is not None
        return await self._fingerprints

    def _state(self, step: int, teachers: Mapping[str, str]) -> DriverState:
        return DriverState(
            run_name=self._directory.name,
            step=step,
            ledger=self._ledger.to_json(),
            totals=self._meter.as_before(),
            wall_s=self._wall_s(),
            teachers=teachers,
            config=described(self._config),
        )

    def _wall_s(self) -> float:
        return monotonic() - self._started + (self._before.wall_s if self._before else 0.0)

    async def _measure_student(
        self,
        evaluator: Evaluator,
        trackers: Sequence[Tracker],
        cpu: TrainingCpu,
        step: int,
        due: Collection[str] | None = None,
    ) -> None:
        """The student on the sets that are `due`; None: on all, before or after training."""
        cost = TrainingCost(totals=self._meter.totals, cpu_s=cpu())
        config = self._config
        first = next(iter(config.evaluation.by_name))  # which stands for the run
        with cpu.apart():
            async for point in evaluator.student(step, cost, due=due, between=due is not None):
                self._end = point if point.set == first else self._end
                if step and config.staleness_schedule.may_checkpoint(step):
                    self._best.see(point)
                _tell(trackers, point)

    async def _measure_teacher(self, session: Session, evaluator: Evaluator, trackers: Sequence[Tracker]) -> None:
        writers = {name: await session.teacher_writer(name) for name in evaluator.teachers}
        async for point in evaluator.teacher(writers):
            self._teacher = self._teacher or point
            _tell(trackers, point)

    def _facts(self) -> dict[str, str]:
        plan, config = self._plan, self._config
        teachers = sum(teacher.replicas for teacher in config.teachers.values())
        return {
            "method": config.method.name,
            "student": sized(plan.hub, "student.path", plan.student_params),
            **{
                "teacher" if name == DEFAULT else f"teacher {name}": sized(plan.hub, model_key(name), params)
                for name, params in plan.teacher_params.items()
            },
            "prompts": type(config.prompts).__name__,
            "seed": str(config.seed),
            "learning rate": f"{config.learner.lr:g}",
            "processes": f"{config.student.replicas} rollout, {teachers} teacher, "
            f"{config.learner.ranks} learner (ZeRO-{config.learner.stage})",
        }

    def summary(self, outcome: Outcome, problem: str) -> RunSummary:
        """Summary of the run as known now."""
        totals = self._meter.totals
        return RunSummary(
            run_name=self._directory.name,
            method=self._config.method.name,
            outcome=outcome,
            steps=self._done,
            seed=self._config.seed,
            wall_s=self._wall_s(),
            ready_s=self._ready_s,
            first_step_s=self._first_step_s,
            cpu_s=self._meter.cpu_seconds(),
            tokens=totals.completion,
            flops=totals.flops,
            student_start=self._start,
            student_end=self._end,
            teacher=self._teacher,
            facts=self._facts(),
            ledger=self._last.ledger if self._last else self._ledger.summary(),
            versions=package_versions(),
            notes=(*self._config.notes, *self._directory.read_changes()),
            alerts=(*self._meter.ever.values(), *(self._session.faults if self._session else ()), *self._warnings),
            error=problem,
            utilization=self._meter.usage,
            verdict=self._meter.verdict,
        )


def rescue_folders(config: RunConfig, directory: RunDirectory) -> list[Path]:
    """Folders for the last step if `checkpoints/` cannot be written.

    One is beside it; where all ranks work on this machine, another is in the temporary folder.
    """
    spare = Path(tempfile.gettempdir()) / f"{SPARE}{directory.name}-{os.getpid()}"
    return [directory.rescued, *([spare] if config.cluster.address == "local" else [])]


def _teacher_can_be_measured(plan: Plan) -> bool:
    """It is wanted, and what stands in its folder is the teacher that taught."""
    fixed = not any(teacher.mixup for teacher in plan.config.teachers.values())
    return plan.config.evaluation.teacher and fixed and all(map(plan.writes, plan.config.teachers))


def _tell(trackers: Sequence[Tracker], point: EvaluationPoint) -> None:
    for tracker in trackers:
        tracker.evaluated(point)
