"""Configurations and checkpoints of before name parts by where they were; those go on."""

import importlib

import pytest

from launch.artifacts.checkpoint_state import changes, described, in_todays_names
from launch.artifacts.moved import MOVED, todays
from launch.config.run_config import run_config

BEFORE = {
    "method.weights.skip": "opd.weights.special.SkipFirst",
    "method.normalizer": "opd.packing.SequenceMean",
    "prompts": "opd.prompts.shop.ShopPrompts",
}


@pytest.mark.parametrize("old", MOVED)
def test_what_has_moved_is_where_the_table_says(old: str) -> None:
    importlib.import_module(MOVED[old].rstrip("."))
    assert todays(f"{old}Part") == f"{MOVED[old]}Part" and todays(todays(f"{old}Part")) == f"{MOVED[old]}Part"


def test_an_old_path_in_a_configuration_builds_the_part_of_today() -> None:
    old = [
        f"+{where}._target_={path}" if "skip" in where else f"{where}._target_={path}" for where, path in BEFORE.items()
    ]
    config = run_config(["experiment=shop", "+method.weights.skip.token_ids=[2]", *old])
    assert {type(config.prompts), type(config.method.normalizer), type(config.method.weights["skip"])} == {
        _class(path) for path in BEFORE.values()
    }


def test_a_checkpoint_of_before_is_the_same_run() -> None:
    now = described(run_config(["experiment=shop", "method=mopd_topk"]))
    back = {new: old for old, new in MOVED.items()}
    before = {name: _moved(value, back) if isinstance(value, str) else value for name, value in now.items()}
    assert before != now and not changes(in_todays_names(before), now)


def _class(path: str) -> type:
    module, _, name = todays(path).rpartition(".")
    return getattr(importlib.import_module(module), name)


def _moved(value: str, back: dict[str, str]) -> str:
    module, dot, name = value.rpartition(".")
    return back.get(module + dot, module + dot) + name
