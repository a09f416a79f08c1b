"""Every YAML in conf/ builds, and a wrong request gets one sentence that names what is wrong."""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from launch.cli.api.inputs import described
from launch.cli.stages import stages_of
from launch.config.composition.compose import _compose, compose, hydra_started
from launch.config.run_config import RunConfig, run_config
from launch.config.shipped_files import groups
from launch.config.typed import construct
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.objectives.returns import MiniLLM
from opd.scorers.returns import WithReturns
from opd.token_weights.special_tokens import SkipFirst
from opd.token_weights.teachers import TeacherBalance
from tests.fuzz.overrides import lines
from tests.method_needs import NEEDS

METHODS = groups()["method"]
EXPERIMENTS = [  # published ones are planned in tests/unit/hub/test_published.py
    name
    for name in groups()["experiment"]
    if not name.startswith("published/") and "comparison" not in compose([f"experiment={name}"])
]
NEEDED = {
    "student=hf": ["student.path=x"],
    "teacher=hf": ["teacher.path=x"],
    "prompts=dataset": ["prompts.path=x"],
    "prompts=mixed": ["prompts.sources.a={_target_: opd.prompts.dataset.DatasetPrompts, path: x, prompts_per_step: 2}"],
    "evaluation=none": ["evaluation_sets=[gsm8k]"],
    "evaluation_sets=own": ["evaluation.sets.own.prompts.path=x"],
    "evaluation=dataset": ["prompts=dataset", "prompts.path=x", "evaluation.prompts.path=y"],
}


@cache
def with_method(name: str) -> RunConfig:
    return run_config([f"method={name}", *NEEDS.get(name, ())])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds(name: str) -> None:
    """Also from an object, as Python gives one: written as plain values and read again it is the same."""
    method = with_method(name).method
    assert method.name == name
    written = {key: value for key, value in described(method, "method").items() if key != "_target_"}
    assert described(construct(Method, written, "method", ["opd."]), "method") == described(method, "method")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row_in_the_docs_and_says_where_it_comes_from(name: str) -> None:
    root = Path(__file__).resolve().parents[2]
    assert any(f"| `{name}` |" in page.read_text() for page in (root / "docs" / "methods").glob("*.md"))
    assert (root / "conf" / "method" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    "choice",
    [f"{group}={o}" for group, options in groups().items() if group not in ("method", "experiment") for o in options],
)
def test_every_option_builds(choice: str) -> None:
    run_config([choice, *NEEDED.get(choice, [])])


@pytest.mark.parametrize("name", groups()["method"])
def test_every_method_can_be_planned(name: str) -> None:
    plan = make_plan(with_method(name))
    assert plan.config.method.scorer.requires <= plan.config.teacher.supports


def test_minillm_weighs_what_follows_as_the_papers_equation_does() -> None:
    """The long part is the gradient of what the short part leaves out only while both have the same scale."""
    scorer, objective = run_config(["method=minillm"]).method.scorer, run_config(["method=minillm"]).method.objective
    assert isinstance(scorer, WithReturns) and isinstance(objective, MiniLLM)
    assert scorer.reward_scale * objective.long_weight == 1 and (scorer.discount, objective.alpha) == (0.95, 0)


