"""Short runs of the embedded task: in the layout that the plan proposes, and over every other transport there is."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.cli.selftest.programs import in_process
from launch.cli.selftest.rows import Outcome, Row
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from launch.services.weight_transports import transport_of
from learner.config import Transport
from opd.errors import ConfigurationError, OpdError

_SMALL = (
    "experiment=shop",
    "doctor=false",
    "tracker=none",
    "evaluation.every=0",
    "evaluation.on_start=false",
    "evaluation.teacher=false",
    "evaluation.samples=1",
    "evaluation.prompts.prompts_per_step=16",
    "evaluation.reverse_kl_prompts=8",
)
_BFLOAT16 = ("student.dtype=BFLOAT16", "learner.dtype=BFLOAT16", "learner.zero_stage=2")
GAP = "weights/sentinel_gap"


def short_runs(scratch: Path, deadline_s: float) -> Iterator[Row]:
    """A row for every transport of weights: a run of it, or why this machine has none.

    After each update the run itself compares its engine with its learner, and stops if they are apart; the figure is
    the greatest difference.
    """
    proposed = [*_SMALL, "steps=3", "run_name=proposed", f"output_dir={scratch}"]
    try:
        planned = transport_of(make_plan(run_config(proposed)).config)
    except OpdError as error:
        yield Row(check="run", name="as planned", outcome=Outcome.FAIL, said=str(error))
        return
    yield _run(f"as planned: float32, {planned.name}, 3 steps", proposed, scratch / "proposed", deadline_s)
    for transport in Transport:
        if transport not in (Transport.AUTO, planned):
            name = f"bfloat16, {transport.name}, 1 step"
            own = ("steps=1", f"learner.transport={transport.name}", f"run_name={transport.name.lower()}")
            command = [*_SMALL, *_BFLOAT16, *own, f"output_dir={scratch}"]
            try:
                make_plan(run_config(command))
            except ConfigurationError as error:
                yield Row(check="run", name=name, outcome=Outcome.NOT_HERE, said=str(error).split(";")[0])
                continue
            yield _run(name, command, scratch / transport.name.lower(), deadline_s)


def _run(name: str, overrides: Sequence[str], directory: Path, deadline_s: float) -> Row:
    ended = in_process(["-m", "launch.cli", "train", *overrides], deadline_s)
    if ended.code != 0:
        why = f"no end after {deadline_s:.0f} s" if ended.code is None else f"exit status {ended.code}"
        return Row(check="run", name=name, outcome=Outcome.FAIL, figure=why, said=ended.why)
    data = RunData.read(RunDirectory.open(directory))
    gaps = [gap for line in data.metrics if (gap := line.get(GAP)) is not None]
    if not gaps:
        return Row(check="run", name=name, outcome=Outcome.FAIL, said="no update was compared with its engine")
    first = data.summary.first_step_s if data.summary else 0.0
    figure = f"engine and learner at most {max(gaps):.2g} nats apart; first step after {first:.0f} s"
    return Row(check="run", name=name, outcome=Outcome.PASS, figure=figure)
