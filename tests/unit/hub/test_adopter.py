"""The run that most people have in mind, of examples/maths: one YAML, one Python call, models of true shapes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import opd
from launch.config.run_config import run_config
from launch.plan.plan import Plan, make_plan
from tests.command import ROOT
from tests.command import opd as command
from tests.hollow_models import hollow, qwen3
from tests.hub_stand_in import HubStandIn

EXAMPLE = ROOT / "examples" / "maths"
CODE = (EXAMPLE / "maths.py").read_text().partition('"""\n')[2]
FROM_YAML = [f"conf={EXAMPLE / 'my_conf'}", "experiment=maths"]
VOCABULARY = 151_669  # of Qwen3's tokenizer; its models have 151,936 rows
PARAMETERS = {"student": 596_049_920, "teacher": 4_022_468_096}  # as the hub says of the two models


def rows(number: int, **columns: Any) -> bytes:
    """Rows of a data set, of which `columns` are the same everywhere but for the number in them."""
    return "".join(json.dumps(_filled(columns, str(i))) + "\n" for i in range(number)).encode()


def _filled(value: Any, number: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(inner, number) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, number) for inner in value]
    return value.replace("#", number) if isinstance(value, str) else value


def add_data(hub: HubStandIn) -> None:
    """The three data sets with the columns that they have."""
    nested = {"ground_truth": "#", "style": "rule-lighteval/MATH_v2"}
    trained = rows(80, prompt="What is # + 0?", solution="#", data_source="math_dapo", reward_model=nested)
    head = b"---\nconfigs:\n- config_name: en\n  data_files: [{split: train, path: en/train.jsonl}]\n"
    head += b"- config_name: cn\n  data_files: [{split: train, path: cn/train.jsonl}]\n---\n"
    more = {"en/train.jsonl": trained, "cn/train.jsonl": trained, "README.md": head}
    hub.add("dataset", "open-r1/DAPO-Math-17k-Processed", more)
    judged = rows(500, problem="Find $#$.", solution="It is \\boxed{#}.", answer="#", subject="Algebra", level=1)
    hub.add("dataset", "HuggingFaceH4/MATH-500", {"test.jsonl": judged, "README.md": b"# MATH-500"})
    judged = rows(30, problem="Find $#$.", solution="It is \\boxed{#}.", answer="#", year="2024")
    split = b"---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: data/train-*}]\n---\n"
    hub.add("dataset", "HuggingFaceH4/aime_2024", {"data/train-0.jsonl": judged, "README.md": split})


@pytest.fixture
def hub_of_the_run(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    """Both models as headers, and their data."""
    small, large = qwen3(1024, 28, 16, 3072, tied=True), qwen3(2560, 36, 32, 9728, tied=True)
    hub.add("model", "Qwen/Qwen3-0.6B", hollow(small, VOCABULARY))
    hub.add("model", "Qwen/Qwen3-4B", hollow(large, VOCABULARY))
    add_data(hub)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    return hub


def from_python() -> Plan:
    """Plan of the call in examples/maths/maths.py."""
    names: dict[str, Any] = {"opd": SimpleNamespace(train=opd.plan)}
    exec(CODE.replace("import opd", ""), names)
    return names["run"]


def test_both_are_short_and_in_the_docs() -> None:
    settings = (EXAMPLE / "my_conf" / "experiment" / "maths.yaml").read_text()
    assert len(CODE.strip().splitlines()) <= 12 and len(settings.splitlines()) <= 12
    assert f"```yaml\n{settings}```" in (ROOT / "README.md").read_text()
    assert f"```python\n{CODE.lstrip()}```" in (ROOT / "docs" / "howto" / "start.md").read_text()


def test_the_yaml_and_the_call_are_one_run(hub_of_the_run: HubStandIn, tmp_path: Path) -> None:
    hub = hub_of_the_run
    plan = make_plan(run_config([*FROM_YAML, "dry_run=true"]))
    assert {"student": plan.student_params, "teacher": plan.teacher_params["default"]} == PARAMETERS
    assert plan.vocabulary == VOCABULARY and plan.exact_kl and all(one.headers for one in plan.hub[:2])
    first = plan.prompts["first prompt"]
    assert r"<|im_start|>system\nPut the final answer into \boxed{}.<|im_end|>" in first and "+ 0?" in first
    assert first.endswith(r"<|im_start|>assistant\n<think>\n\n</think>\n\n"), "thinking is switched off"
    assert plan.prompts["for the teacher"] == "the same" and plan.prompts["its answer"].isdigit()
    for name, count in (("math500", 500), ("aime24", 30)):
        assert plan.answers[f"evaluation.sets.{name}.prompts"] == f"{count} reference answers, all readable"
    assert sum(n for path, n in hub.sent.items() if "elsewhere" in path) < 20e6, "headers, and one tokenizer each"
    call = from_python()
    same = {"text": "", "overrides": ()}
    assert replace(call.config, **same) == replace(plan.config, **same)
    assert call.prompts == plan.prompts and call.hub == plan.hub


def test_the_command_shows_it(hub_of_the_run: HubStandIn, tmp_path: Path) -> None:
    done = command("train", *FROM_YAML, "dry_run=true", f"output_dir={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    for said in ("596.05M", "4022.47M", "headers alone", "</think>", "its answer: "):
        assert said in done.stdout, said
    assert not (tmp_path / "runs").exists()