def test_a_plan_knows_the_ids_of_tokens_that_a_weight_names() -> None:
    base = ["method=local_support_matching", "method.weights.special.tokens=['<eos>','<bos>',think]"]
    special = make_plan(run_config(base)).config.method.weights["special"]
    assert isinstance(special, SkipFirst) and tuple(special.token_ids) == (2, 1) and not special.tokens
    shipped = run_config(base[:1]).method.weights["special"]
    assert isinstance(shipped, SkipFirst) and list(shipped.tokens) == ["<", "think", "<|im_end|>", "<|endoftext|>"]
    kept = [
        "method=jensen_shannon",
        "method.weights.balance={_target_: opd.token_weights.teachers.TeacherBalance, filters: {special: "
        "{_target_: opd.token_weights.special_tokens.SkipFirst, tokens: ['<eos>']}}}",
    ]
    balance = make_plan(run_config(kept)).config.method.weights["balance"]
    assert isinstance(balance, TeacherBalance) and tuple(balance.filters["special"].token_ids) == (2,)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name: str) -> None:
    given = [f"experiment={name}"]
    stages = [stage.overrides for stage in stages_of(compose(given), given)] or [()]
    assert all(run_config([*given, *own, "stages=null"]).steps > 0 for own in stages)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stepz=5"], r"no 'stepz'.*did you mean 'steps'"),
        (["learner.lrr=1"], r"no setting 'learner\.lrr'.*write learner\.lr="),
        (["method=topk_reverse"], r"method=topk_reverse does not exist.*did you mean method=topk_reverse_kl"),
        (["method.scorer.kk=3", "method=topk_reverse_kl"], r"method\.scorer\.kk.*'method\.scorer\.k'"),
        (["metod=sft"], r"no 'metod'.*'method'"),
        (["steps=0"], r"^steps needs a whole number from 1 to \d+, got 0; set steps=100$"),
        (["steps=many"], r"^steps needs a whole number .*, got 'many'"),
        (["learner.lr=fast"], r"^learner\.lr needs a number .*, got 'fast'; set learner\.lr=5e-06$"),
        (["learner.dtype=FLOAT8"], r"learner\.dtype needs one of .*FLOAT32.*, got 'FLOAT8'"),
        (["steps"], r"override 'steps' has no value"),
        (["method=grpo"], r"GroupAdvantage.*needs prompts\.group_size >= 2, but got 1"),
        (["max_staleness=-1"], r"max_staleness needs a whole number from 0 to .*strictly on-policy"),
        (["student=hf"], r"student\.path is not set"),
        (
            ["method.scorer._target_=os.path.join"],
            r"method\.scorer\._target_ is 'os\.path\.join', but only parts below opd\.",
        ),
        (["method.scorer._target_=opd.scorers.nothing.X"], r"cannot be imported"),
        (["method.scorer._target_=opd.scorers.teacher.ask"], r"is no dataclass"),
        (
            ["method.scorer._target_=opd.scorers.teacher.SampledTokens"],
            r"FullReverseKL needs VocabularyScores.*SampledTokens produces TokenScores",
        ),
        (
            ["method=student_topk_reverse_kl", "method.rollout.record_topk=0"],
            r"needs TopKScores of the behavior policy.*set rollout\.record_topk",
        ),
        (
            ["method=jensen_shannon", "method.objective.beta=0"],
            r"method\.objective\.beta needs .*FullForwardKL.*beta=0\.5$",
        ),
        (["prompts.prompts_per_step=0"], r"prompts\.prompts_per_step needs a whole number from 1 to"),
        (["evaluation.samples=0"], r"evaluation\.samples needs a whole number from 1 to .*; set evaluation\.samples=1"),
    ],
)
def test_a_wrong_request_is_one_sentence(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        run_config(overrides)
    assert re.search(says, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_field_can_be_overridden_even_when_the_yaml_does_not_mention_it() -> None:
    config = run_config(["method=sampled_reverse_kl", "method.objective.signal=BEHAVIOR", "learner.weight_decay=0.1"])
    assert config.method.objective.signal.name == "BEHAVIOR"  # pyright: ignore
    assert config.learner.weight_decay == 0.1


def test_further_teachers_stand_beside_the_default() -> None:
    config = run_config(["teachers.maths.path=x", "teachers.maths.replicas=2", "teacher.path=y"])
    assert {name: (t.path, t.replicas) for name, t in config.teachers.items()} == {
        "default": ("y", 1),
        "maths": ("x", 2),
    }
    assert config.teacher is config.teachers["default"]
    copy = run_config(["teacher.path=${student.path}"])  # a teacher that is the student as it was at the start
    assert copy.teacher.path == copy.student.path


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teachers.default.path=x"], r"teachers.default: .* other than 'default' \(which is the group `teacher`\)"),
        (["teachers.Big.path=x"], r"teachers.Big: .*small letters"),
        (["teachers.b.paht=x"], r"no setting 'teachers\.b\.paht'.*nearest is teachers\.b\.path "),
        (["teachers.b.replicas=2"], r"teachers.b.path is not set"),
        (["teachers.b=x"], r"teachers\.b needs fields .* such as path, got 'x'; set teachers\.b\.path="),
    ],
)
def test_a_wrong_teacher_is_named(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        run_config(overrides)


def test_an_unknown_route_is_refused_before_anything_starts() -> None:
    """By a generated source, by a column of a file whose first step does not show it, and by an ensemble."""
    for overrides, place in (
        (["prompts.teacher=nobody"], r"'shop/0/0' asks for teacher 'nobody', but the run has \['default'\]"),
        (["evaluation.prompts.teacher=nobody"], r"'shop/1000000/0' asks for teacher 'nobody'"),
        (
            ["method.scorer={_target_: opd.scorers.ensemble.Ensemble, shares: {default: 1, nobody: 1}}"],
            r"a scorer of the method asks for teacher 'nobody'.*teachers.nobody.path=",
        ),
    ):
        with pytest.raises(ConfigurationError, match=place):
            make_plan(run_config(["experiment=shop", *overrides]))


def test_an_unknown_route_far_down_a_file_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "has 3 7 ; Mon buys 1 ?", "who": "default"}] * 99 + [{"prompt": "has 3 7 ?", "who": "nobody"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = ["prompts=dataset", f"prompts.path={tmp_path / 'rows.jsonl'}", "prompts.teacher_column=who"]
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl line 100 asks for teacher 'nobody'"):
        make_plan(run_config([*mine, "prompts.shuffle=false", "prompts.prompts_per_step=4", "prompts.task=shop"]))


def test_the_plan_shows_every_teacher() -> None:
    plan = make_plan(run_config(["experiment=two_teachers"]))
    memory = plan.memory_bytes()
    assert set(plan.teacher_params) == {"default", "peak"}
    assert memory["teacher actor"] > memory["teacher actor 'peak'"] > 0
    alone = make_plan(
        run_config(["experiment=two_teachers", "~teachers.peak", "prompts.teachers.peak=default"])
    ).memory_bytes()
    assert memory["learner rank"] - alone["learner rank"] == 64 * 96 * 4  # the second output matrix
    assert any("'peak'" in str(cell) for cell in plan.table().columns[0].cells)


@pytest.mark.parametrize("prompts", groups()["prompts"])
def test_any_prompts_go_with_any_evaluation_and_all_sets(prompts: str) -> None:
    """An option that takes a setting from another group must have one of its own where that group has none."""
    sets = f"evaluation_sets=[{','.join(groups()['evaluation_sets'])}]"
    for evaluation in groups()["evaluation"]:
        node = compose([f"prompts={prompts}", f"evaluation={evaluation}", sets, "method=kdrl", "max_tokens=8"])
        for missing in OmegaConf.missing_keys(node):
            OmegaConf.update(node, missing, "x")
        OmegaConf.resolve(node)


GIVEN = [
    *((*line.base, line.override) for line in lines(12, 11, [("experiment=shop", "method=gkd")])),
    ("experiment=two_teachers", "teachers.peak.replicas=2", "teachers.peak.replicas=3"),
    ("experiment=compare", "+comparison.seeds=[1]"),
    ("experiment=shop", "+learner.lr=3"),
    ("experiment=shop", "~prompts.nothing"),
    ("experiment=shop", "~evaluation.prompts=3"),
    ("experiment=shop", "evaluation.prompts={seed:3}", "notes=[a,'b=c']"),
    ("experiment=shop", "max_tokens=${steps}", "learner.lr.x=3"),
    ("+experiment=shop", "method@other=gkd"),
    ("experiment=published/kdrl", "tracker=[wandb,tensorboard]", "prompts.group_size=2"),
    ("experiment=shop", "method=trd", "~method.rollout.student", "+method.rollout.student={_target_: a.B}"),
]


@pytest.mark.parametrize("given", GIVEN)
def test_options_that_are_composed_before_give_what_hydra_gives_at_once(given: tuple[str, ...]) -> None:
    def outcome(compose_: Callable[[Sequence[str]], DictConfig]) -> str:
        try:
            node = compose_(given)
        except ConfigurationError as error:
            return str(error)
        return OmegaConf.to_yaml(node) + str(OmegaConf.is_struct(node))

    def at_once(given: Sequence[str]) -> DictConfig:
        with hydra_started(""):
            return hydra.compose("config", overrides=list(given))

    assert outcome(lambda given: _compose("", given)) == outcome(at_once)
    assert outcome(lambda given: _compose("", given)) == outcome(at_once), "nothing that was composed has changed"
