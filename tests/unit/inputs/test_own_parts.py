"""A user's rewards and environments: one file and one override, tried in the plan, never silent in a run."""

import asyncio
import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from launch.artifacts.checkpoint_state import GRADERS, described, in_todays_names
from launch.checkpoint.changes import changes
from launch.config.reward_function import RewardFunction
from launch.config.run_config import run_config
from launch.inputs.graders import MathGrader, make_grader
from launch.inputs.grading_failures import HOPELESS
from launch.inputs.own_environment import OwnEnvironment
from launch.inputs.own_grader import OwnGrader, rewards_of
from launch.plan.checks.devices import WRITER, roles, writers_here, writers_of
from launch.plan.checks.tasks import check_tasks
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError, DataError, OpdError
from opd.method.needs import named, needed, needs
from opd.ports import Need, Outcome, Role, needs_of
from opd.scorers.ensemble import Ensemble
from opd.types import AdvantageScores, Scores, TokenScores

ROOT = Path(__file__).resolve().parents[3]
GRPO = ("experiment=shop", "method=grpo", "prompts.group_size=2")
NUMBER = itertools.count()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user's into the working directory, and says its name (another one every time)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> str:
        name = f"mine_{next(NUMBER)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


# What a reward function may look like.


def one(completion: str, answer: str) -> float:
    return float(completion == answer)


def alone(completion: str, scale: float = 1.0) -> float:
    return scale * len(completion)


def many(completions: list[str], answers: list[str]) -> list[float]:
    return [float(len(completions))] * len(answers)


def strange(text: str) -> float:
    return 0.0


def demanding(completion: str, answer: str, judge: str) -> float:
    return len(judge)


def test_the_names_of_a_functions_parameters_say_what_it_is_given() -> None:
    pairs: tuple[Sequence[str], Sequence[str]] = (["ab", "c"], ["ab", "d"])
    assert RewardFunction(name="x", function=one).grade(*pairs) == [1.0, 0.0]
    assert RewardFunction(name="x", function=alone, settings={"scale": 3}).grade(*pairs) == [6, 3]
    assert RewardFunction(name="x", function=many).grade(*pairs) == [2.0, 2.0]
    assert [RewardFunction(name="x", function=f).needs_answer for f in (one, alone, many)] == [True, False, True]
    assert [RewardFunction(name="x", function=f).one_by_one for f in (one, alone, many)] == [True, True, False]


def swapped(answer: str, completion: str) -> float:
    return float(completion == f"{answer}!")


def by_name(*, answer: str, completion: str) -> float:
    return swapped(answer, completion)


def by_place(answer: str, completion: str, /) -> float:
    return swapped(answer, completion)


def behind(scale: float, answer: str, completion: str) -> float:
    return scale * swapped(answer, completion)


def lists(answers: list[str], completions: list[str]) -> list[float]:
    return [swapped(a, c) for a, c in zip(answers, completions, strict=True)]


async def awaited(completion: str, answer: str) -> float:
    return 1.0


def yielding(completion: str, answer: str) -> Any:
    yield 1.0


