"""Several evaluation sets, each with its own sampler: what is asked, measured, stored, tracked and refused."""

import asyncio
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory, append_json
from launch.config.run_config import run_config
from launch.config.settings import EvaluationConfig, EvaluationSet
from launch.inputs.graders import MathGrader, NamingGrader, PeakGrader, ShopGrader, make_grader
from launch.monitors.accounting import Costs, Totals
from launch.monitors.callbacks import LoggerTracker
from launch.monitors.live_view import LiveView
from launch.monitors.progress import due_sets
from launch.monitors.step_metrics import Meter
from launch.plan.plan import make_plan
from launch.report.report import write_report
from launch.run.evaluate import Evaluator, TrainingCost
from opd.errors import ConfigurationError, DataError
from opd.evaluation.estimates import Estimate, majority_at
from opd.ports import Completion, Context, GenerateRequest, NamesAnswers, Sampling, Sources
from opd.types import Prompt, StopReason, TokenScores

RIGHT, WRONG, OTHER, SILENT = 1, 2, 3, 4
CHANCES = (0.2, 0.5, 0.8)  # of a right answer, each as likely among the problems


def shares(chance: float, temperature: float) -> tuple[float, float, float, float]:
    """Chances of the four answers of a problem; a low temperature sharpens a good one."""
    right = chance if temperature == 1 else chance**2 / (chance**2 + (1 - chance) ** 2)
    return right, 0.6 * (1 - right), 0.3 * (1 - right), 0.1 * (1 - right)


@dataclass
class Writer:
    """Simulated model: one token, the answer, drawn with its problem's chances at the request's temperature."""

    seed: int

    def __post_init__(self) -> None:
        self.asked: Counter[tuple[str, Sampling]] = Counter()
        self.draw = np.random.default_rng(self.seed)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.asked.update((r.prompt_id.split("/")[0], r.sampling) for r in requests)
        return [self._written(r) for r in requests]

    def _written(self, request: GenerateRequest) -> Completion:
        chance = CHANCES[int(request.context_ids[0])]
        token = 1 + self.draw.choice(4, p=shares(chance, request.sampling.temperature))
        return Completion(
            token_ids=np.array([token], dtype=np.int32),
            behavior=TokenScores(logprobs=np.zeros(1, dtype=np.float32)),
            versions=np.zeros(1, np.int32),
            stop=StopReason.END,
        )

    async def receive(self, weights: Any) -> Any:
        raise NotImplementedError

    def decode(self, ids: np.ndarray) -> str:
        return "" if ids[0] == SILENT else f"# {ids[0]}"


class Simulated(NamingGrader):
    """A grader of the writer's answers, which are words behind a mark."""

    one = staticmethod(lambda completion, answer: float(completion == f"# {answer}"))
    answer_of = staticmethod(lambda completion: completion.removeprefix("# "))


@dataclass(frozen=True)
class Drawn:
    """Problems from the population of three kinds."""

    name: str
    count: int
    seed: int
    group_size: int = 1

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        kinds = np.random.default_rng(self.seed).integers(len(CHANCES), size=self.count)
        ids = [np.array([kind], dtype=np.int32) for kind in kinds]
        return [
            Prompt(id=f"{self.name}/{i}", student_ids=ids[i], teacher_ids=ids[i], task="t", answer=str(RIGHT))
            for i in range(self.count)
        ]


def two_sets(problems: int, seed: int) -> EvaluationConfig:
    hot = EvaluationSet(
        prompts=Drawn("hot", problems, seed), samples=4, pass_at=[1, 2, 4], maj_at=[3, 4], greedy=False, every=5
    )
    cool = replace(hot, prompts=Drawn("cool", problems, seed + 1000), temperature=0.5, top_p=0.9, samples_between=1)
    return EvaluationConfig(prompts=None, sets={"hot": hot, "cool": cool})


