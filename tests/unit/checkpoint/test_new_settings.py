"""Settings that a checkpoint does not know: at their defaults they are no change, otherwise they are one."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.artifacts.checkpoint_state import at_defaults, described, in_todays_names
from launch.checkpoint.changes import changes
from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.devices import resolved

RECORDED = Path(__file__).with_name("recorded")
METHODS = ("sampled_jensen_shannon", "mopd_topk", "grpo")
OVERRIDES = (
    [],
    ["method.coefficient=0.5", "stop_after.tokens=9"],
    ["learner.lr=0.002", "+method.weights.w._target_=opd.token_weights.teachers.PromptWeight"],
)


@cache
def _run(method: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    groups = ["prompts.group_size=8"] if method == "grpo" else []
    return resolved(run_config(["experiment=shop", f"method={method}", *groups, *overrides]))


@pytest.mark.parametrize("version", sorted(path.stem for path in RECORDED.glob("*.json")))
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_an_older_version_is_the_same_run(version: str, method: str) -> None:
    before = json.loads((RECORDED / f"{version}.json").read_text())[method]
    config = _run(method)
    found = changes(in_todays_names(before), described(config), at_defaults(config))
    wrong = [change.name for change in found if not change.harmless]
    assert wrong == ["student.path", "teachers.default.path"][: len(wrong)]  # places that the record leaves out


@given(st.data())
def test_whatever_settings_a_checkpoint_lacks_are_no_change_at_their_defaults(
    data: st.DataObject,
) -> None:
    config = _run(data.draw(st.sampled_from(METHODS)), tuple(data.draw(st.sampled_from(OVERRIDES))))
    now, default = described(config), at_defaults(config)
    assert default < now.keys()
    lacks = data.draw(st.sets(st.sampled_from(sorted(now))))
    found = changes({name: value for name, value in now.items() if name not in lacks}, now, default)
    assert {change.name for change in found} == {name for name in lacks - default if now[name] is not None}


def test_what_was_set_or_added_is_no_default() -> None:
    config = _run("mopd_topk", ("method.coefficient=0.5", "stop_after.tokens=9", *OVERRIDES[2]))
    default = at_defaults(config)
    set_here = {"method.coefficient", "stop_after.tokens", "learner.lr", "method.weights.w", "method.objective"}
    assert not set_here & default
    assert {"stop_after", "stop_after.flops", "method.normalizer"} <= default
