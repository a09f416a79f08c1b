"""Two specialists teach one student on real parts: rows of both, read by matrices of different widths, in one step.

The student is a mixture of experts, trained by DeepSpeed and served by vLLM as dense ones are.
"""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.config.run_config import run_config
from launch.monitors.accounting import Totals
from launch.monitors.step_metrics import StepContext, step_metrics
from launch.plan.plan import make_plan
from launch.run.session import Session, open_session
from launch.services.ray_session.cluster import connected, fetch
from opd.loop.train import StepRecord, train
from opd.types import HiddenScores
from tests.moe_student import DENSE, save_student

SMALL = [
    "experiment=two_teachers",
    "prompts.sources.shop.prompts_per_step=6",
    "prompts.sources.peak.prompts_per_step=3",
    "learner.tokens_per_microbatch=300",  # several micro-batches, each with rows of both
]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StepRecord, dict[str, str]]]:
    """The last of two steps, and the teachers' paths; hidden states are fetched while the session lives."""
    student = tmp_path_factory.mktemp("student")
    save_student(student, DENSE.parents[1] / "peak" / "student")
    plan = make_plan(run_config([*SMALL, f"student.path={student}"]))
    records: list[StepRecord] = []

    async def remember(step: StepRecord) -> None:
        records.append(step)

    async def run() -> None:
        session: Session = await open_session(plan)
        try:
            await train(
                plan.config.method, plan.config.prompts, plan.sources, session.engines, session.learner, [remember],
                start=0, steps=2,
            )  # fmt: skip
        finally:
            session.close()

    with connected(plan.config.cluster):
        asyncio.run(run())
        yield records[-1], {name: teacher.path for name, teacher in plan.config.teachers.items()}


@pytest.mark.ray
def test_both_specialists_teach_in_one_step(record: tuple[StepRecord, dict[str, str]]) -> None:
    step, paths = record
    numbers = dict.fromkeys(paths)
    for item in step.scored:
        assert isinstance(item.scores, HiddenScores)
        prompt = item.trajectory.prompt
        assert prompt.teacher == ("peak" if prompt.task == "peak" else "default")
        assert set(item.scores.head) == {list(paths).index(prompt.teacher)}
        numbers[prompt.teacher] = item
    # What traveled are the hidden states of the right model, which its own matrix reads.
    widths = set()
    for name, item in numbers.items():
        states = item.scores.hidden.fetch(fetch)
        model = AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.float32)
        ids = np.concatenate([item.trajectory.prompt.teacher_ids, item.trajectory.token_ids])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids).long()[None]).logits[0, -1 - len(item.trajectory) : -1]
            torch.testing.assert_close(model.lm_head(states), logits, rtol=0, atol=1e-3)
        widths.add(states.shape[1])
    assert widths == {96, 128}


@pytest.mark.ray
def test_each_teacher_has_metrics_and_half_of_the_budget(record: tuple[StepRecord, dict[str, str]]) -> None:
    step, paths = record
    budget = dict.fromkeys(paths, 0.0)
    for item, weight in zip(step.scored, step.weights, strict=True):
        budget[item.trajectory.prompt.teacher] += weight.sum()
    assert budget["default"] == pytest.approx(budget["peak"])
    metrics = step_metrics(step, StepContext(totals=Totals(), cpu_s=0.0))
    shares = {name: metrics[f"distill/{name}/share"] for name in paths}
    tokens = {
        name: sum(len(i.trajectory) for i in step.scored if i.trajectory.prompt.teacher == name) for name in paths
    }
    assert shares == pytest.approx({name: n / sum(tokens.values()) for name, n in tokens.items()})
    mean = sum(shares[name] * metrics[f"distill/{name}/reverse_kl"] for name in paths)
    assert mean == pytest.approx(metrics["distill/reverse_kl"], rel=1e-6) and mean > 0.01


@pytest.mark.ray
def test_the_engine_of_a_mixture_of_experts_computes_what_its_learner_does(
    record: tuple[StepRecord, dict[str, str]],
) -> None:
    """On the sentinel after two updates, and at every token that the second step trained."""
    step, _ = record
    metrics = step_metrics(step, StepContext(totals=Totals(), cpu_s=0.0))
    assert step.published.gap < 1e-4 and metrics["training/rollout_logprob_gap_max"] < 1e-3
    assert {int(v) for item in step.scored for v in item.trajectory.versions} == {1}
    assert step.report.grad_norm > 0