def measured(config: EvaluationConfig, writer: Writer, *, between: bool = False) -> list[EvaluationPoint]:
    context = Context(
        student=writer, teachers={}, writers={}, graders={"t": Simulated()}, tokenizer=writer  # type: ignore[arg-type]
    )  # fmt: skip
    sources = Sources(tokenizer=writer, rows=lambda path, columns: [])  # type: ignore[arg-type]
    evaluator = Evaluator(config, sources, context, None, exact_kl=False)  # type: ignore[arg-type]

    async def all_of_them() -> list[EvaluationPoint]:
        cost = TrainingCost(totals=Totals(), cpu_s=0.0)
        return [point async for point in evaluator.student(3, cost, between=between)]

    return asyncio.run(all_of_them())


def truth(temperature: float, measure: str) -> float:
    """The population's value by enumeration: all outcomes of the samples with their chances, over the kinds."""
    kind, _, k = measure.partition("_at_")
    total = 0.0
    for chance in CHANCES:
        p = shares(chance, temperature)
        for outcome in product(range(4), repeat=int(k)):
            names = ["" if one + 1 == SILENT else str(one + 1) for one in outcome]
            rewards = [float(one + 1 == RIGHT) for one in outcome]
            value = {"mean": np.mean(rewards), "pass": max(rewards), "maj": by_count(names)}[kind]
            total += prod(p[one] for one in outcome) * float(value) / len(CHANCES)
    return total


def by_count(names: Sequence[str]) -> float:
    """Chance that the right answer wins the vote, ties by lot."""
    counts = Counter(name for name in names if name)
    winners = [name for name, count in counts.items() if count == max(counts.values())]
    return winners.count(str(RIGHT)) / len(winners) if winners else 0.0


def test_intervals_of_two_samplers_cover_the_truth_in_95_of_100_repeats() -> None:
    measures = ("mean_at_4", "pass_at_2", "maj_at_3", "maj_at_4")
    expected = {(s, m): truth(t, m) for s, t in (("hot", 1.0), ("cool", 0.5)) for m in measures}
    hits: Counter[tuple[str, str]] = Counter()
    for repeat in range(100):
        for point in measured(two_sets(40, repeat), Writer(repeat)):
            for name in measures:
                found = point.estimates[name]
                hits[point.set, name] += found.low <= expected[point.set, name] <= found.high
    assert len(hits) == 8 and min(hits.values()) >= 88 and 92 <= sum(hits.values()) / 8 <= 98, hits


def test_majority_is_its_exact_value_for_what_was_written() -> None:
    """The estimate is the mean over problems of the exact expectation for each problem's own answers."""
    writer = Writer(7)
    written: dict[str, list[int]] = {}
    inner = writer._written

    def noted(request: GenerateRequest) -> Completion:
        made = inner(request)
        written.setdefault(request.prompt_id, []).append(int(made.token_ids[0]))
        return made

    writer._written = noted  # type: ignore[method-assign]
    hot, _ = measured(two_sets(25, 3), writer)
    answers = [[("" if t == SILENT else str(t)) for t in written[f"hot/{i}"]] for i in range(25)]
    rewards = [[float(t == RIGHT) for t in written[f"hot/{i}"]] for i in range(25)]
    for k in (3, 4):
        exact = np.mean([majority_at(a, r, k) for a, r in zip(answers, rewards, strict=True)])
        assert hot.estimates[f"maj_at_{k}"].value == pytest.approx(exact)
    assert hot.estimates["maj_at_4"].value == pytest.approx(np.mean([by_count(a) for a in answers]))


