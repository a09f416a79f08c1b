"""`opd train` and `opd eval`: from overrides to a run directory."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from launch.artifacts import terminal
from launch.artifacts.evaluation_point import NOT_MEASURED, EvaluationPoint
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.run_lock import running
from launch.artifacts.summary import Outcome
from launch.checkpoint.places import check_place
from launch.checkpoint.resume import ResumePoint, open_directory, resumption, rewind, way_on
from launch.config.run_config import RunConfig, run_config
from launch.monitors.callbacks import MakeTracker
from launch.monitors.live_view import busy_words
from launch.monitors.run_log import logged
from launch.monitors.step_metrics import Meter
from launch.monitors.trackers import check_login
from launch.plan.hub import record
from launch.plan.plan import Plan, make_plan
from launch.report.next_steps import next_steps_text
from launch.run.costs import costs
from launch.run.evaluate import TrainingCost, make_evaluator
from launch.run.run import Run
from launch.run.session import open_session
from launch.services.failure_causes import ProcessFailed, find_own
from launch.services.ray_session.cluster import connected
from launch.services.ray_session.node import Node
from launch.services.signals import Preempted, StopRequest, guarded, run_until_stopped
from launch.services.stack_dumps import keep_traceback
from opd.errors import OpdError
from opd.evaluation.estimates import LEVEL


def run_training(overrides: Sequence[str]) -> int:
    """`opd train`: returns the exit code; errors are raised as sentences."""
    config = run_config(overrides)
    console = terminal.console()
    plan, resumed = checked(config, console)
    if config.dry_run:
        console.print(plan.table())
        plan.show_rate(console)
        if resumed is not None:
            console.print(f"would go on from {resumed.checkpoint}", soft_wrap=True, markup=False, highlight=False)
    plan.show_prompts(console)
    if config.dry_run:
        return 0
    directory = train_once(plan, console)
    console.print(next_steps_text(directory), soft_wrap=True, markup=False, highlight=False)
    return 0


def checked(config: RunConfig, console: Console) -> tuple[Plan, ResumePoint | None]:
    """Plan of a run whose login and place are good, and of a dry run from where it would go on.

    A run that is meant finds that itself, when it opens its directory.
    """
    check_login(config.tracker)
    check_place(config)
    plan = make_plan(config)
    return plan, resumption(plan.config, console) if config.dry_run else None


def run_evaluation(overrides: Sequence[str], output: Path | None = None) -> int:
    """`opd eval`: measure `student.path` on the held-out prompts, and print the figures; as JSON in `output`."""
    config = run_config(overrides)
    plan = make_plan(config)
    console = terminal.console()
    plan.show_prompts(console)
    if config.dry_run:
        console.print(plan.table())
        return 0
    points = evaluate_once(plan)
    for point in points:
        for line in _figures(point):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if output:
        output.write_text(json.dumps([point.as_json() for point in points], indent=1) + "\n")
    return 0


def _figures(point: EvaluationPoint) -> Iterator[str]:
    """Lines of one evaluation: its fields, and every share with its interval."""
    if point.set:
        yield f"\n{point.set}"
    for name, value in point.as_json().items():
        if name == "estimates":
            for full, one in point.estimates.items():
                yield f"{full:16} {one.value:.4f}, {LEVEL:.0%} interval {one.low:.4f} to {one.high:.4f}"
        else:
            yield f"{name:16} {NOT_MEASURED if value is None else value}"


def evaluate_once(plan: Plan) -> list[EvaluationPoint]:
    """Figures of the plan's student on every evaluation set, without training."""

    async def measure() -> list[EvaluationPoint]:
        session = await open_session(plan)
        try:
            evaluator = make_evaluator(plan, session)
            cost = TrainingCost(totals=Meter(costs(plan)).totals, cpu_s=0.0)
            return [point async for point in evaluator.student(0, cost)]
        finally:
            session.close()

    with connected(plan.config.cluster):
        return run_until_stopped(measure())


def train_once(plan: Plan, console: Console, *, whole: str = "", trackers: Sequence[MakeTracker] = ()) -> RunDirectory:
    """Train a whole run in a new run directory, or the rest of one in its own; its summary records the outcome.

    `whole` is the name of the run that it is a stage of: that is what goes on if it does not finish. `trackers` are
    more than the settings name.
    """
    config = plan.config
    resumed = resumption(config, console)
    directory = open_directory(config, resumed, console)
    with running(directory.path), logged(console, directory.log):
        if resumed is not None and resumed.same_run:
            rewind(directory, resumed, config.steps)
            console.print(f"run {directory.path}: going on after step {resumed.state.step}", soft_wrap=True)
        if resumed is not None and resumed.changed:
            directory.add_changes(resumed.changed)
        directory.write_config(config.text)
        directory.write_command(config.overrides)
        record(directory.path, plan.hub)
        _train(plan, directory, console, resumed, whole, trackers)
    return directory


def _train(
    plan: Plan,
    directory: RunDirectory,
    console: Console,
    resumed: ResumePoint | None,
    whole: str,
    trackers: Sequence[MakeTracker],
) -> None:
    stop = StopRequest(plan.config.grace_s, lambda sentence: console.print(sentence, soft_wrap=True, highlight=False))
    run = Run(plan, directory, console, stop, resumed, trackers)
    outcome, problem = Outcome.FAILED, ""
    try:
        _in_session(plan, run, stop)
        outcome = Outcome.FINISHED
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        outcome = Outcome.STOPPED
        error.add_note(way_on(directory, run.rescued, whole))
        raise
    except BaseException as error:
        own = find_own(error)
        outcome = Outcome.STOPPED if isinstance(own, Preempted) else Outcome.FAILED
        problem = "" if isinstance(own, Preempted) else str(own or f"{type(error).__name__}: {error}")[:2000]
        if not isinstance(own, OpdError) or isinstance(own, ProcessFailed):
            error.add_note(keep_traceback(directory.failure, error))
        error.add_note(way_on(directory, run.rescued, whole))
        raise
    finally:
        summary = run.summary(outcome, problem)
        summary.write(directory)
        _report(directory)
        if summary.verdict:
            console.print(
                f"busy: {busy_words(summary.utilization)}\n{summary.verdict}", soft_wrap=True, highlight=False
            )


def _in_session(plan: Plan, run: Run, stop: StopRequest) -> None:
    """Train within a Ray session; a failure after the export is a warning, since training has done its work."""

    async def watch(node: Node) -> None:
        try:
            await node.watch()
        except OpdError:
            run.ray_is_gone()
            raise

    try:
        with connected(plan.config.cluster) as node:
            run_until_stopped(guarded(run.everything(), watch(node)), stop)
    except Exception as error:
        if not run.exported:
            raise
        run.warn("what comes after training", error)


def _report(directory: RunDirectory) -> None:
    from launch.report.report import write_report  # matplotlib takes a second, which a run need not wait for

    write_report(directory)
