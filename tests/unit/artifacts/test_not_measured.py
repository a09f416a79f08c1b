"""Where there are no reference answers nothing was failed: no accuracy is shown, and no grader is asked."""

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory, append_json
from launch.config.settings import EvaluationConfig
from launch.monitors.accounting import Costs, Totals
from launch.monitors.live_view import LiveView
from launch.monitors.step_metrics import Meter
from launch.report.curves import panels
from launch.report.report import write_report
from launch.run.evaluate import Evaluator, TrainingCost
from opd.doctor.examine import teacher_gain
from opd.doctor.findings import Verdict
from opd.ports import Completion, Context, GenerateRequest, ScoreAnswer, ScoreRequest, Sources
from opd.types import Prompt, StopReason, TokenScores


@dataclass
class Engine:
    """Writes two tokens and finds each of them likely; has no tokenizer worth the name."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        ids = np.array([3, 1], dtype=np.int32)
        return [
            Completion(token_ids=ids, behavior=self._scores(2), versions=np.zeros(2, np.int32), stop=StopReason.END)
            for _ in requests
        ]

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        return [(self._scores(len(request.token_ids)),) for request in requests]

    async def receive(self, weights: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def _scores(count: int) -> TokenScores:
        return TokenScores(logprobs=np.full(count, -1.0, dtype=np.float32))

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, ids))


class Half:
    """A grader that solves every other completion, and counts what it is asked."""

    asked = 0

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        self.asked += len(completions)
        assert all(answers)
        return [float(i % 2 == 0) for i in range(len(completions))]


@dataclass(frozen=True)
class Held:
    """Held-out prompts; those of `without` have no answer."""

    count: int
    without: int
    group_size: int = 1

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        ids = np.array([1, 2], dtype=np.int32)
        return [
            Prompt(id=f"p{i}", student_ids=ids, teacher_ids=ids, task="t", answer="" if i < self.without else "7")
            for i in range(self.count)
        ]


def measured(without: int, grader: Half, samples: int = 2) -> EvaluationPoint:
    engine = Engine()
    context = Context(
        student=engine, teachers={"default": engine}, writers={}, graders={"t": grader}, tokenizer=engine  # type: ignore[arg-type]
    )  # fmt: skip
    config = EvaluationConfig(prompts=Held(count=4, without=without), samples=samples)
    evaluator = Evaluator(config, None, context, None, exact_kl=False)  # type: ignore[arg-type]

    async def first() -> EvaluationPoint:
        return await anext(evaluator.student(3, TrainingCost(totals=Totals(), cpu_s=0.0)))

    return asyncio.run(first())


def test_no_answers_no_accuracy_and_no_grader() -> None:
    grader = Half()
    point = measured(without=4, grader=grader)
    assert (point.greedy, point.mean_at_k, point.pass_at_k, point.k) == (None, None, None, 2)
    assert point.greedy_by_task == point.mean_at_k_by_task == {} and grader.asked == 0
    assert point.reverse_kl == 0.0 and point.length_mean == 2.0
    assert json.loads(json.dumps(point.as_json()))["greedy"] is None


def test_an_accuracy_is_over_the_prompts_that_have_answers() -> None:
    grader = Half()
    point = measured(without=2, grader=grader)
    assert (point.greedy, point.mean_at_k, point.pass_at_k) == (0.5, 0.5, 1.0) and grader.asked == 2 + 4


@pytest.fixture
def unmeasured() -> EvaluationPoint:
    return measured(without=4, grader=Half())


def test_the_terminal_says_not_measured(unmeasured: EvaluationPoint) -> None:
    meter = Meter(Costs(student_params=1, teacher_params=1, teacher_writes=False, teacher_reads=True))
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    view = LiveView(title="x", steps=2, meter=meter, console=console)
    view.evaluated(unmeasured)
    view.evaluated(replace(unmeasured, examinee=EvaluatedModel.TEACHER))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.splitlines() == [
        "evaluated student at step 3: accuracy not measured, reverse KL 0.0000",
        "evaluated teacher: accuracy not measured, reverse KL 0.0000",
    ]
    assert "not measured" in view._accuracies().plain and "%" not in said


def test_the_report_says_not_measured(unmeasured: EvaluationPoint, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("steps: 2\n")
    for step in (0, 3):
        append_json(directory.evaluations, replace(unmeasured, step=step).as_json())
    write_report(directory)
    page = directory.report.read_text()
    assert page.count("not measured") == 4  # greedy and sampled, before and after
    assert "Accuracy" not in [panel.title for panel in panels(RunData.read(directory))]


def test_the_doctor_measures_no_gain() -> None:
    context = Context(student=Engine(), teachers={}, writers={}, graders={}, tokenizer=Engine())  # type: ignore[arg-type]
    found = asyncio.run(teacher_gain(context, Engine(), Held(count=3, without=3)(0, None), 8))  # type: ignore[arg-type]
    assert found.verdict is Verdict.FINE and "no reference answers" in found.measured