def test_each_set_has_its_own_sampler() -> None:
    writer = Writer(0)
    hot, cool = measured(two_sets(6, 0), writer)
    assert writer.asked == {
        ("hot", Sampling(max_tokens=256, temperature=1.0, top_p=1.0)): 24,
        ("cool", Sampling(max_tokens=256, temperature=0.5, top_p=0.9)): 24,
    }
    assert (hot.set, hot.k, hot.problems, hot.greedy, hot.reverse_kl) == ("hot", 4, 6, None, None)
    assert (cool.temperature, cool.top_p, cool.max_tokens) == (0.5, 0.9, 256)
    assert list(hot.estimates) == ["mean_at_4", "pass_at_1", "pass_at_2", "pass_at_4", "maj_at_3", "maj_at_4"]
    assert hot.estimates["mean_at_4"].value == hot.mean_at_k == pytest.approx(hot.estimates["pass_at_1"].value)
    between = measured(two_sets(6, 0), Writer(0), between=True)
    assert [point.k for point in between] == [4, 1] and list(between[1].estimates) == ["mean_at_1", "pass_at_1"]


def test_sets_are_due_by_their_own_steps() -> None:
    config = replace(two_sets(2, 0), prompts=Drawn("main", 2, 0), sets=two_sets(2, 0).sets)
    config = replace(config, sets={**config.sets, "rare": replace(config.sets["hot"], every=0)})
    assert due_sets(config, 5, 20, main=False) == ["hot", "cool"]
    assert due_sets(config, 5, 20, main=True) == ["", "hot", "cool"]
    assert due_sets(config, 6, 20, main=True) == [""] and due_sets(config, 6, 20, main=False) == []
    assert due_sets(config, 20, 20, main=True) == [], "what is measured at the end follows anyway"


# --- stored, tracked, shown -----------------------------------------------------------------------------------------


@pytest.fixture
def points() -> list[EvaluationPoint]:
    return measured(two_sets(12, 1), Writer(1))


def test_points_come_back_and_older_lines_are_read(points: list[EvaluationPoint]) -> None:
    for point in points:
        assert EvaluationPoint.from_json(json.loads(json.dumps(point.as_json()))) == point
    line = points[0].as_json()
    new = ("set", "temperature", "top_p", "max_tokens", "problems", "estimates")
    old = EvaluationPoint.from_json({name: value for name, value in line.items() if name not in new})
    assert (old.set, old.estimates, old.mean_at_k) == ("", {}, points[0].mean_at_k)
    for wrong in ({"maj_at_4": [1.0]}, {"maj_at_4": "1"}, [0.5], {"maj_at_4": [1.0, None, True]}):
        with pytest.raises(DataError, match="has no value and interval as estimate"):
            EvaluationPoint.from_json(line | {"estimates": wrong})


def test_measures_have_names(points: list[EvaluationPoint]) -> None:
    assert points[0].measure("maj_at_4") == points[0].estimates["maj_at_4"].value
    assert points[0].measure("mean_at_k") == points[0].mean_at_k and points[0].measure("maj_at_64") is None
    with pytest.raises(ConfigurationError, match="no measure 'accuracy'; it has greedy"):
        points[0].measure("accuracy")


def test_trackers_get_every_set_under_its_name(points: list[EvaluationPoint]) -> None:
    logged: dict[str, float] = {}

    class Log:
        def log(self, data: Any, /, *, step: int) -> None:
            logged.update(data)

    tracker = LoggerTracker(Log(), None)  # type: ignore[arg-type]
    for point in points:
        tracker.evaluated(point)
    assert logged["eval/hot/maj_at_4"] == points[0].estimates["maj_at_4"].value
    assert logged["eval/cool/mean_at_4_low"] <= logged["eval/cool/mean_at_4"] <= logged["eval/cool/mean_at_4_high"]
    assert not any(name.startswith("eval/") and name.count("/") == 1 for name in logged)
    main = replace(points[0], set="", mean_at_k_by_task={"a": 0.5}).tracked()
    assert main["mean_at_k"] == points[0].mean_at_k and main["mean_at_k_by_task.a"] == 0.5
    assert not {"maj_at_4", "step", "temperature", "problems"} & main.keys(), "the set without a name has its own keys"


