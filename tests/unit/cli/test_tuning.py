"""Arms of a comparison choose a setting alike: as many runs each, judged on problems that the table leaves out."""

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf.tokenizer import HuggingFaceTokenizer
from launch.artifacts.run_directory import RunDirectory, append_json
from launch.cli.compare.command import run_comparison
from launch.cli.compare.tuning import Tuning
from launch.inputs.prompt_files import read_rows
from launch.report.comparison import Arm
from opd.errors import ConfigurationError, DataError
from opd.ports import Sources
from tests.unit.monitors.test_report import point, step_line

ARMS = {"opd": ["1e-3", "2e-3"], "grpo": ["3e-4", "6e-4"]}


def tuning(**changes: Any) -> Tuning:
    values: dict[str, Any] = {"key": "learner.lr", "values": ARMS, "seed": 100, "overrides": []}
    return Tuning(**{**values, **changes})


def ended(root: Path, scores: dict[str, float | None], steps: int = 20, flops: float = 1e9) -> dict[str, Path]:
    """Finished runs by name with these scores; a step of theirs costs `flops`, the first one ten times as much."""
    made = {}
    for label, score in scores.items():
        directory = RunDirectory.create(root, label)
        directory.write_config("steps: 20\n")
        for step, accuracy in ((0, 0.99), (steps, score)):  # the end counts, not the best moment
            append_json(directory.evaluations, point(step, accuracy).as_json())
        for step in range(1, steps + 1):
            append_json(directory.metrics, step_line(step, **{"flops/total": flops * (step + 9)}))
        made[label] = directory.path
    return made


def test_the_value_whose_run_ends_best_is_taken_and_all_are_told(tmp_path: Path) -> None:
    runs = ended(tmp_path, {"opd_1e-3": 0.9, "opd_2e-3": 0.8, "grpo_3e-4": 0.6, "grpo_6e-4": 0.7})
    best, notes = tuning().chosen(runs)
    assert best == {"opd": "1e-3", "grpo": "6e-4"}
    assert notes[1].startswith("learner.lr of grpo is 6e-4") and "3e-4: 60.0%, 6e-4: 70.0%" in notes[1]


@pytest.mark.parametrize(
    ("best", "said"), [("5e-4", "a smaller one may be better"), ("1e-3", ""), ("2e-3", "a larger one may be better")]
)
def test_a_best_value_at_the_edge_of_those_tried_is_a_censored_sweep(tmp_path: Path, best: str, said: str) -> None:
    values = ["1e-3", "5e-4", "2e-3"]  # in any order
    runs = ended(tmp_path, {f"opd_{value}": 0.9 if value == best else 0.5 for value in values})
    _, (note,) = tuning(values={"opd": values}).chosen(runs)
    assert ("censored" in note) == bool(said) and said in note


def test_values_that_are_no_numbers_have_no_edge(tmp_path: Path) -> None:
    runs = ended(tmp_path, {"opd_LINEAR": 0.9, "opd_COSINE": 0.5})
    _, (note,) = tuning(key="learner.schedule", values={"opd": ["LINEAR", "COSINE"]}).chosen(runs)
    assert "censored" not in note


def test_a_run_without_an_accuracy_decides_nothing(tmp_path: Path) -> None:
    runs = ended(tmp_path, {"opd_1e-3": None, "opd_2e-3": 0.8, "grpo_3e-4": 0.6, "grpo_6e-4": 0.7})
    with pytest.raises(DataError, match=r"opd_1e-3 ended without an accuracy"):
        tuning().chosen(runs)


def test_no_arm_is_searched_harder_than_another() -> None:
    with pytest.raises(ConfigurationError, match=r"as many values for every arm.*2 for opd, 3 for grpo"):
        tuning(values={"opd": ["1", "2"], "grpo": ["1", "2", "3"]})


COMPARE = ["experiment=compare", "comparison.seeds=[0]"]


@cache
def sources(path: str) -> Sources:
    return Sources(tokenizer=HuggingFaceTokenizer(path), rows=read_rows)


def quick_plan(config: Any) -> Any:
    """What a comparison reads of a plan; a real one takes a second of reading checkpoints, about which this is not."""
    return SimpleNamespace(config=config, answers={}, hub=(), sources=sources(config.student.path))


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cli.compare.command.make_plan", quick_plan)


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ("learner.lr=1e-3", r"chooses learner\.lr for every arm, but learner\.lr=1e-3 was given"),
        ("comparison.tuning.values.dpo=['1','2','3']", r"needs values for opd, sft, grpo, but has them for .*dpo"),
        ("comparison.tuning.overrides=[]", r"would choose learner\.lr on the evaluation\.prompts that .* reports"),
        (
            "comparison.tuning.overrides=['evaluation.prompts.prompts_per_step=499']",
            r"\(49\d of [45]\d\d problems are the same\)",
        ),
    ],
)
def test_what_would_be_unfair_is_refused_in_the_plan(tmp_path: Path, asked: str, refusal: str) -> None:
    with pytest.raises(ConfigurationError, match=refusal):
        run_comparison([*COMPARE, "dry_run=true", asked, f"output_dir={tmp_path}"])


def test_one_command_tunes_then_compares_at_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are stand-ins; what is asked of them, their order and what is drawn are the command's own."""
    asked: dict[str, Any] = {}
    drawn: list[Arm] = []
    told: list[str] = []

    def once(root: Path, plan: Any, _: Any) -> Path:
        config = plan.config
        if config.run_name not in asked:
            asked[config.run_name] = config
            ended(root, {config.run_name: config.learner.lr * 100})  # the largest rate is the best
        return root / config.run_name

    def draw(root: Path, runs: Any, goal: Any, console: Any, notes: Any) -> None:
        drawn.extend(runs)
        told.extend(notes)

    monkeypatch.setattr("launch.cli.compare.shared_runs.run_once", once)
    monkeypatch.setattr("launch.cli.compare.command.write_comparison", draw)
    assert run_comparison([*COMPARE, f"output_dir={tmp_path}", "run_name=x"]) == 0
    trials, runs = list(asked)[:-3], list(asked)[-3:]
    assert len(trials) == 9 and all(re.fullmatch(r"(opd|sft|grpo)_\S+-seed100", name) for name in trials)
    assert runs == ["opd-seed0", "sft-seed0", "grpo-seed0"]
    assert [asked[name].learner.lr for name in runs] == [2e-3, 2e-3, 6e-4]
    assert len({asked[name].evaluation.every for name in runs}) == 1
    held_out = {repr(asked[name].evaluation.prompts) for name in runs}
    assert len(held_out) == 1 and not held_out & {repr(asked[name].evaluation.prompts) for name in trials}
    assert [arm.label for arm in drawn] == ["opd", "sft", "grpo"] and len(told) == 3
