"""Runs that a Python program makes: with functions of its own, where an event loop runs, stopped by a callback."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

import opd
from launch.monitors.callbacks import Progress
from tests.unit.cli.test_python_interface import recipes

SMALL = {"doctor": False, "tracker": "none", "evaluation.teacher": False, "evaluation.every": 0, "max_tokens": 77}
PROMPTS = [{"prompt": f"has 2 1 ; Mon buys {n} Tue finds 7 ?", "answer": f"{n} 9"} for n in range(1, 9)]


class Numbers:
    """A tracker of the program's own."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, Mapping[str, float]]] = []

    def log(self, data: Mapping[str, float], /, *, step: int) -> None:
        """Keep the numbers."""
        self.lines.append((step, data))


@pytest.mark.ray
@pytest.mark.timeout(900)  # two sessions
def test_a_notebook_trains_and_looks_at_its_run(tmp_path: Path) -> None:
    seen: list[Progress] = []
    graded: list[str] = []
    numbers = Numbers()

    def reward(completion: str, answer: str) -> float:
        graded.append(completion)
        return float(completion.endswith(answer))

    def callback(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step == 2

    async def cell() -> opd.TrainedRun:  # as a notebook calls it
        return opd.train(
            method="full_reverse_kl", student="shop", teacher="shop", prompts=PROMPTS, reward=reward, steps=5,
            callbacks=[callback], trackers=[numbers], verbose=False, run_name="mine", output_dir=tmp_path,
            learner={"lr": 1e-3}, **{"prompts.prompts_per_step": 8}, **SMALL,
        )  # fmt: skip

    run = asyncio.run(cell())
    assert [p.step for p in seen] == [1, 2] and graded
    assert list(run.metrics.index) == [1, 2] and list(run.evaluations.index) == [0, 2]
    assert seen[0].evaluation is not None and seen[0].evaluation.step == 0
    assert seen[1].metrics["actor/loss"] == run.metrics["actor/loss"].iloc[-1]
    assert [step for step, data in numbers.lines if "actor/loss" in data] == [1, 2]
    assert [step for step, data in numbers.lines if "eval/greedy" in data] == [0, 2]
    assert run.summary.outcome.value == "finished" and opd.open_run(tmp_path / "mine") == run
    assert run.config["learner"]["lr"] == 1e-3 and "<table>" in run._repr_html_()
    assert run.student.generate(**run.tokenizer("has 2 1", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
    assert run.command.startswith("opd train ") and " run_name=mine " in run.command
    assert len(run.samples) and (run.path / "checkpoints" / "step_2").is_dir()
    for recipe in recipes("run"):
        exec(recipe, {"run": run})
    _measured_alone(run, tmp_path)


def _measured_alone(run: opd.TrainedRun, folder: Path) -> None:
    """The exported student by itself, graded by the number of its words: as transformers writes, and nothing is left
    in the folder but the prompts.
    """

    def odd(completion: str, answer: str) -> float:
        return float(len(completion.split()) % 2)

    before = {path.name for path in folder.iterdir()}
    point = opd.evaluate(
        run.export, student="shop", teacher="shop", evaluation=PROMPTS, reward=odd, output_dir=folder,
        **{"evaluation.samples": 2, "max_tokens": 77, "tracker": "none"},
    )  # fmt: skip
    written = [
        run.student.generate(**inputs, max_new_tokens=77, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        for row in PROMPTS
        for inputs in [run.tokenizer(row["prompt"], return_tensors="pt")]
    ]
    expected = [odd(run.tokenizer.decode(ids, skip_special_tokens=True), "") for ids in written]
    assert point.greedy == pytest.approx(sum(expected) / len(PROMPTS), abs=1 / len(PROMPTS)), "one near tie may differ"
    assert (point.step, point.k, point.tokens) == (0, 2, 0)
    assert point.mean_at_k is not None and point.pass_at_k is not None and point.mean_at_k <= point.pass_at_k
    assert point.reverse_kl is not None and 0 < point.reverse_kl < 10
    assert {path.name for path in folder.iterdir()} <= before | {".inputs"}
