"""Configurations and checkpoints of before name parts by where they were; those go on."""

import importlib
from typing import Any

import pytest

from launch.artifacts.checkpoint_state import at_defaults, described, in_todays_names
from launch.artifacts.old_names import CLASSES, MODULES, SETTINGS, SPECIAL, todays, todays_setting
from launch.checkpoint.changes import changes
from launch.config.run_config import run_config
from opd.errors import ConfigurationError
from opd.objectives.estimators import Baseline, SampledDivergence
from opd.objectives.support import Outside, SupportDivergence
from opd.objectives.topk import HeadTailDivergence, TopKDivergence
from opd.objectives.truncated import TruncatedRatio
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL

BEFORE = {
    "method.weights.skip": "opd.weights.special.SkipFirst",
    "method.normalizer": "opd.packing.SequenceMean",
    "prompts": "opd.prompts.shop.ShopPrompts",
}


@pytest.mark.parametrize("old", MODULES)
def test_what_has_moved_is_where_the_table_says(old: str) -> None:
    importlib.import_module(MODULES[old].rstrip("."))
    assert todays(f"{old}Part") == f"{MODULES[old]}Part" and todays(todays(f"{old}Part")) == f"{MODULES[old]}Part"


@pytest.mark.parametrize("old", CLASSES)
def test_a_renamed_class_has_the_name_of_the_table(old: str) -> None:
    assert _class(old).__name__ == CLASSES[old].rpartition(".")[2]


def test_a_renamed_setting_is_named_in_the_refusal_and_known_in_a_checkpoint() -> None:
    now = described(run_config(["experiment=shop"]))
    for old, new in SETTINGS.items():
        places = [name for name in now if name.rpartition(".")[2] == new]
        assert places and all(todays_setting(name.replace(new, old)) == name for name in places)
        with pytest.raises(ConfigurationError, match=new):
            run_config(["experiment=shop", f"cluster.{old}=3" if old == "journal_bytes" else f"teacher.{old}=3"])


def test_an_old_path_in_a_configuration_builds_the_part_of_today() -> None:
    old = [
        f"+{where}._target_={path}" if "skip" in where else f"{where}._target_={path}" for where, path in BEFORE.items()
    ]
    config = run_config(["experiment=shop", "+method.weights.skip.token_ids=[2]", *old])
    assert {type(config.prompts), type(config.method.normalizer), type(config.method.weights["skip"])} == {
        _class(path) for path in BEFORE.values()
    }


def test_a_renamed_class_in_a_configuration_builds_the_class_of_today() -> None:
    old = "opd.scorers.teacher.WrittenTokens"
    config = run_config(["experiment=shop", "method=sampled_reverse_kl", f"method.scorer._target_={old}"])
    assert type(config.method.scorer) is _class(old)


def test_a_checkpoint_of_before_is_the_same_run() -> None:
    now = described(run_config(["experiment=shop", "method=mopd_topk"]))
    back = {new: old for old, new in MODULES.items()}
    old = {new: old for old, new in SETTINGS.items()}
    before = {
        _renamed(name, old): _moved(value, back) if isinstance(value, str) else value for name, value in now.items()
    }
    assert before != now and not changes(in_todays_names(before), now)


REVERSE, FORWARD = FullReverseKL(), FullForwardKL()
OBJECTIVES: dict[str, tuple[str, Any]] = {  # a method whose scorer fits, and what the old name must build
    "topk.HeadTailReverseKL": ("mopd_topk", HeadTailDivergence(of=REVERSE)),
    "topk.TailBucketReverseKL": ("mopd_topk", TopKDivergence(of=REVERSE, outside=Outside.BUCKET)),
    "topk.TailBucketForwardKL": ("mopd_topk", TopKDivergence(of=FORWARD, outside=Outside.BUCKET)),
    "topk.RenormalizedReverseKL": ("mopd_topk", TopKDivergence(of=REVERSE, outside=Outside.RENORMALIZED)),
    "topk.RenormalizedForwardKL": ("mopd_topk", TopKDivergence(of=FORWARD, outside=Outside.RENORMALIZED)),
    "topk.StopGradientReverseKL": ("mopd_topk", TopKDivergence(of=REVERSE, outside=Outside.NOTHING)),
    "support.SupportReverseKL": ("full_reverse_kl", SupportDivergence(of=REVERSE, outside=Outside.RENORMALIZED)),
    "estimators.BaselinedReverseKL": ("full_reverse_kl", SampledDivergence(of=REVERSE, baseline=Baseline.VOCABULARY)),
    "estimators.TopKBaselinedReverseKL": ("mopd_topk", SampledDivergence(of=REVERSE, baseline=Baseline.TOPK)),
}