@pytest.mark.parametrize("function", [swapped, by_name, by_place, behind, lists])
def test_the_order_of_a_functions_parameters_says_nothing(function: Any) -> None:
    reward = RewardFunction(name="x", function=function, settings={"scale": 1.0} if function is behind else {})
    assert reward.grade(["a!", "b", "c!"], ["a", "b", "d"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "settings", "says"),
    [
        (awaited, {}, r"graders\.x: awaited gives a coroutine or a generator .*return a number"),
        (yielding, {}, r"graders\.x: yielding gives a coroutine or a generator"),
        (strange, {}, r"graders\.x: a reward function is called with .*but strange has \(text\); rename"),
        (alone, {"skale": 1}, r"graders\.x\.skale: alone has no such parameter; it has completion, scale"),
        (demanding, {}, r"demanding has \(completion, answer, judge\).*set graders\.x\.judge="),
    ],
)
def test_another_signature_is_refused(function: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        RewardFunction(name="x", function=function, settings=settings)


# In a run: everything costs its own reward only, and is told.


def spoilt(completion: str, answer: str) -> Any:
    """In a child process."""
    if completion == "hangs":
        time.sleep(600)
    if completion == "dies":
        import os

        os._exit(3)
    if completion == "raises":
        raise KeyError("no such\nword")
    return {"nan": float("nan"), "text": "1", "none": None}.get(completion, 7)


def grade(grader: Any, completions: list[str]) -> list[float]:
    try:
        return asyncio.run(grader.grade(completions, ["a"] * len(completions)))
    finally:
        grader.close()


def test_a_reward_that_fails_costs_its_own_completion_and_is_told() -> None:
    grader = make_grader("mine", RewardFunction(name="mine", function=spoilt, deadline_s=2.0))
    wrong = ["hangs", "raises", "dies", "nan", "text", "none"]
    texts = [text for bad in wrong for text in (bad, "fine")]
    assert grade(grader, texts) == [0.0, 7.0] * len(wrong)
    assert [re.search(r"for completion '(\w+)'", fault)[1] for fault in grader.faults] == wrong  # type: ignore[index]
    assert all(fault.startswith("graders.mine: ") for fault in grader.faults)
    assert "no reward within 2 s" in grader.faults[0] and "KeyError" in grader.faults[1]
    assert "died" in grader.faults[2] and "no finite number" in grader.faults[3]


def broken(completions: list[str]) -> list[float]:
    if "bad" in completions:
        raise ValueError("bad")
    return [float(len(completions))] * len(completions)


def test_a_batch_that_fails_is_graded_one_by_one() -> None:
    grader = make_grader("mine", RewardFunction(name="mine", function=broken))
    assert grade(grader, ["a", "b", "c"]) == [3.0, 3.0, 3.0] and not grader.faults
    assert grade(grader, ["a", "bad", "c"]) == [1.0, 0.0, 1.0] and len(grader.faults) == 1


def useless(completion: str) -> float:
    raise RuntimeError("always")


def test_a_reward_that_never_works_ends_the_run() -> None:
    grader = make_grader("mine", RewardFunction(name="mine", function=useless))
    with pytest.raises(DataError, match=rf"graders\.mine failed {HOPELESS} times in a row.*RuntimeError"):
        grade(grader, ["x"] * (HOPELESS + 5))


@dataclass(kw_only=True)
class Judge:
    """A grader that is awaited, as one that asks a server."""

    deadline_s: float = 0.2
    needs_answer: ClassVar[bool] = False

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        await asyncio.sleep(60 if "slow" in completions else 0)
        return [float(len(c)) for c in completions]


@dataclass(kw_only=True)
class Counter:
    """A grader that remembers, in the process where it lives."""

    calls: int = 0

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        self.calls += 1
        return [self.calls] * len(completions)


def test_a_dataclass_may_be_awaited_and_may_remember() -> None:
    judge = make_grader("j", Judge())
    assert grade(judge, ["ab", "slow", "c"]) == [2.0, 0.0, 1.0] and "within 0.2 s" in judge.faults[0]
    part = Counter()
    counter = make_grader("c", part)
    try:
        each = [asyncio.run(counter.grade(["x"], ["a"])) for _ in range(3)]
    finally:
        counter.close()
    assert each == [[1.0], [2.0], [3.0]] and part.calls == 0, "a run's grader is not that of its configuration"
    assert isinstance(make_grader("math", MathGrader()), MathGrader) and isinstance(counter, OwnGrader)
    assert counter.judges_cut and counter.needs_answer and not make_grader("j", Judge()).needs_answer  # type: ignore[attr-defined]


@pytest.mark.parametrize("said", [None, 3.0, [1.0], "12", [1.0, "2"], [1.0, [2]], [1.0, float("inf")], [1, 2, 3]])
def test_what_is_no_list_of_rewards_is_refused(said: Any) -> None:
    with pytest.raises(Exception, match="it gave"):
        rewards_of(said, 2)
    assert rewards_of((True, -3), 2) == [1.0, -3.0]


# In the plan: one file in the working directory, one override.


def planned(*overrides: str) -> Any:
    return make_plan(run_config([*GRPO, *overrides]))


def test_a_function_in_the_working_directory_is_a_reward_by_one_override(here: Callable[[str], str]) -> None:
    name = here("def length(completion: str, unit: float = 1.0) -> float:\n    return unit * len(completion)\n")
    plan = planned(f"graders.shop._target_={name}.length", "graders.shop.unit=0.5")
    grader = make_grader("shop", plan.config.graders["shop"])
    assert grade(grader, ["four"]) == [2.0]
    assert [note for note in plan.remarks if "graders.shop gave 1.5, which is no share" in note]
    assert [note for note in plan.remarks if "no part of method grpo reads a teacher; default is started for" in note]
    assert str(Need(Role.GRADER)) in " ".join(str(cell) for cell in plan.table().columns[2].cells)


def test_a_reward_that_needs_no_answer_grades_prompts_without(here: Callable[[str], str], tmp_path: Path) -> None:
    name = here(
        "def length(completion):\n    return len(completion)\n\ndef equal(completion, answer):\n    return 1.0\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "has 3 7 ; Mon buys 4 ?"}\n')
    rows = [f"{at}prompts.{key}" for at in ("", "evaluation.") for key in ("path=p.jsonl", "prompts_per_step=1")]
    mine = ["prompts=dataset", "evaluation=dataset", "prompts.task=mine", *rows]
    plan = planned(*mine, f"+graders.mine._target_={name}.length")
    assert plan.answers == {}, "what is graded without an answer is measured"
    with pytest.raises(ConfigurationError, match=r"grpo learns from graded answers, but .*p\.jsonl line 1 has no"):
        planned(*mine, f"graders.mine._target_={name}.equal")
    with pytest.raises(DataError, match=r"no grader is called 'mine' .*\+graders\.mine\._target_=MODULE\.FUNCTION"):
        planned(*mine)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def reward(text):\n    return 1.0\n", r"graders\.shop: a reward function is called with"),
        (
            "def reward(completion):\n    raise KeyError('x')\n",
            r"cannot grade completion .*KeyError \('x'\); correct it",
        ),
        ("def reward(completion):\n    return float('nan')\n", r"it gave nan, which is no finite number"),
        ("import no_such_module\n", r"cannot be imported: No module named 'no_such_module'"),
        ("def reward(:\n", r"cannot be imported: invalid syntax \("),
        ("reward = 3\n", r"graders\.shop\._target_ needs a function or a dataclass with grade"),
        ("class reward:\n    pass\n", r"needs a function or a dataclass"),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass reward:\n    def grade(self, text):\n        pass\n",
            r"graders\.shop: reward needs a method grade that is called with 2 arguments",
        ),
    ],
)
def test_a_reward_that_cannot_work_is_one_sentence_in_the_plan(
    here: Callable[[str], str], body: str, says: str
) -> None:
    with pytest.raises(OpdError, match=says) as caught:
        planned(f"graders.shop._target_={here(body)}.reward")
    assert "\n" not in str(caught.value)


