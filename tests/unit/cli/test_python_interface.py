"""The Python interface: what is given from Python is what the command line would have been given."""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings

import opd
from launch.cli.api.inputs import described, importable, part_option, prompts_file, reward_settings
from launch.cli.api.overrides import overrides_of
from launch.cli.api.verbs import _one_error
from launch.config.run_config import run_config
from launch.config.shipped_files import groups
from launch.plan.plan import make_plan
from launch.plan.remembered import REMEMBERED
from opd.errors import ConfigurationError, DataError, OpdError
from opd.prompts.dataset import DatasetPrompts
from tests.command import ROOT


def test_errors_can_be_caught_by_their_names() -> None:
    assert issubclass(opd.ConfigurationError, opd.OpdError) and opd.OpdError is OpdError
    assert {"OpdError", "train"} <= set(dir(opd))


def test_an_error_of_a_task_comes_out_alone() -> None:
    mine, other = ValueError("mine"), DataError("ours")
    for inside, alone in (([mine], mine), ([ExceptionGroup("inner", [mine])], mine), ([mine, other], other)):
        group = ExceptionGroup("tasks", inside)
        group.add_note("how to go on")
        with pytest.raises(type(alone)) as raised, _one_error():
            raise group
        assert raised.value is alone and alone.__notes__[-1] == "how to go on"
    with pytest.raises(ExceptionGroup), _one_error():
        raise ExceptionGroup("tasks", [ValueError("one"), KeyError("another")])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"callbacks": [print, 3]}, r"callbacks\[1\] needs a function of the progress, got 3; give a function"),
        (
            {"trackers": ["wandb"]},
            r"trackers\[0\] needs an object with log\(data, step=\), got 'wandb'; .*tracker=\"wandb\"",
        ),
    ],
    ids=["callback", "tracker"],
)
def test_followers_that_are_none_are_refused_before_anything_starts(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        opd.train(experiment="shop", **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"conf": "no_such_folder"}, "conf=no_such_folder is no folder"),
        ({"verbose": "no"}, "verbose needs True or False, got 'no'"),
        ({"resume": True}, "resume=true is neither"),
        ({"resume": "latest"}, r"resume=latest needs run_name="),
        ({"resume": "runs/none/checkpoints/step_4"}, r"step_4 has no manifest.json"),
        ({"output_dir": os.devnull}, f"output_dir={os.devnull} cannot be written"),
        ({"run_name": "taken"}, "taken exists and is never overwritten"),
        ({"tracker": "wandb"}, "needs a login"),
    ],
    ids=str,
)
def test_a_plan_refuses_what_the_run_would(
    given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text('{"step": 1}\n')
    asked = {"experiment": "shop", "output_dir": str(tmp_path)} | given
    with pytest.raises(OpdError, match=said):
        opd.plan(**asked)


def test_an_open_file_is_no_list_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with path.open() as text, path.open("rb") as raw, NamedTemporaryFile("w+") as other:
        for file in (text, raw, other, io.StringIO(path.read_text())):
            with pytest.raises(ConfigurationError, match=r"prompts is an open file, .* give its path"):
                prompts_file(file, tmp_path, "prompts")


def test_what_is_a_command_alone_is_named_so() -> None:
    with pytest.raises(AttributeError, match=r"'compare'; it has .*train.* commands \(opd --help\)"):
        opd.__getattr__("compare")


def test_numbers_of_numpy_are_numbers() -> None:
    assert overrides_of({"learner": {"lr": np.float64(1e-3)}, "steps": np.int64(3)}, {}) == [
        "learner.lr=0.001",
        "steps=3",
    ]


SCRIPT = """
import pathlib, sys
marks = pathlib.Path(sys.argv[1])
marks.joinpath(f"run-{len(list(marks.iterdir()))}").touch()
from launch.inputs.grading_process import GradingProcess
child = GradingProcess(print, "begun", preload=["math"])
assert child.call(divmod, 7, 2, deadline_s=60) == (3, 1)
child.close()
"""


def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    """Processes that Python starts import the main module again, which would be the user's whole training."""
    script, marks = tmp_path / "mine.py", tmp_path / "marks"
    script.write_text(SCRIPT)
    marks.mkdir()
    subprocess.run(
        [sys.executable, str(script), str(marks)], check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert len(list(marks.iterdir())) == 1


QUIET = ["experiment=shop", "tracker=none"]


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30).filter(lambda t: "$" not in t)
)
def test_text_arrives_as_it_was_given(text: str) -> None:
    config = run_config([*QUIET, *overrides_of({"notes": [text, "x"]}, {})])
    assert list(config.notes) == [" ".join(text.split()), "x"]