def test_every_special_class_of_before_is_tried_here() -> None:
    old = {f"opd.objectives.{name}" for name in OBJECTIVES}
    assert old == SPECIAL.keys()
    assert all(isinstance(_class(SPECIAL[name].path), type) for name in old)


@pytest.mark.parametrize("old", OBJECTIVES)
def test_a_special_class_of_before_is_the_general_one_with_its_fields(old: str) -> None:
    method, now = OBJECTIVES[old]
    given = f"method.objective._target_=opd.objectives.{old}"
    assert run_config(["experiment=shop", f"method={method}", given]).method.objective == now
    bounded = ["+method.objective.of._target_=opd.objectives." + old, "+method.objective.max_ratio=3"]
    if now.on_policy:  # an objective within an objective
        wrapped = "method.objective._target_=opd.objectives.truncated.TruncatedRatio"
        config = run_config(["experiment=shop", f"method={method}", wrapped, *bounded])
        assert config.method.objective == TruncatedRatio(of=now, max_ratio=3.0)


def test_what_could_be_set_beside_an_old_name_still_can() -> None:
    old = ["method=full_reverse_kl", "method.objective._target_=opd.objectives.support.SupportReverseKL"]
    config = run_config(["experiment=shop", *old, "+method.objective.outside=NOTHING"])
    assert config.method.objective == SupportDivergence(of=REVERSE, outside=Outside.NOTHING)


def test_an_old_name_beside_fields_that_contradict_it_is_refused_with_the_new_one() -> None:
    old = ["method=tail_bucket_reverse_kl", "method.objective._target_=opd.objectives.topk.RenormalizedReverseKL"]
    sentence = r"TopKDivergence with \{of: \{_target_: .*FullReverseKL\}, outside: RENORMALIZED\} now, but .*outside is"
    with pytest.raises(ConfigurationError, match=sentence + r" BUCKET; name .*TopKDivergence and set its fields"):
        run_config(["experiment=shop", *old])


@pytest.mark.parametrize("old", OBJECTIVES)
def test_a_checkpoint_of_a_special_class_is_the_same_run(old: str) -> None:
    method, _ = OBJECTIVES[old]
    path = f"opd.objectives.{old}"
    now = described(run_config(["experiment=shop", f"method={method}", f"method.objective._target_={path}"]))
    added = {"method.objective.of", "method.objective.baseline", *({"method.objective.outside"} - _kept(path))}
    before = {name: value for name, value in now.items() if name not in added} | {"method.objective": path}
    assert before != now and not changes(in_todays_names(before), now) and in_todays_names(now) == now


def test_a_checkpoint_of_a_sampled_divergence_had_no_baseline() -> None:
    config = run_config(["experiment=shop", "method=sampled_jensen_shannon"])
    now = described(config)
    before = {name: value for name, value in now.items() if name != "method.objective.baseline"}
    assert before != now and not changes(in_todays_names(before), now, at_defaults(config))


def _kept(path: str) -> set[str]:
    """Settings that the special class had, too."""
    return {f"method.objective.{name}" for name in SPECIAL[path].defaults}


def _renamed(name: str, old: dict[str, str]) -> str:
    place, dot, last = name.rpartition(".")
    return place + dot + old.get(last, last)


def _class(path: str) -> type:
    module, _, name = todays(path).rpartition(".")
    return getattr(importlib.import_module(module), name)


def _moved(value: str, back: dict[str, str]) -> str:
    module, dot, name = value.rpartition(".")
    path = back.get(module + dot, module + dot) + name
    return {new: old for old, new in CLASSES.items()}.get(path, path)