def test_a_file_names_code_of_others_only_if_it_is_allowed(here: Callable[[str], str], tmp_path: Path) -> None:
    """What is typed is meant; a folder of YAML that somebody gave away is not."""
    name = here("def reward(completion):\n    return 0.5\n")
    (tmp_path / "conf" / "graders").mkdir(parents=True)
    (tmp_path / "conf" / "graders" / "mine.yaml").write_text(f"shop:\n  _target_: {name}.reward\n")
    mine = (f"conf={tmp_path / 'conf'}", "graders=mine")
    with pytest.raises(ConfigurationError, match=r"graders\.shop\._target_ .*add its package to allow_targets"):
        planned(*mine)
    assert planned(*mine, f"allow_targets=[{name}]").config.graders.keys() == {"shop"}


def test_a_checkpoint_of_before_had_the_graders_of_the_program() -> None:
    now = described(run_config(["experiment=shop"]))
    before = {name: value for name, value in now.items() if not name.startswith("graders.")}
    assert len(before) < len(now) and not changes(in_todays_names(before), now)
    assert {name for name in now if name.startswith("graders.")} == GRADERS.keys()
    other = described(run_config(["experiment=shop", "graders.math.deadline_s=9"]))
    assert [change.name for change in changes(in_todays_names(before), other)] == ["graders.math.deadline_s"]