@settings(max_examples=30)  # two compositions of the configuration each
@given(
    lr=st.floats(1e-9, 0.5),
    steps=st.integers(1, 10_000),
    doctor=st.booleans(),
    name=st.from_regex(r"[a-z][a-z0-9_=,+-]{0,20}", fullmatch=True),
)
def test_values_arrive_as_they_were_given(lr: float, steps: int, doctor: bool, name: str) -> None:
    given = {"steps": steps, "learner": {"lr": lr}, "doctor": doctor, "run_name": name}
    config = run_config([*QUIET, *overrides_of(given, groups())])
    assert (config.steps, config.learner.lr, config.doctor, config.run_name) == (steps, lr, doctor, name)
    dotted = run_config([*QUIET, *overrides_of({"steps": steps, "learner.lr": lr}, groups())])
    assert dotted.learner == config.learner


def test_options_come_before_what_is_laid_over_them() -> None:
    found = overrides_of({"learner": {"lr": 1e-3}, "steps": 3, "experiment": "shop"}, groups())
    assert found == ["experiment=shop", "learner.lr=0.001", "steps=3"]


def test_a_value_that_is_no_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"learner\.lr needs a number.*got an object of class object"):
        overrides_of({"learner": {"lr": object()}}, {})


def test_a_method_object_runs_by_its_command(tmp_path: Path) -> None:
    method = run_config([*QUIET, "method=gkd"]).method
    overrides = part_option(method, "method", "mine", tmp_path)
    assert run_config([*QUIET, *overrides]).method == method
    assert part_option(method, "method", "mine", tmp_path) == overrides  # the same object, the same files


def test_a_part_of_a_function_is_refused() -> None:
    class Inner:
        pass

    with pytest.raises(ConfigurationError, match=r"method needs a part that is a dataclass"):
        described(Inner(), "method")


