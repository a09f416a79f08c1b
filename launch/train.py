"""One run from plan to summary: start everything, train, evaluate, export, report, stop everything."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import strftime, time

import yaml
from rich.console import Console

from launch.accounting import Costs, process_tree_cpu_seconds
from launch.cluster import connected
from launch.config import DEFAULT, RunConfig, run_config
from launch.doctor import as_json, consult
from launch.environment import package_versions
from launch.evaluate import Evaluator, Spent
from launch.evaluation_point import EvaluationPoint
from launch.export import export_student
from launch.limit import staffing, step_limit
from launch.live_view import busy_words
from launch.metrics import Meter
from launch.plan import Plan, make_plan
from launch.run_directory import RunDirectory, write_text
from launch.running import run_until_stopped
from launch.sentences import find_own
from launch.session import Session, open_session
from launch.summary import Outcome, RunSummary
from launch.trace import TraceTracker
from launch.tracking import RunPlan, Tracker, check_login, make_trackers
from opd.ledger import Ledger
from opd.loop import StepRecord, train
from opd.scorers.ensemble import Ensemble
from opd.types import TokenScores


def run_training(overrides: Sequence[str]) -> int:
    """`opd train`: returns the exit code; errors are raised as sentences."""
    config = run_config(overrides)
    check_login(config.tracker)
    plan = make_plan(config)
    console = Console()
    if config.dry_run:
        console.print(plan.table())
        return 0
    directory = train_once(plan, console)
    console.print(f"report: {directory.report}\nstudent: {directory.export}", soft_wrap=True)
    return 0


def run_evaluation(overrides: Sequence[str]) -> int:
    """`opd eval`: measure `student.path` on the held-out prompts, and print the figures."""
    config = run_config(overrides)
    plan = make_plan(config)
    console = Console()
    if config.dry_run:
        console.print(plan.table())
        return 0

    async def measure() -> EvaluationPoint:
        session = await open_session(plan)
        try:
            evaluator = _evaluator(plan, session)
            meter = Meter(_costs(plan))
            return await evaluator.student(0, config.evaluation.samples, Spent(totals=meter.totals, cpu_s=0.0))
        finally:
            session.close()

    with connected(config.cluster):
        point = run_until_stopped(measure())
    for name, value in point.as_json().items():
        console.print(f"{name:16} {value}", highlight=False)
    return 0


def train_once(plan: Plan, console: Console) -> RunDirectory:
    """A whole run in a new run directory; its summary says how it ended, whatever happens."""
    config = plan.config
    name = config.run_name or f"{config.method.name}-{strftime('%Y%m%d-%H%M%S')}"
    directory = RunDirectory.create(Path(config.output_dir), name)
    directory.write_config(config.text)
    run = _Run(plan, directory, console)
    outcome, problem = Outcome.FAILED, ""
    try:
        with connected(config.cluster):
            run_until_stopped(run.everything())
        outcome = Outcome.FINISHED
    except (KeyboardInterrupt, asyncio.CancelledError):
        outcome = Outcome.STOPPED
        raise
    except BaseException as error:
        problem = str(find_own(error) or f"{type(error).__name__}: {error}")[:2000]
        raise
    finally:
        summary = run.summary(outcome, problem)
        summary.write(directory)
        _report(directory)
        if summary.verdict:
            console.print(
                f"busy: {busy_words(summary.utilisation)}\n{summary.verdict}", soft_wrap=True, highlight=False
            )
    return directory


def _report(directory: RunDirectory) -> None:
    from launch.report import write_report  # matplotlib takes a second, which a run need not wait for

    write_report(directory)


class _Cpu:
    """Processor seconds of training: start-up, evaluation and export apart."""

    def __init__(self) -> None:
        self._apart = process_tree_cpu_seconds()

    def __call__(self) -> float:
        return process_tree_cpu_seconds() - self._apart

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is not counted."""
        before = process_tree_cpu_seconds()
        try:
            yield
        finally:
            self._apart += process_tree_cpu_seconds() - before