# Environments.


@dataclass(kw_only=True)
class World:
    """Plain methods; `does` says what a step does."""

    does: str = ""
    deadline_s: float = 60

    def reset(self, prompt: Any) -> str:
        if self.does == "no reset":
            raise ValueError("no")
        self.steps = 0
        return "go"

    def step(self, action: str) -> Any:
        self.steps += 1
        if self.does == "hangs":
            time.sleep(30)  # in a thread that ends with the process
        if self.does == "raises":
            raise ValueError("no")
        return {"number": 1.0, "nan": Outcome(reward=float("nan"), done=True)}.get(
            self.does, Outcome(reward=float(self.steps), done=False, text=action)
        )


def play(made: OwnEnvironment, steps: int, make: Any) -> list[Outcome]:
    async def all_of_it() -> list[Outcome]:
        episode = made()
        await episode.reset(make.prompt([1]))
        return [await episode.step("a") for _ in range(steps)]

    return asyncio.run(all_of_it())


def test_episodes_share_nothing_and_plain_methods_are_awaited(make: Any) -> None:
    made = OwnEnvironment(name="w", part=World())
    assert [o.reward for o in play(made, 2, make)] == [o.reward for o in play(made, 2, make)] == [1.0, 2.0]
    assert not made.faults and not hasattr(made.part, "steps")


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("hangs", r"step failed: no answer within its deadline"),
        ("raises", r"step failed: ValueError \(no\)"),
        ("number", r"step failed: TypeError \(step gave float and not Outcome\)"),
        ("nan", r"step failed: TypeError \(step gave reward nan, which is no finite number\)"),
        ("no reset", r"reset failed for prompt 'p': ValueError \(no\)"),
    ],
)
def test_an_environment_that_fails_ends_its_episode_and_is_told(does: str, says: str, make: Any) -> None:
    made = OwnEnvironment(name="w", part=World(does=does, deadline_s=0.3 if does == "hangs" else 60))
    assert play(made, 1, make) == [Outcome(reward=0.0, done=True)]
    assert len(made.faults) == 1 and re.search(rf"^environments\.w: {says}", made.faults[0]), made.faults
    with pytest.raises(ConfigurationError, match=r"environments\.w cannot be played with prompt 'p': .*; correct it"):
        made.probe(make.prompt([1]))


def test_the_example_is_planned_and_its_method_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples" / "new_environment")
    monkeypatch.setattr(sys, "path", list(sys.path))
    mine = ["conf=my_conf", "experiment=guess"]
    plan = make_plan(run_config(mine))
    assert plan.config.environments.keys() == {"guess"} and needed(plan.config.method, Role.ENVIRONMENT)
    written = ["~method.rollout.max_turns", "method.rollout._target_=opd.rollouts.student.StudentRollout"]
    with pytest.raises(ConfigurationError, match=r"'guess' .*StudentRollout does not play; set method\.rollout"):
        make_plan(run_config([*mine, *written]))


# What parts need.


def test_parts_of_before_are_read_by_what_they_said() -> None:
    class Old:
        records, needs_writer = TokenScores, True

    class Older:
        records = TokenScores

    class Judged:
        requires, produces = frozenset(), AdvantageScores

    class Read:
        requires, produces = frozenset({TokenScores}), Scores

    said = [needs_of(part) for part in (Old(), Older(), Judged(), Read(), object())]
    roles = [Role.WRITER, Role.STUDENT, Role.GRADER, Role.READER]
    assert said == [*(frozenset({Need(role)}) for role in roles), frozenset()]


