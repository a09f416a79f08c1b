"""Configurations and checkpoints of before name parts by where they were; those go on."""

import importlib

import pytest

from launch.artifacts.checkpoint_state import described, in_todays_names
from launch.artifacts.moved import CLASSES, MODULES, SETTINGS, todays, todays_setting
from launch.checkpoint.changes import changes
from launch.config.run_config import run_config
from opd.errors import ConfigurationError

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
