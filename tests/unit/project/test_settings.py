"""Settings are what their annotations say, wherever they come from: one sentence or a legal plan."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.plan.checks.settings import check_settings
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError, OpdError
from opd.method.slots import Objective, Rollout, Scorer
from opd.objectives.sampled import SampledReverseKL
from opd.settings.ranges import In, Length
from opd.settings.validation import fit, settings, spelled
from tests.fuzz import overrides

SHOP = ["experiment=shop"]


def refused(*lines: str) -> str:
    with pytest.raises(OpdError) as caught:
        make_plan(run_config([*SHOP, *lines]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hostile_values_are_a_sentence_or_a_legal_plan() -> None:
    """A slice of `python -m tests.fuzz.overrides`, which walks every shipped configuration."""
    chosen = [(*SHOP, "method=gkd"), (*SHOP, "method=eopd"), (*SHOP, "method=minillm")]
    figures = overrides.run(overrides.lines(40, 6, chosen))
    assert not figures.wrong, figures.wrong
    assert figures.ends["planned"] and figures.ends["refused"] > 20


def test_the_table_of_rules_tells_nonsense_from_sense() -> None:
    config = run_config(SHOP)
    assert overrides.nonsense(config) == ""
    for change in (
        {"steps": 0},
        {"max_ratio": float("nan")},
        {"grace_s": True},
        {"run_name": "../x"},
        {"notes": "abc"},
    ):
        spoilt = run_config(SHOP)
        for name, value in change.items():
            object.__setattr__(spoilt, name, value)
        assert overrides.nonsense(spoilt).startswith(next(iter(change)))


INSTANCES = {
    "method.rollout.temperature=-1": "needs 0, or a number from 0.01 to 100, got -1 .*; set .*=1.0$",
    "method.rollout.temperature=nan": "got nan; set method.rollout.temperature=1.0$",
    "method.rollout.max_tokens=[]": r"needs a whole number .*, got \[\]",
    "method.rollout=-1": "needs a part for the slot Rollout",
    "method.rollout={}": "changes nothing",
    "method.update._target_=opd.token_weights.length.SkipTruncated": "called without await",
    "method.normalizer._target_=opd.method.promises.Union": "gives Tensor and not float",
    "learner.lr=10": "at most|from 1e-12 to 1, got 10",
    "learner.lora=null": "needs fields of LoraConfig such as r, got null",
    "learner.deadline_s=inf": "got inf",
    "learner.sentinel_tolerance=1e9": "from 1e-06 to 5",
    "learner.zero_stage=true": "needs a whole number from 0 to 3 or one of AUTO, got true",
    "student.replicas=99999999999999999999": "from 1 to 10000",
    "hardware.flops={}": "hardware.flops",
    "teacher.backend=[1]": "needs one of TORCH, VLLM",
    "notes=-1": r"needs a list .*; set notes=\['-1'\]",
    "tracker.tags=abc": r"set tracker.tags=\[abc\]$",
    "allow_targets=['']": "names a package",
    "allow_targets=null": "needs a list",
    "steps=1e3": "set steps=1000$",
    "doctor=1": "set doctor=true$",
    "doctor=yes": "set doctor=true$",
    "steps=1k": "set steps=1000$",
    "steps=null": "set steps=100$",
    "max_buffer_bytes=4GiB": "set max_buffer_bytes=4294967296$",
    "learner.lr=1e-3f": "set learner.lr=0.001$",
    "learner.zero_stage=zero2": "set learner.zero_stage=2$",
    "learner.dtype=bf16": "set learner.dtype=BFLOAT16$",
    "prompts.prompts_per_step=100000000": "from 1 to 20000",
    "prompts.group_size=99999999999999999999": "from 1 to 4096",
    "run_name=../../x": "letters, digits",
    "cluster.cpus_per_actor=1.5": "whole above 1",
    "cluster.hedge_quantile=2": "from 0 and below 1",
}


@pytest.mark.parametrize("line", INSTANCES)
def test_a_value_out_of_its_type_or_range_is_named_with_what_to_set(line: str) -> None:
    said = refused(line)
    assert re.search(INSTANCES[line], said) and said.startswith(line.partition("=")[0].removesuffix("._target_")), said


TWO_PARTS = {
    "method=topk_reverse_kl method.scorer.k=2000": "the vocabulary has 64 ids; set method.scorer.k=64 or less",
    "method=eopd method.objective.k=100": "the vocabulary has 64 ids",
    "method=topk_reverse_kl teacher.max_k=1": "set teacher.max_k=16, or method.scorer.k=1",
    "steps=20 learner.warmup_steps=50": "would never reach learner.lr",
    "max_staleness=100 steps=5": "set max_staleness=1 or more steps",
    "learner.zero_stage=1 learner.lora.r=4096": "has rank 96",
    "teacher.url=http://there:1": "does nothing with teacher.backend=TORCH; set teacher.backend=HTTP or OPENAI",
    "learner.lora.r=8 learner.lora.target_modules=[nope]": "it has down_proj, gate_proj",
    "learner.lora.r=8 learner.lora.target_modules=[all-linear,q_proj]": "and others",
    "prompts.prompts_per_step=20000 prompts.group_size=4096": "a run holds at most",
    "+method.weights.b={_target_:opd.token_weights.teachers.TeacherBalance,shares:{x:1}}": "lacks teacher 'default'",
}


@pytest.mark.parametrize("line", TWO_PARTS)
def test_what_needs_two_settings_is_checked_in_the_plan(line: str) -> None:
    assert TWO_PARTS[line] in refused(*line.split())


def test_engines_that_share_a_device_do_not_take_more_than_all_of_it() -> None:
    halves = [*SHOP, "cluster.gpus_per_engine=0.5", "student.replicas=2"]
    with pytest.raises(ConfigurationError, match=r"set student\.gpu_memory_utilization=0\.5$"):
        check_settings(run_config(halves))
    check_settings(run_config([*halves, "student.gpu_memory_utilization=0.5"]))


def test_a_trial_of_few_steps_keeps_the_shipped_warm_up() -> None:
    assert make_plan(run_config([*SHOP, "steps=2"])).config.learner.warmup_steps == 10


class Shade(Enum):
    LIGHT = "light"


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Lamp:
    watts: Annotated[float, In(0, 60, low_open=True, because="the socket melts")]
    shade: Shade = Shade.LIGHT
    names: Annotated[tuple[str, ...], Length(1)] = ("lamp",)
    rooms: Mapping[str, Annotated[int, In(0, 9)]] = field(default_factory=dict)
    near: "Lamp | None" = None


def test_a_part_built_in_python_is_checked_alike_and_kept_in_its_declared_form() -> None:
    lamp = Lamp(watts=40, names=["a", "b"], shade=Shade.LIGHT)  # type: ignore[arg-type]
    assert type(lamp.watts) is float and lamp.names == ("a", "b")
    for wrong in ({"watts": 0}, {"watts": float("inf")}, {"watts": True}, {"watts": 1, "names": ()}, {"watts": "40"}):
        with pytest.raises(ConfigurationError, match=r"^Lamp\.(watts|names) needs "):
            Lamp(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"^Lamp\.rooms\.hall needs a whole number from 0 to 9, got 10"):
        Lamp(watts=1.0, rooms={"hall": 10})


@given(st.floats(), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_a_range_lets_in_what_lies_in_it_and_nothing_else(value: float, low: float, width: float) -> None:
    hint = Annotated[float, In(low, low + width)]
    if low <= value <= low + width:
        assert fit(hint, value, "x") == value
    else:
        with pytest.raises(ConfigurationError, match=r"^x needs a number from"):
            fit(hint, value, "x")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
HINTS: Sequence[Any] = (
    Annotated[int, In(1, 9)], Annotated[float, In(0, 1)], str, bool, Shade, Sequence[str], tuple[int, ...], Lamp,
    Mapping[str, Annotated[float, In(0, 1)]], str | None, Rollout, Scorer, Objective,
)  # fmt: skip


@given(st.sampled_from(HINTS), ANYTHING)
def test_any_value_is_taken_as_it_is_or_refused_in_one_sentence(hint: Any, value: Any) -> None:
    try:
        fitted = fit(hint, value, "a.b")
    except ConfigurationError as error:
        said = str(error)
    else:
        said = "a.b"
        assert fitted == value or (hint is Shade and fitted.name == value.upper()) or list(fitted) == list(value)
        assert isinstance(fitted, bool) == isinstance(value, bool)
    assert "\n" not in said and len(said) < 500 and "a.b" in said


def test_a_user_s_part_that_lacks_what_its_slot_asks_for_is_one_sentence() -> None:
    @dataclass(frozen=True, slots=True)
    class Unsaid:
        def __call__(self, student: Any, batch: Any) -> Any: ...

    @dataclass(frozen=True, slots=True)
    class Mistaken(SampledReverseKL):
        consumes = "TokenScores"  # type: ignore[assignment]

    with pytest.raises(ConfigurationError, match=r"Unsaid lacks consumes"):
        fit(Objective, Unsaid(), "method.objective")
    with pytest.raises(ConfigurationError, match=r"its consumes is not what it should be"):
        fit(Objective, Mistaken(), "method.objective")
    with pytest.raises(ConfigurationError, match="is a class, build one"):
        fit(Objective, SampledReverseKL, "method.objective")


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20))
def test_a_text_is_spelled_so_that_the_command_line_reads_it_back(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = OverridesParser.create().parse_override(f"x={spelled(text)}").value()
    assert str(read) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: !!python/object/apply:os.system ['true']\n", "tag"),
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(7)), "aliases"),
        ("a: " + "[" * 5000 + "\n", "nested"),
        ("a: [1\n", "line"),
        ("a: \x00\n", "line"),
    ],
)  # fmt: skip
def test_a_yaml_of_ones_own_that_is_no_plain_data_is_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(text)
    said = refused(f"conf={tmp_path}", "method=mine")
    assert "mine.yaml" in said and says in said
