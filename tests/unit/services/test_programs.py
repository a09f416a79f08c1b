"""What a local session starts in place of Ray's own programs does what those do."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch.config.settings import ClusterConfig
from launch.services.ray_session.cluster import connected
from launch.services.ray_session.node import _own_agent, bare
from launch.services.ray_session.programs import ray_agent, start_worker
from tests.processes import command, status, wait_until

SHOWN = ("OPD_A", "OPD_B", "OPD_C")
WORKER = f"""import json, os, sys
print(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in {SHOWN!r}}}, sys.executable]))
"""


def started(program: str, context: dict[str, object], rest: list[str]) -> str:
    """What the worker prints that `program` starts with a context and arguments."""
    own = ["--language=PYTHON", f"--serialized-runtime-env-context={json.dumps(context)}"]
    done = subprocess.run(
        [sys.executable, program, *own, *rest],
        env=os.environ | {"OPD_A": "inherited"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


TEXTS = st.lists(st.sampled_from(["${OPD_A}", "$OPD_A", "${NONE_SUCH}", "$NONE_SUCH", "a b", "'", '"', "ä", "\\"])).map(
    "".join
)


@given(values=st.lists(TEXTS, min_size=3, max_size=3), argument=TEXTS)
@example(values=["x${OPD_A}y", "${OPD_A}", "${NONE_SUCH}|$NONE_SUCH|$"], argument='--it\'s "two" words')
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_worker_gets_what_rays_own_program_gives_it(values: list[str], argument: str, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    variables = dict(zip(SHOWN, values, strict=True))
    context = {"command_prefix": [], "env_vars": variables, "py_executable": sys.executable, "java_jars": []}
    ours, rays = (
        started(p, context, [str(worker), argument]) for p in (start_worker.__file__, start_worker.rays_own())
    )
    assert ours == rays and sys.executable in ours


def test_another_language_and_a_container_go_to_rays_own_program(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    context = {"command_prefix": ["OPD_B=prefixed"], "env_vars": {"OPD_C": "c"}, "py_executable": sys.executable}
    assert not start_worker.plain(context)
    ours, rays = (started(p, context, [str(worker)]) for p in (start_worker.__file__, start_worker.rays_own()))
    assert ours == rays and "prefixed" in ours


def test_the_agent_says_that_no_port_is_used_and_ends_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()",
         sys.executable, "-S", ray_agent.__file__, f"--session-dir={tmp_path}", "--node-id=ab", "--head"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    agent = psutil.Process(int(parent.stdout.readline()))
    ports = {f"{name}_ab" for name in ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")}
    wait_until(lambda: {path.name for path in tmp_path.iterdir()} == ports, 60, "its files", 0.05)
    wait_until(lambda: {path.read_text() for path in tmp_path.iterdir()} == {"-1"}, 60, "what they say", 0.05)
    assert agent.is_running()
    parent.communicate("\n", timeout=60)
    wait_until(lambda: status(agent.pid) in ("gone", psutil.STATUS_ZOMBIE), 60, "its end", 0.05)


@pytest.mark.ray
def test_a_local_session_has_no_processes_but_those_that_a_run_needs_and_gives_actors_their_environment() -> None:
    class Actor:
        def environment(self) -> dict[str, str]:
            return dict(os.environ)

    with connected(ClusterConfig()):
        import ray

        made = ray.remote(Actor).options(num_cpus=0, runtime_env={"env_vars": {"OPD_A": "one two"}}).remote()
        seen = ray.get(made.environment.remote(), timeout=120)
        commands = [" ".join(command(p)) for p in psutil.Process().children(recursive=True)]
    assert seen["OPD_A"] == "one two"
    left_out = ("monitor.py", "dashboard.py", os.path.join("dashboard", "agent.py"), "setup_worker.py")
    # The raylet's own arguments have the word of what it was to start.
    others = [line for line in commands if "raylet/raylet" not in line]
    assert not [line for line in others for part in left_out if part in line]
    assert [line for line in others if ray_agent.__file__ in line]
    assert any(word.startswith("--dashboard_agent_command=") for line in commands for word in line.split())


@pytest.mark.parametrize(
    "part",
    [
        "raylet/raylet",
        "--runtime_env_agent_command=python dashboard/agent.py --x=1",
        "--dashboard_agent_command=python a.py",
    ],
)
def test_only_the_command_of_the_dashboards_agent_is_replaced(part: str) -> None:
    assert _own_agent(part) == part


def test_the_agents_arguments_are_kept() -> None:
    part = '--dashboard_agent_command=python -u "/a b/ray/dashboard/agent.py" "--session-dir=/c d" --node-id=ab'
    name, _, command = _own_agent(part).partition("=")
    assert name == "--dashboard_agent_command"
    assert shlex.split(command) == [sys.executable, "-S", ray_agent.__file__, "--session-dir=/c d", "--node-id=ab"]


def test_ray_is_as_it_was_when_its_start_is_over() -> None:
    from ray._private import parameter, services

    before = (parameter.RayParams, services.start_api_server, services.start_ray_process)
    with bare():
        assert parameter.RayParams().no_monitor and not parameter.RayParams().include_log_monitor
    with pytest.raises(OSError, match="full"), bare():
        raise OSError("full")
    assert (parameter.RayParams, services.start_api_server, services.start_ray_process) == before