@given(st.lists(st.text(min_size=1).filter(lambda t: t.strip() and t.isprintable()), min_size=1, max_size=5))
def test_prompts_are_written_as_they_are(texts: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path, columns, count = prompts_file(texts, Path(folder), "prompts")
        lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert [line["prompt"] for line in lines] == texts
    assert columns == {"prompt_column": "prompt"} and count == len(texts)


def test_conversations_and_answers_have_their_columns(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "1+1?"}]
    _, columns, _ = prompts_file([{"messages": turn, "answer": "2"}], tmp_path, "prompts")
    assert columns == {"prompt_column": "messages", "answer_column": "answer"}
    path, columns, _ = prompts_file([turn], tmp_path, "prompts")
    assert json.loads(path.read_text()) == {"prompt": turn} and columns == {"prompt_column": "prompt"}


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([], "prompts is empty"),
        (["a", 7], r"prompts\[1\] needs a text, a list of messages.*got 7"),
        ([{"prompt": "a", "answer": {1}}], r"prompts\[0\] cannot be written as JSON"),
        ([{"prompt": "a", "answer": float("nan")}], r"prompts\[0\] cannot be written as JSON"),
    ],
)
def test_prompts_that_are_none_are_refused(records: list[Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        prompts_file(records, tmp_path, "prompts")


def short(completion: str) -> float:
    """A reward that another process can import."""
    return -float(len(completion))


def test_a_reward_is_named_by_its_module_or_held() -> None:
    assert importable(short) and not importable(lambda completion: 0.0)
    assert reward_settings(short) == {"_target_": f"{__name__}.short"}
    held = reward_settings(lambda completion: 1.0)
    assert held["_target_"] == "launch.config.held_rewards.HeldReward" and held["name"] == "lambda"
    assert reward_settings(lambda completion: 2.0)["code"] != held["code"]


def test_a_held_reward_of_another_program_is_refused() -> None:
    overrides = overrides_of(
        {"graders.shop": {"_target_": "launch.config.held_rewards.HeldReward", "name": "mine", "code": "0" * 12}}, {}
    )
    with pytest.raises(ConfigurationError, match="the reward mine was a function of the Python program"):
        run_config([*QUIET, *overrides])


def test_a_plan_is_that_of_the_command_line(tmp_path: Path) -> None:
    settings = {"experiment": "shop", "steps": 7, "tracker": "none", "output_dir": str(tmp_path)}
    made = opd.plan(method="topk_reverse_kl", learner={"lr": 2e-4}, **settings)
    overrides = [*QUIET, "method=topk_reverse_kl", "steps=7", "learner.lr=2e-4", f"output_dir={tmp_path}"]
    typed = make_plan(run_config(overrides)).config
    assert (made.config.method, made.config.learner, made.config.steps) == (typed.method, typed.learner, typed.steps)


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    file, shop = tmp_path / "train.jsonl", ROOT / "assets" / "shop"
    for count in (20, 30):
        file.write_text("".join(json.dumps({"prompt": f"has {i % 9} 1 ;", "answer": "3"}) + "\n" for i in range(count)))
        made = opd.plan(
            student=shop / "student", teacher=shop / "teacher", prompts=file, **{"prompts.prompts_per_step": 8}
        )
        assert made.prompts["prompts"].startswith(f"{count} rows")


def test_whatever_keeps_what_it_read_of_a_path_is_forgotten_between_commands() -> None:
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith(("launch.", "hf.", "opd.", "learner.")):
            kept = [one for one in vars(module).values() if hasattr(one, "cache_clear") and one.__module__ == name]
            found |= {one for one in kept if {"path", "source"} & signature(one).parameters.keys()}
    of_shipped_files = {"_comments"}
    assert {one.__name__ for one in found} - of_shipped_files == {one.__name__ for one in REMEMBERED}


def test_the_command_of_a_run_means_the_same(tmp_path: Path) -> None:
    method = run_config([*QUIET, "method=gkd"]).method
    prompts = [
        {"prompt": "has 2 1 ; Mon buys 4 ?", "answer": "5 2"},
        {"prompt": "it's 'x' \\ a=b, c", "answer": "${x}"},
    ]
    made = opd.plan(
        method=method, student="shop", teacher="shop", prompts=prompts, reward=short, max_tokens=20,
        output_dir=tmp_path, tracker="none", notes=["it's 1, 2: {x}", "a"],
    )  # fmt: skip
    again = run_config(made.config.overrides)
    assert again.text == run_config(made.config.overrides).text
    assert described(again.method, "method") == described(method, "method")
    assert (again.notes, again.prompts) == (made.config.notes, made.config.prompts)


def test_a_plan_is_made_where_an_event_loop_runs(tmp_path: Path) -> None:
    async def cell() -> int:
        calls = []

        def reward(completion: str, answer: str) -> float:
            calls.append(completion)
            return float(completion.endswith(answer))

        prompts = [{"prompt": f"has 2 1 ; Mon buys {n} ?", "answer": f"{n} 2"} for n in range(2, 6)]
        made = opd.plan(
            method="grpo", student="shop", teacher="shop", prompts=prompts, reward=reward, max_tokens=20,
            output_dir=str(tmp_path), tracker="none", **{"prompts.group_size": 2},
        )  # fmt: skip
        assert calls, "the plan tries a reward"
        assert any("are trained on" in remark for remark in made.remarks)
        return asyncio.get_running_loop() is not None and made.config.steps

    assert asyncio.run(cell()) == 100


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"reward": short}, "reward= grades the prompts of prompts="),
        ({"method": "full_revers_kl"}, "did you mean method=full_reverse_kl"),
        ({"learner": {"lrr": 1e-3}}, "lrr"),
        ({"student": "/nowhere"}, "/nowhere"),
        ({"method": 3}, "method needs a name .* got 3;"),
        (
            {"prompts": ["a"], "reward": [short]},
            "reward needs the name of a grader or one function, got an object of class list",
        ),
        ({"callbacks": print}, r"callbacks needs a list, got .*; write callbacks=\[\.\.\.\]"),
        ({"trackers": [3]}, r"trackers\[0\] needs an object with log"),
        ({"model": object()}, "there is no 'model', .* write student=hf student.path="),
        ({"processing_class": object()}, "the tokenizer is that in the student's folder"),
        ({"train_dataset": ["long " * 99]}, r"it is prompts\.path here.*\(from Python: prompts=\)"),
        ({"prompts": DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])})}, r"several splits \(train\); give"),
        ({"evaluation": "none"}, "give held-out rows by evaluation=dataset"),
        ({"prompts": {"prompt": "1 + 1?"}}, "prompts is one mapping with 'prompt', and a mapping is settings"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments: Mapping[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(OpdError, match=sentence):
        opd.plan(experiment="shop", tracker="none", output_dir=str(tmp_path), **arguments)


def recipes(kind: str) -> list[str]:
    """Blocks of Python in docs/python.md: those that `plan` is enough for, or those that need a `run`."""
    return re.findall(rf"```python {kind}\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)


@pytest.mark.parametrize("code", recipes("plan"))
def test_a_recipe_can_be_planned(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(*, callbacks: Any = (), trackers: Any = (), verbose: bool = True, **given: Any) -> Any:
        assert (
            all(map(callable, callbacks)) and all(hasattr(tracker, "log") for tracker in trackers) and verbose in (0, 1)
        )
        return opd.plan(**given | {"resume": ""})  # there is no run to go on with

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "has 2 1 ; Mon buys 4 ?", "answer": "5 2"}\n')
    exec(code, {"opd": SimpleNamespace(train=planned, plan=opd.plan)})


def test_the_library_names_its_interface_and_nothing_else() -> None:
    assert {"train", "plan", "evaluate", "open_run"} <= set(dir(opd))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = opd.trian  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [None, 3, "", ["runs/a"], {}, opd])
def test_a_run_is_opened_by_its_path(given: Any) -> None:
    with pytest.raises(opd.ConfigurationError, match="open_run needs the directory of a run, got"):
        opd.open_run(given)


def test_a_source_of_prompts_is_an_option(tmp_path: Path) -> None:
    source = DatasetPrompts(path="train.jsonl", prompts_per_step=4)
    overrides = part_option(source, "prompts", "given", tmp_path)
    assert overrides[1] == "prompts=given"
    assert run_config([*QUIET, *overrides]).prompts == source
