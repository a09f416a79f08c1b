"""`opd certify` certifies every shipped method and names what is wrong with every planted defect."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.certify import certify_methods
from launch.config import run_config
from launch.shipped import groups
from opd.certificate import Bound, Certificate, Row, certify
from opd.errors import ConfigurationError
from opd.types import TokenLoss

ROOT = Path(__file__).resolve().parents[2]
BROKEN = ROOT / "benchmarks" / "broken" / "conf"

GRADIENT = "gradient of the promise"
STALE = "gradient of the promise, stale writer"
ZERO = "zero where the student equals its teacher"
TEACHER = "the teacher matters"
CUT = "invariance: micro-batch size"
pytestmark = pytest.mark.timeout(600)  # half a minute of one processor, which may be shared
SHIPPED = groups()["method"]
ALL_BROKEN = [f"conf={BROKEN}", "allow_targets=[broken.]"]
DEFECTS = {
    "direct_k1": {GRADIENT, STALE, ZERO, TEACHER},
    "areal_joint": {GRADIENT, STALE, ZERO, TEACHER},
    "k3_as_reverse_kl": {GRADIENT, STALE},
    "raw_topk_reverse_kl": {ZERO},
    "ema_pg_as_published": {GRADIENT, STALE, ZERO},
    "per_microbatch_mean": {GRADIENT, STALE, CUT, "invariance: number of ranks", "invariance: chunks of the loss"},
    "shifted_teacher": {GRADIENT, STALE, ZERO},
    "truncated_sampling": {GRADIENT, STALE},
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command says of all shipped methods and all broken ones, as a user sees it: exit code and JSON."""
    said, folder = {}, tmp_path_factory.mktemp("certificates")
    for name, arguments in (("shipped", []), ("broken", ALL_BROKEN)):
        command = [sys.executable, "-m", "launch.cli", "certify", *arguments, f"output={folder / name}"]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == (name == "broken"), done.stdout + done.stderr
        said[name] = {c["method"]: c for c in json.loads((folder / name).read_text())}
    return said


def failures(certificate: dict[str, Any]) -> set[str]:
    return {row["property"] for row in certificate["properties"] if row["verdict"] == "fail"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_method_is_certified(name: str, certificates: dict[str, Any]) -> None:
    found = certificates["shipped"][name]
    assert found["passed"] and not failures(found)
    assert len(found["properties"]) >= 8 and GRADIENT in {row["property"] for row in found["properties"]}


def test_every_broken_method_is_listed() -> None:
    assert {path.stem for path in (BROKEN / "method").glob("*.yaml")} == set(DEFECTS)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught_by_name(name: str, certificates: dict[str, Any]) -> None:
    found = failures(certificates["broken"][name])
    assert found >= DEFECTS[name]
    assert not found - DEFECTS[name] - {"invariance: packing and padding (every trajectory alone)"}


def test_a_number_that_is_not_finite_never_passes() -> None:
    for bound in Bound:
        assert not Row(name="x", measured=float("nan"), tolerance=1.0, bound=bound).passed
    assert not Row(name="x", measured=float("inf"), tolerance=1.0, bound=Bound.AT_LEAST).passed
    assert Row(name="x", measured=1.0, tolerance=1.0).passed and not Row(name="x", measured=2.0, tolerance=1.0).passed
    assert not Certificate(method="m", promise="", rows=(), skipped={}).passed


def test_the_command_prints_a_table_writes_json_and_exits_non_zero_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BROKEN.parents[1]))
    console = Console(record=True, width=120)
    assert certify_methods(["method=sft"], "", console) == 0
    assert certify_methods([*ALL_BROKEN, "method=direct_k1"], str(tmp_path / "c.json"), console) == 1
    shown = console.export_text()
    assert "sft: certified" in shown and "direct_k1: REFUSED" in shown and "FAIL" in shown
    (said,) = json.loads((tmp_path / "c.json").read_text())
    verdicts = {row["property"]: row["verdict"] for row in said["properties"]}
    assert said["method"] == "direct_k1" and not said["passed"] and verdicts[TEACHER] == "fail"
    with pytest.raises(ConfigurationError, match=r"output=.* lies in a folder that does not exist; make"):
        certify_methods(["method=sft"], str(tmp_path / "no" / "c.json"), console)
    with pytest.raises(ConfigurationError, match=r"method=sft,grpo names several"):
        certify_methods(["method=sft,grpo"], "", console)


def test_the_published_example_of_a_new_method_is_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/adding_a_method.md prints it; without its importance ratio it is refused."""
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    for name, text in re.findall(r"```\w+ file=(\S+)\n(.*?)```", page, flags=re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    method = run_config([f"conf={tmp_path / 'my_conf'}", "allow_targets=[my_methods.]", "method=squared"]).method
    assert certify(method).passed

    @dataclass(frozen=True)
    class WithoutRatio(type(method.objective)):
        def __call__(self, student: Any, batch: Any) -> TokenLoss:
            logprobs = student.at(batch.target_ids)
            return TokenLoss(loss=0.5 * (logprobs - batch.scores.logprobs).square(), metrics={})

    assert certify(replace(method, objective=WithoutRatio())).failures == [STALE]


def test_an_objective_without_a_promise_is_not_certified() -> None:
    method = run_config(["method=sampled_reverse_kl"]).method

    class Silent:
        consumes = method.objective.consumes
        on_policy = False

        def __call__(self, student: object, batch: object) -> None:
            raise NotImplementedError

    object.__setattr__(method, "objective", Silent())
    found = certify(method)
    assert not found.passed and found.failures == ["a promise is declared"]


def test_the_command_needs_neither_ray_nor_vllm_nor_deepspeed() -> None:
    code = (
        "import sys; from launch.cli import main\n"
        "try: main(['certify', 'method=sft'])\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