def test_the_terminal_and_the_report_show_every_set(points: list[EvaluationPoint], tmp_path: Path) -> None:
    meter = Meter(Costs(student_params=1, teacher_params=1, teacher_writes=False, teacher_reads=True))
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    view = LiveView(title="x", steps=2, meter=meter, console=console)
    for point in points:
        view.evaluated(point)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "evaluated student at step 3 on hot: mean@4 " in said and "on cool: " in said and "maj@4" in said
    assert view._accuracies().plain.count("at step 3") == 2
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("steps: 2\n")
    for point in (*points, *(replace(p, step=9) for p in points)):
        append_json(directory.evaluations, point.as_json())
    append_json(directory.evaluations, replace(points[1], examinee=EvaluatedModel.TEACHER).as_json())
    data = RunData.read(directory)
    assert [p.set for p in data.student] == ["hot", "hot"] and data.teacher is None, "the first set stands for the run"
    assert {name: len(of) for name, of in data.by_set.items()} == {"hot": 2, "cool": 2}
    assert list(data.teacher_on) == ["cool"]
    write_report(directory)
    page = directory.report.read_text()
    assert "Evaluation sets" in page and "12 problems, 4 samples each at temperature 0.5, top-p 0.9" in page
    found = points[0].estimates["maj_at_4"]
    assert f"{found.value:.1%} ({100 * found.low:.1f}–{100 * found.high:.1f})" in page


def test_the_set_of_prompts_stands_for_the_run_wherever_it_is(points: list[EvaluationPoint], tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("steps: 2\n")
    for point in (points[0], replace(points[1], set="")):
        append_json(directory.evaluations, point.as_json())
    assert [p.set for p in RunData.read(directory).student] == [""]


# --- planned and refused --------------------------------------------------------------------------------------------

SHOP = ["experiment=shop", "evaluation_sets=[shop_cool,shop_votes]"]


def test_a_plan_surveys_every_set() -> None:
    plan = make_plan(run_config([*SHOP, "evaluation.sets.shop_cool.prompts.seed=0", "dry_run=true"]))
    assert any(
        "100 of the 100 prompts of the evaluation set 'shop_cool' are trained on" in line for line in plan.remarks
    )
    config = plan.config.evaluation
    assert [len(config.asked(name, plan.sources)) for name in config.by_name] == [500, 100, 50]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["evaluation.sets.shop_cool.maj_at=[5]"], r"maj_at has 5, but samples is 4.*sets\.shop_cool\.samples=5"),
        (["evaluation.sets.shop_cool.temperature=0"], r"at temperature 0 all of a prompt's samples are the same"),
        (["evaluation.sets.shop_cool.reverse_kl_prompts=8"], r"these have temperature 0\.6 and top_p 0\.95"),
        (["evaluation.sets.shop_cool.max_tokens=500"], r"raise it to \d+ or lower max_tokens"),
        (["evaluation.sets.shop_cool.sampels=8"], r"no setting.*did you mean 'evaluation\.sets\.shop_cool\.samples'"),
        (["+evaluation.sets.Big.prompts=${prompts}"], r"evaluation\.sets\.Big: a set needs a name of small letters"),
        (["evaluation=none", "evaluation_sets=[]"], r"evaluation has no prompts"),
        (["evaluation_sets=[math_500]"], r"did you mean evaluation_sets=\[math500\]"),
        (
            ["evaluation.sets.shop_cool.prompts=${prompts}", "graders.shop._target_=launch.inputs.graders.LocksGrader"],
            r"sets\.shop_cool\.maj_at counts equal answers, but the grader of task 'shop' .* names none \(LocksGrader "
            r"has no `named`\); set evaluation\.sets\.shop_cool\.maj_at=\[\]",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_sentence(more: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        make_plan(run_config([*SHOP, *more]))
    assert "\n" not in str(caught.value)


def test_named_sets_may_stand_alone() -> None:
    config = run_config([*SHOP, "evaluation=none"])
    assert list(config.evaluation.by_name) == ["shop_cool", "shop_votes"] and config.evaluation.prompts is None
    assert make_plan(config).answers == {}


def rows(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"has {i % 10} {i // 10} ?", "answer": "2"}) + "\n" for i in range(count))
    )
    return path


