"""Every YAML in conf/ builds, and a wrong request gets one sentence that names what is wrong."""

import re
from pathlib import Path

import pytest

from launch.config import groups, run_config
from opd.errors import ConfigurationError

METHODS = groups()["method"]
EXPERIMENTS = [name for name in groups()["experiment"] if not name.startswith("compare")]
GROUP_OF_TWO = {"grpo": ["prompts.group_size=2"]}
NEEDED = {
    "student=hf": ["student.path=x"],
    "teacher=hf": ["teacher.path=x"],
    "prompts=dataset": ["prompts.path=x"],
    "evaluation=dataset": ["prompts=dataset", "prompts.path=x", "evaluation.prompts.path=y"],
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds(name: str) -> None:
    config = run_config([f"method={name}", *GROUP_OF_TWO.get(name, [])])
    assert config.method.name == name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row_in_the_docs_and_says_where_it_comes_from(name: str) -> None:
    root = Path(__file__).resolve().parents[2]
    assert f"`{name}`" in (root / "docs" / "methods.md").read_text()
    assert (root / "conf" / "method" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    "choice",
    [f"{group}={o}" for group, options in groups().items() if group not in ("method", "experiment") for o in options],
)
def test_every_option_builds(choice: str) -> None:
    run_config([choice, *NEEDED.get(choice, [])])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name: str) -> None:
    assert run_config([f"experiment={name}"]).steps > 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stepz=5"], r"no 'stepz'.*did you mean 'steps'"),
        (["learner.lrr=1"], r"learner\.lrr.*no such field.*did you mean 'lr'"),
        (["method=topk_reverse"], r"method=topk_reverse does not exist.*did you mean 'topk_reverse_kl'"),
        (["method.scorer.kk=3", "method=topk_reverse_kl"], r"method\.scorer\.kk: TeacherTopK has no such field.*'k'"),
        (["metod=sft"], r"no 'metod'.*'method'"),
        (["steps=0"], r"steps is 0, but a run needs at least 1"),
        (["steps=many"], r"steps needs int, but got 'many'"),
        (["learner.lr=fast"], r"learner\.lr needs float, but got 'fast'"),
        (["learner.dtype=FLOAT8"], r"learner\.dtype needs Dtype, one of \[.*FLOAT32.*\], but got 'FLOAT8'"),
        (["steps"], r"override 'steps' has no value"),
        (["method=grpo"], r"GroupAdvantage.*needs prompts\.group_size >= 2, but got 1"),
        (["max_staleness=-1"], r"max_staleness.*>= 0"),
        (["student=hf"], r"student\.path is not set"),
        (
            ["method.scorer._target_=os.path.join"],
            r"method\.scorer\._target_ is 'os\.path\.join', but only parts below opd\.",
        ),
        (["method.scorer._target_=opd.scorers.nothing.X"], r"cannot be imported"),
        (["method.scorer._target_=opd.scorers.teacher.ask"], r"is no dataclass"),
        (
            ["method.scorer._target_=opd.scorers.teacher.WrittenTokens"],
            r"FullReverseKL needs VocabularyScores.*WrittenTokens produces TokenScores",
        ),
        (
            ["method=student_topk_reverse_kl", "method.rollout.record_topk=0"],
            r"needs TopKScores from the writer.*set rollout\.record_topk",
        ),
        (["method=jensen_shannon", "method.objective.beta=0"], r"0 < beta < 1.*FullForwardKL"),
        (["prompts.prompts_per_step=0"], r"prompts_per_step >= 1"),
        (["evaluation.samples=0"], r"evaluation needs.*samples"),
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