class _Run:
    """The state of one run while it lasts: what is known so far, for the summary."""

    def __init__(self, plan: Plan, directory: RunDirectory, console: Console) -> None:
        self._plan, self._directory, self._console = plan, directory, console
        self._config: RunConfig = plan.config
        self._started = float(os.environ.pop("OPD_STARTED", time()))  # the first run counts the start of the program
        self._start: EvaluationPoint | None = None
        self._end: EvaluationPoint | None = None
        self._teacher: EvaluationPoint | None = None
        self._last: StepRecord | None = None
        self._meter = Meter(_costs(plan), read_cpu=lambda: 0.0)
        self._ready_s = self._first_step_s = 0.0

    async def everything(self) -> None:
        """Start, measure, train, measure again, export."""
        plan, config = self._plan, self._config
        self._console.print(f"run {self._directory.path}: starting {config.method.name} ...")
        session = await open_session(plan)
        try:
            self._ready_s = time() - self._started
            await self._see_doctor(session)
            cpu = _Cpu()
            costs = _costs(plan)
            self._meter = Meter(costs, read_cpu=cpu, staffing=staffing(plan), limit=step_limit(plan, costs))
            with ExitStack() as stack:
                trackers = self._trackers(stack)
                evaluator = _evaluator(plan, session)
                await self._measure_student(evaluator, trackers, cpu, 0, config.evaluation.samples)
                self._start = self._end
                self._first_step_s = time() - self._started
                await self._train(session, evaluator, trackers, cpu)
                await self._measure_student(evaluator, trackers, cpu, config.steps, config.evaluation.samples)
                if _teacher_can_be_measured(plan):
                    await self._measure_teacher(session, evaluator, trackers)
            await session.learner.save(self._directory.checkpoints / f"step_{config.steps}", config.steps)
            await export_student(session.learner, self._directory, self._facts(), self._end)
        finally:
            session.close()

    async def _see_doctor(self, session: Session) -> None:
        if not self._config.doctor:
            self._console.print("doctor: skipped (doctor=false); nothing says that this teacher fits")
            return
        findings = await consult(session, self._console)
        write_text(self._directory.path / "doctor.json", as_json(findings))

    def _trackers(self, stack: ExitStack) -> list[Tracker]:
        config = self._config
        made = make_trackers(
            config.tracker,
            self._directory,
            self._meter,
            RunPlan(
                method=config.method.name,
                steps=config.steps,
                resolved=yaml.safe_load(config.text),
                decode=self._plan.sources.tokenizer.decode,
            ),
            self._console,
        )
        traced = [TraceTracker(self._directory)] if config.trace else []
        return [stack.enter_context(tracker) for tracker in (*made, *traced)]

    async def _train(self, session: Session, evaluator: Evaluator, trackers: Sequence[Tracker], cpu: _Cpu) -> Ledger:
        config = self._config

        async def remember(record: StepRecord) -> None:
            self._last = record

        async def measure(record: StepRecord) -> None:
            due = config.evaluation.every and record.step % config.evaluation.every == 0
            if due and record.step < config.steps:
                await self._measure_student(evaluator, trackers, cpu, record.step, 1)

        async def checkpoint(record: StepRecord) -> None:
            due = config.checkpoint_every and record.step % config.checkpoint_every == 0
            if due and record.step < config.steps:
                with cpu.apart():
                    await session.learner.save(self._directory.checkpoints / f"step_{record.step}", record.step)

        return await train(
            config.method,
            config.prompts,
            self._plan.sources,
            session.engines,
            session.learner,
            [remember, *trackers, measure, checkpoint],
            start=0,
            steps=config.steps,
            pipeline=config.pipeline,
        )

    async def _measure_student(
        self, evaluator: Evaluator, trackers: Sequence[Tracker], cpu: _Cpu, step: int, samples: int
    ) -> None:
        spent = Spent(totals=self._meter.totals, cpu_s=cpu())
        with cpu.apart():
            self._end = await evaluator.student(step, samples, spent)
        _tell(trackers, self._end)

    async def _measure_teacher(self, session: Session, evaluator: Evaluator, trackers: Sequence[Tracker]) -> None:
        writers = {name: await session.teacher_writer(name) for name in evaluator.teachers}
        self._teacher = await evaluator.teacher(writers)
        _tell(trackers, self._teacher)

    def _facts(self) -> dict[str, str]:
        plan, config = self._plan, self._config
        teachers = sum(teacher.replicas for teacher in config.teachers.values())
        return {
            "method": config.method.name,
            "student": f"{plan.student_params / 1e6:.2f}M parameters",
            **{
                "teacher" if name == DEFAULT else f"teacher {name}": f"{params / 1e6:.2f}M parameters"
                for name, params in plan.teacher_params.items()
            },
            "prompts": type(config.prompts).__name__,
            "seed": str(config.seed),
            "learning rate": f"{config.learner.lr:g}",
            "processes": f"{config.student.replicas} rollout, {teachers} teacher, "
            f"{config.learner.ranks} learner (ZeRO-{config.learner.zero_stage})",
        }

    def summary(self, outcome: Outcome, problem: str) -> RunSummary:
        """What is known now."""
        totals = self._meter.totals
        return RunSummary(
            run_name=self._directory.name,
            method=self._config.method.name,
            outcome=outcome,
            steps=self._last.step if self._last else 0,
            seed=self._config.seed,
            wall_s=time() - self._started,
            ready_s=self._ready_s,
            first_step_s=self._first_step_s,
            cpu_s=self._meter.cpu_seconds(),
            tokens=totals.completion,
            flops=totals.flops,
            student_start=self._start,
            student_end=self._end if self._start is not None else None,
            teacher=self._teacher,
            facts=self._facts(),
            ledger=self._last.ledger if self._last else Ledger().summary(),
            versions=package_versions(),
            notes=tuple(self._config.notes),
            alarms=tuple(self._meter.ever.values()),
            error=problem,
            utilisation=self._meter.usage,
            verdict=self._meter.verdict,
        )


def _teacher_can_be_measured(plan: Plan) -> bool:
    """It is wanted, and what stands in its folder is the teacher that taught."""
    fixed = not any(teacher.mixup for teacher in plan.config.teachers.values())
    return plan.config.evaluation.teacher and fixed and bool(plan.teacher_params)


def _tell(trackers: Sequence[Tracker], point: EvaluationPoint) -> None:
    for tracker in trackers:
        tracker.evaluated(point)


def _evaluator(plan: Plan, session: Session) -> Evaluator:
    return Evaluator(plan.config.evaluation, plan.sources, session.engines, session.learner, exact_kl=plan.exact_kl)


def _costs(plan: Plan) -> Costs:
    rollout, scorer, params = plan.config.method.rollout, plan.config.method.scorer, plan.teacher_params
    members = list(scorer.shares) if isinstance(scorer, Ensemble) else []
    return Costs(
        student_params=plan.student_params,
        teacher_params=sum(params[name] for name in members) if members else params[DEFAULT],
        by_teacher={} if members or len(params) == 1 else params,
        teacher_writes=rollout.needs_writer,
        teacher_reads=issubclass(scorer.produces, TokenScores),
    )