def test_a_subset_is_the_first_rows_or_drawn_once(tmp_path: Path) -> None:
    """All rows of a file are asked once each whatever prompts_per_step is; a drawn part is the same for a seed."""
    file = rows(tmp_path / "rows.jsonl", 40)
    base = ["experiment=shop", "evaluation_sets=[own]", f"evaluation.sets.own.prompts.path={file}"]
    base += ["evaluation.sets.own.prompts.task=shop", "evaluation.sets.own.prompts.prompts_per_step=3"]

    plan = make_plan(run_config(base))
    evaluation, own = plan.config.evaluation, plan.config.evaluation.sets["own"]

    def asked(**changed: Any) -> list[int]:
        config = replace(evaluation, sets={"own": replace(own, **changed)})
        return [int(p.id.rpartition("/")[2]) for p in config.asked("own", plan.sources)]

    assert asked() == list(range(40)) and asked(subset=7) == list(range(7)) and asked(subset=99) == asked()
    drawn = asked(subset=7, random_subset=True)
    assert drawn == asked(subset=7, random_subset=True) == sorted(set(drawn)) and len(drawn) == 7
    assert drawn != asked(subset=7, random_subset=True, seed=1)


# --- answers by name ------------------------------------------------------------------------------------------------


def named(grader: Any, completions: Sequence[str], answer: str) -> list[str]:
    assert isinstance(grader, NamesAnswers)
    return asyncio.run(grader.named(completions, answer))


def test_equal_answers_of_mathematics_have_one_name() -> None:
    grader = MathGrader()
    try:
        texts = [r"\boxed{\frac{1}{2}}", "The answer is 0.5.", r"so \boxed{1/2}", r"\boxed{2}", r"\boxed{", ""]
        names = named(grader, texts, "0.5")
        assert len(set(names[:3])) == 1 and names[3] not in ("", names[0]) and names[4:] == ["", ""]
        assert named(grader, texts, "7") == names, "the reference does not say which is right"
        letters = named(grader, [r"\boxed{B}", "The answer is (B).", r"\boxed{C}"], "A")
        assert letters[0] == letters[1] != letters[2]
    finally:
        grader.close()


def test_embedded_tasks_name_what_stands_behind_the_mark() -> None:
    assert named(ShopGrader(), ["Mon 3 7 - 8 = 2 9 ok # 2 9", "2 9", "", "# 2"], "1 1") == ["2 9", "", "", ""]
    assert named(PeakGrader(), ["Mon 3 7 ok # Mon", "# Mon Tue", ""], "Mon") == ["Mon", "", ""]


def test_an_estimate_is_a_value() -> None:
    assert Estimate(value=0.5, low=0.4, high=0.6) == Estimate(value=0.5, low=0.4, high=0.6)


@dataclass
class Voter:
    """A user's reward that names answers by their last letter, or gives what is no list of names."""

    broken: bool = False

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [0.0 for _ in completions]

    async def named(self, completions: Sequence[str], answer: str) -> Any:
        return [1 for _ in completions] if self.broken else [completion[-1:] for completion in completions]


@dataclass
class Silent:
    """A user's reward that names no answers."""

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [0.0 for _ in completions]


def test_a_reward_of_ones_own_may_name_answers() -> None:
    assert named(make_grader("mine", Voter()), ["so A", "B", ""], "A") == ["A", "B", ""]
    assert not isinstance(make_grader("mine", Silent()), NamesAnswers)
    grader = make_grader("mine", Voter(broken=True))
    assert named(grader, ["so A", "B"], "A") == ["", ""]
    (fault,) = grader.faults
    assert "graders.mine: no answers were named: it gave [1, 1] in place of a list of 2 names" in fault
