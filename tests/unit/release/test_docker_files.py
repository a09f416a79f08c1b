"""The container files pass their linters, ask for the token and install the locks. No engine is needed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.config.run_config import run_config
from launch.plan.checks.devices import resolved, roles
from launch.services.ray_session.placement import Machine, check_fits
from opd.settings.devices import Device

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
DOCKERFILES = ["docker/cpu.Dockerfile", "docker/gpu.Dockerfile"]
YAML_FILES = ["docker/compose.yaml", "docker/kuberay/rayjob.yaml"]
YAML_RULES = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"


def accepts(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_accepts(dockerfile: str) -> None:
    accepts(str(BIN / "hadolint"), "--failure-threshold", "info", dockerfile)


@pytest.mark.parametrize("path", YAML_FILES)
def test_yamllint_accepts(path: str) -> None:
    accepts(sys.executable, "-m", "yamllint", "--strict", "-d", YAML_RULES, path)


def test_compose_follows_its_schema() -> None:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml"]
    accepts(sys.executable, "-m", *command)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_image_does_not_run_as_root(dockerfile: str) -> None:
    users = re.findall(r"^USER (.+)$", (ROOT / dockerfile).read_text(), re.MULTILINE)
    assert users == ["1000:1000"]


def test_images_install_the_locks() -> None:
    cpu, gpu = ((ROOT / path).read_text() for path in DOCKERFILES)
    assert "scripts/install.sh packages" in cpu and "scripts/install.sh runtime" in cpu
    assert re.search(r"--require-hashes .*requirements/gpu\.lock", gpu)
    everything = cpu + gpu + (ROOT / "scripts/install.sh").read_text() + (ROOT / "Makefile").read_text()
    unused = [path.name for path in (ROOT / "requirements").iterdir() if path.name not in everything]
    assert not unused, f"locks that nothing installs: {unused}"


def test_compose_gives_nothing_away_without_the_token() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert service["environment"]["RAY_AUTH_MODE"] == "token", name
        assert service["secrets"] == ["ray_token"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_rayjob_is_bounded_and_authenticated() -> None:
    job = yaml.safe_load((ROOT / "docker/kuberay/rayjob.yaml").read_text())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0 and spec["activeDeadlineSeconds"] > 0
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert f"ray=={spec['rayClusterSpec']['rayVersion']} " in (ROOT / "requirements/gpu.lock").read_text()


def test_rayjob_runs_on_the_cluster_it_makes() -> None:
    """The driver runs in the head's pod, which has no GPU; the actors fit the workers, on devices that those have."""
    spec = yaml.safe_load((ROOT / "docker/kuberay/rayjob.yaml").read_text())["spec"]
    config = resolved(run_config(overrides_of(spec["entrypoint"])))
    assert config.cluster.address == "auto", "the second Ray would have no GPU"
    head, (group,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    machine = Machine(cpus=float(limits["cpu"]), gpus=float(limits["nvidia.com/gpu"]))
    check_fits(roles(config), [Machine(cpus=0, gpus=0), *[machine] * group["replicas"]], "the job's cluster")
    assert (config.student.device, config.teacher.device, config.learner.device) == (Device.GPU,) * 3
    for template in (head["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        assert config.output_dir in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_compose_s_job_runs_on_its_cluster_and_writes_to_its_volume() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    config = run_config(overrides_of(services["train"]["command"].partition(" -- ")[2]))
    assert config.cluster.address == "auto"
    for name in ("head", "worker"):
        assert any(volume.endswith(f":{config.output_dir}") for volume in services[name]["volumes"]), name


def overrides_of(command: str) -> list[str]:
    program, verb, *overrides = shlex.split(command)
    assert (program, verb) == ("opd", "train")
    return overrides