def test_a_teacher_behind_an_endpoint_writes_there_and_one_that_only_scores_is_said_not_to(tmp_path: Path) -> None:
    """The folder has no weights: the run starts no engine for it, and a `HTTP` teacher cannot be measured."""
    for file in (Path(__file__).resolve().parents[3] / "assets" / "shop" / "teacher").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    far = ["experiment=shop", f"teacher.path={tmp_path}", "teacher.url=http://x"]
    written = make_plan(run_config([*far, "method=sft", "teacher.backend=OPENAI", "teacher.model=m"]))
    assert writers_of(written.config) == ["default"] and not writers_here(written.config)
    assert [role.count for role in roles(written.config) if role.name == WRITER] == [0]
    assert written.writes("default") and not [note for note in written.remarks if "is measured" in note]

    read = make_plan(run_config([*far, "method=topk_reverse_kl", "teacher.backend=HTTP"]))
    assert not read.writes("default")
    (note,) = [note for note in read.remarks if "is measured" in note]
    assert "teacher 'default' at http://x scores and does not write" in note and "teacher.backend=OPENAI" in note
    with pytest.raises(DataError, match="needs safetensors"):
        make_plan(run_config([*far, "method=sft", "teacher.backend=HTTP"]))


def test_the_plan_starts_the_writers_that_a_part_names() -> None:
    config = run_config(["experiment=two_teachers"])
    assert writers_of(config) == [] and writers_of(run_config(["experiment=two_teachers", "method=sft"])) == [
        "default", "peak"
    ]  # fmt: skip

    @dataclass(frozen=True)
    class Named:
        records: ClassVar[type[TokenScores]] = TokenScores
        needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.WRITER, "peak")})

        async def __call__(self, group: Any, context: Any) -> list[Any]:
            return []

    of_one = replace(config, method=replace(config.method, rollout=Named()))
    assert writers_of(of_one) == ["peak"]
    mixed = replace(config.method, scorer=Ensemble(shares={"default": 1.0, "peak": 1.0}))
    assert named(mixed, Role.READER) == {"default", "peak"} and Need(Role.STUDENT) in needs(mixed)


def test_a_need_that_no_backend_meets_is_a_sentence() -> None:
    config = run_config(["experiment=shop"])

    @dataclass(frozen=True)
    class BlackBox:
        records: ClassVar[type[TokenScores]] = TokenScores
        needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.TEXT_TEACHER)})
        on_policy: ClassVar[bool] = True

        async def __call__(self, group: Any, context: Any) -> list[Any]:
            return []

    with pytest.raises(ConfigurationError, match=r"needs a teacher that gives text only, which no backend"):
        check_tasks(replace(config, method=replace(config.method, rollout=BlackBox())), None, None)  # type: ignore[arg-type]


def test_the_page_prints_the_example() -> None:
    page = (ROOT / "docs" / "grading.md").read_text()
    (block,) = re.findall(r"```python file=my_rewards\.py\n(.*?)```", page, flags=re.DOTALL)
    assert block == (ROOT / "examples" / "new_reward" / "my_rewards.py").read_text()
    command = re.search(r"```\n(opd train .*?)\n```", page, flags=re.DOTALL)
    assert command and command[1] in (ROOT / "examples" / "new_reward" / "README.md").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("environments=0", r"environments needs parts by name, got 0; set environments\.NAME\._target_="),
        ("graders.shop=3", r"graders\.shop names no part, got 3; set graders\.shop\._target_="),
        ("graders.math.deadline_s=0", r"graders\.math\.deadline_s needs a number from 1"),
        ("graders.math.deadlines=1", r"no setting 'graders\.math\.deadlines'.*graders\.math\.deadline_s"),
        ("graders.shop._target_=os.getcwd", r"needs a function|is called with"),
        ("~graders.shop", r"no grader is called 'shop'"),
    ],
)
def test_what_names_no_part_is_a_sentence(override: str, says: str) -> None:
    with pytest.raises(OpdError, match=says) as caught:
        planned(override)
    assert "\n" not in str(caught.value)
