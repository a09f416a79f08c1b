"""Checks of teachers before training: `opd doctor`, and the same checks at the start of every run."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.artifacts import terminal
from launch.config.run_config import run_config
from launch.plan.checks.numbers import engine_dtype, narrow, part_dtype
from launch.plan.plan import Plan, make_plan
from launch.run.session import Session, open_session, take_turns, teacher_actor
from launch.services.pools import StudentPool, TeacherPool
from launch.services.ray_session.cluster import connected, end
from launch.services.signals import run_until_stopped
from opd.doctor.examine import examine, teacher_gain
from opd.doctor.findings import CheckThresholds, Finding, Subject, Verdict
from opd.doctor.rollout_checks import method_texts
from opd.errors import DataError
from opd.ports import LogprobTeacher
from opd.settings.devices import Device
from opd.types import Prompt
from teacher_service.config import REMOTE, Backend, TeacherConfig

PROMPTS, TOKENS, GAIN_PROMPTS = 16, 48, 64
BFLOAT16 = CheckThresholds(tolerance=0.5, mean_tolerance=0.1)
"""Kernels of two engines differ by up to 0.34 nats on sharp models at single tokens (docs/lora.md), by some hundredths
on average."""


async def consult(session: Session, console: Console) -> list[Finding]:
    """Examine every teacher of a session, as far as `doctor` and `doctor_everything` say; shows what is not fine.

    Raises:
        DataError: training would be wrong; the sentence of the first finding that says so.
    """
    config = session.plan.config
    look = _everything if config.doctor_everything else _examine
    findings = [f for name in config.teachers for f in await look(session, name)]
    findings += await _texts(session, PROMPTS)
    for finding in findings:
        if finding.verdict is not Verdict.FINE:
            console.print(f"doctor: {finding.check}: {finding.sentence} ({finding.measured})", soft_wrap=True)
    refuse(findings)
    console.print(f"doctor: {summary(findings)}")
    return findings


def summary(findings: Sequence[Finding]) -> str:
    """Summary of the findings in a line. Example: "1 warning of 11 checks, none against training"."""
    count = {v: sum(f.verdict is v for f in findings) for v in Verdict}
    warned, refused = count[Verdict.WARNING], count[Verdict.REFUSED]
    against = f"{refused} against training" if refused else "none against training"
    warnings = f"{warned} warning{'s' * (warned > 1)} of " if warned else ""
    return f"{warnings}{len(findings)} checks, {against}"


def refuse(findings: Sequence[Finding]) -> None:
    """Raise `DataError` with the first finding that forbids training."""
    wrong = [f for f in findings if f.verdict is Verdict.REFUSED]
    if wrong:
        more = f" ({len(wrong)} findings against it; see opd doctor)" if len(wrong) > 1 else ""
        raise DataError(f"{wrong[0].sentence} [{wrong[0].measured}]{more}; doctor=false trains all the same")


def run_doctor(overrides: Sequence[str], output: Path | None) -> int:
    """The whole examination of every teacher, its findings in `output` as well."""
    config = run_config(overrides)
    plan = make_plan(config)
    console = terminal.console()
    if config.dry_run:
        console.print(plan.table())
        return 0

    async def everything() -> list[Finding]:
        session = await open_session(plan)
        try:
            findings = [f for name in config.teachers for f in await _everything(session, name)]
            return [*findings, *await _texts(session, GAIN_PROMPTS)]
        finally:
            session.close()

    with connected(config.cluster):
        findings = run_until_stopped(everything())
    console.print(table(findings))
    console.print(f"doctor: {summary(findings)}")
    if output:
        output.write_text(as_json(findings))
    refuse(findings)
    return 0


def seconds(plan: Plan, name: str) -> tuple[TeacherConfig | None, TeacherConfig | None]:
    """Teachers that `name` is compared with: its checkpoint in a plain forward pass, the student's on its own backend.

    None where there is nothing to compare with (no weights here, or a server that holds only its own).
    """
    teacher = plan.config.teachers[name]
    # A remote teacher has no GPU here, but its weights may be read on one.
    device = Device.GPU if plan.config.cluster.gpus_per_teacher else teacher.device
    plain = replace(teacher, backend=Backend.TORCH, replicas=1, device=device)
    twin = replace(teacher, path=plan.config.student.path, replicas=1)
    return (
        plain if teacher.backend is not Backend.TORCH and plan.teacher_params[name] else None,
        twin if teacher.backend not in REMOTE else None,
    )


async def _everything(session: Session, name: str) -> list[Finding]:
    """Findings about one teacher, also by further engines: another backend, a twin, the teacher's gain.

    The engines that are started for it end with it.
    """
    plan = session.plan
    others = [await _second(session, config) for config in seconds(plan, name)]
    findings = await _examine(session, name, *others)
    _end(session, [other for other in others if other])
    if plan.writes(name):
        writer = await session.teacher_writer(name)
        prompts = _prompts(plan, name, GAIN_PROMPTS)
        findings.append(await teacher_gain(session.context(0), writer, prompts, plan.config.max_tokens))
        _end(session, [writer] if writer not in session.engines.writers.values() else [])
    return findings


async def _texts(session: Session, count: int) -> list[Finding]:
    """Finding about texts that the method has others write, for the first groups of prompts, `count` texts or more."""
    config, plan = session.plan.config, session.plan
    asked = config.prompts(0, plan.sources)
    last = asked[min(count, len(asked)) - 1].id if asked else ""
    chosen = [p for i, p in enumerate(asked) if i < count or p.id == last]
    return await method_texts(session.context(0), config.method, chosen, config.max_tokens)


def _end(session: Session, pools: Sequence[object]) -> None:
    for pool in pools:
        if isinstance(pool, TeacherPool | StudentPool):
            for actor in pool.replicas.actors:
                end(actor)
            session.ended(pool)


async def _examine(
    session: Session, name: str, reference: LogprobTeacher | None = None, twin: LogprobTeacher | None = None
) -> list[Finding]:
    plan, config = session.plan, session.plan.config
    teacher, pool = config.teachers[name], session.engines.teachers[name]
    assert isinstance(pool, TeacherPool)
    retry = pool.replicas.retry
    coarse = narrow(config.learner.dtype, part_dtype(teacher), engine_dtype(config))
    subject = Subject(
        name=name,
        context=session.context(0),
        learner=session.learner,
        replicas=[TeacherPool.of([actor], retry, pool.replicas.turn) for actor in pool.replicas.actors],
        supports=teacher.supports,
        vocabulary=plan.vocabulary,
        reference=reference,
        twin=twin,
        support=min(16, plan.vocabulary, teacher.max_k),
        exact=plan.exact_kl,
        thresholds=BFLOAT16 if coarse else CheckThresholds(),
    )
    return await examine(subject, _prompts(plan, name, PROMPTS), min(TOKENS, config.max_tokens))


def _prompts(plan: Plan, name: str, count: int) -> list[Prompt]:
    """The first held-out prompts that ask teacher `name`; if none does, training prompts."""
    config = plan.config
    held_out = [
        p for p in config.evaluation.asked(next(iter(config.evaluation.by_name)), plan.sources) if p.teacher == name
    ]
    asked = held_out or [p for p in config.prompts(0, plan.sources) if p.teacher == name]
    prompts = asked or [replace(p, teacher=name) for p in config.prompts(0, plan.sources)]
    return prompts[:count]


async def _second(session: Session, config: TeacherConfig | None) -> LogprobTeacher | None:
    """One more teacher actor, for comparison."""
    if config is None:
        return None
    role, cluster = "teacher for comparison", session.plan.config.cluster
    retry = replace(cluster.retry_policy(config.deadline_s), restarts=0)
    pool = TeacherPool(retry, partial(teacher_actor, session.actors, config, role, sleeps=session.turns is not None))
    if config.backend not in REMOTE:
        take_turns(session.turns, f"{role} ({config.backend.name}, {config.path})", pool.replicas)
    await pool.replicas.start(1)
    return pool


def table(findings: Sequence[Finding]) -> Table:
    """All findings for people."""
    shown = Table("check", "verdict", "measured", "what to do", title="doctor")
    colors = {Verdict.FINE: "green", Verdict.WARNING: "yellow", Verdict.REFUSED: "bold red"}
    for finding in findings:
        color = colors[finding.verdict]
        shown.add_row(finding.check, Text(finding.verdict.value, style=color), finding.measured, finding.sentence)
    return shown


def as_json(findings: Sequence[Finding]) -> str:
    """All findings as a JSON list."""
    rows = [
        {"check": f.check, "verdict": f.verdict.value, "measured": f.measured, "sentence": f.sentence} for f in findings
    ]
    return json.dumps(rows, indent=1) + "\n"
