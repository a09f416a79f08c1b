"""What a scorer asks and what a backend answers are compared before anything starts."""

import re
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError
from opd.ports import AtIds, LastHidden, SampledToken, TopK
from opd.settings.devices import Device
from teacher_service.config import SUPPORTS, Backend, TeacherConfig, check_supports, environment

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "shop"
REMOTE = ["teacher.backend=openai", "teacher.url=http://127.0.0.1:1", "teacher.model=m"]


METHOD_ASKS = {
    "sampled_reverse_kl": SampledToken,
    "topk_reverse_kl": TopK,
    "student_topk_reverse_kl": AtIds,
    "full_reverse_kl": LastHidden,
}


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("method", METHOD_ASKS)
def test_a_plan_is_refused_exactly_where_the_backend_cannot_answer(method: str, backend: Backend) -> None:
    served = {Backend.HTTP: ["teacher.url=http://127.0.0.1:1"], Backend.OPENAI: REMOTE}.get(backend, [])
    config = run_config(["experiment=shop", f"method={method}", f"teacher.backend={backend.name}", *served])
    if METHOD_ASKS[method] in SUPPORTS[backend]:
        assert make_plan(config).exact_kl == (LastHidden in SUPPORTS[backend])
        return
    with pytest.raises(ConfigurationError) as caught:
        make_plan(config)
    assert re.search(
        rf"method {method} asks for .*teacher\.backend={backend.name} cannot.*\(.+\); set", str(caught.value)
    )
    assert "TORCH, VLLM, HTTP" in str(caught.value)


def test_a_remote_teacher_needs_its_weights_here_only_where_they_are_read_here(tmp_path: Path) -> None:
    folder = copytree(ASSETS / "teacher", tmp_path / "t")
    (folder / "model.safetensors").unlink()
    here = ["experiment=shop", f"teacher.path={folder}"]
    plan = make_plan(run_config([*here, *REMOTE, "method=topk_reverse_kl"]))
    assert (plan.teacher_params, plan.exact_kl) == ({"default": 0}, False)
    served = ["teacher.backend=http", "teacher.url=http://127.0.0.1:1"]
    for refused in ([*served, "method=full_reverse_kl"], [*served, "method=sft"], ["method=topk_reverse_kl"]):
        with pytest.raises(Exception, match="needs safetensors"):
            make_plan(run_config([*here, *refused]))


def test_a_teacher_that_follows_the_student_gives_no_hidden_states() -> None:
    following = ["experiment=shop", "teacher.path=${student.path}", "teacher.mixup=0.05"]
    assert not make_plan(run_config([*following, "method=topk_reverse_kl"])).exact_kl
    with pytest.raises(ConfigurationError, match=r"whole vocabulary.*follows the student \(teacher\.mixup=0\.05\)"):
        make_plan(run_config([*following, "method=full_reverse_kl"]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"backend": Backend.HTTP}, r"HTTP needs TeacherConfig\.url"),
        ({"backend": Backend.OPENAI, "url": "http://h"}, r"needs TeacherConfig\.model"),
        ({"max_consecutive_failures": 0}, r"max_consecutive_failures needs a whole number from 1 to"),
        ({"retries": -1}, r"retries needs a whole number from 0 to"),
        ({"read_s": 0.0}, r"read_s needs a number from 0\.1 to"),
        ({"gpu_memory_utilization": 1.5}, r"share of the whole device"),
        ({"mixup": 1.5}, r"mixup needs a number from 0 to 1, got 1\.5"),
        ({"mixup": 0.1, "backend": Backend.VLLM}, r"backend=VLLM cannot; set TeacherConfig\.backend=TORCH"),
        ({"mixup_every": 0}, r"mixup_every needs a whole number from 1 to"),
    ],
)
def test_a_wrong_teacher_configuration_is_one_sentence(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        TeacherConfig(path="x", **fields)


def test_every_backend_is_named_and_has_its_environment() -> None:
    assert set(SUPPORTS) == set(Backend)
    assert environment(Device.CPU, Backend.VLLM)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not any(name.startswith("VLLM") for name in environment(Device.CPU, Backend.HTTP))
    check_supports(TeacherConfig(path="x"), frozenset({AtIds, LastHidden}), "anybody")
