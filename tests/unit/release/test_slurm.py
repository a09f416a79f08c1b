"""The SLURM script starts one Ray on its nodes and the run on top, ends what it started, and goes on after its time.

SLURM, Ray and the run are stand-ins that write down how they were called; the script is the real one.
"""

import os
import re
import signal
import stat
import subprocess
from pathlib import Path

from launch.config.run_config import run_config
from launch.plan.checks.devices import resolved, roles
from launch.services.ray_session.placement import Machine, check_fits
from tests.processes import wait_until

SCRIPT = Path(__file__).parents[3] / "docker" / "slurm" / "opd.sbatch"
STAND_INS = {
    "scontrol": 'echo "scontrol $*" >>"$CALLS"; [ "$1" != show ] || printf "%s\\n" $NODES',
    "srun": 'echo "srun $*" >>"$CALLS"; while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "ray": 'echo "ray $*" >>"$CALLS"; [ "$1" = status ] || exec sleep 600',
    "hostname": 'echo "10.0.0.1 10.0.0.2"',
    "opd": 'echo "opd $*" >>"$CALLS"; stat -c "token %a" "$RAY_AUTH_TOKEN_PATH" >>"$CALLS"; eval "$RUN"',
}


def start(tmp_path: Path, run: str, *arguments: str, nodes: str = "one two", **more: str) -> "subprocess.Popen[str]":
    """The script, begun, where the run does `run`."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, does in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (programs / name).chmod(0o755)
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "NODES": nodes, "RUN": run}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "any"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=tmp_path, env={**os.environ, **own, **slurm, **more}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def calls(tmp_path: Path) -> list[str]:
    """How the stand-ins were called so far."""
    said = tmp_path / "calls"
    return said.read_text().splitlines() if said.exists() else []


def test_a_run_has_a_ray_of_all_nodes_that_ends_with_it(tmp_path: Path) -> None:
    joined = 'until grep -q "^ray start --block" $CALLS; do sleep 0.05; done; exit 3'
    process = start(tmp_path, joined, "run_name=a", "student.path=a b")
    _, said = process.communicate(timeout=200)  # it ends what it started, and does not wait for it
    assert process.returncode == 3, said
    found = calls(tmp_path)
    (head,) = (line for line in found if line.startswith("ray start --head"))
    (other,) = (line for line in found if line.startswith("ray start --block"))
    assert "--node-ip-address=10.0.0.1 --port=6379" in head and other.endswith("--address=10.0.0.1:6379")
    assert "srun --overlap --nodes=1 --ntasks=1 --exclude=one ray start --block --address=10.0.0.1:6379" in found
    assert "opd train cluster=multi_node cluster.elastic=true run_name=a student.path=a b" in found
    assert "token 600" in found and not list(tmp_path.glob(".ray_token*"))
    assert not any("requeue" in line for line in found)


def test_one_node_is_a_head_alone(tmp_path: Path) -> None:
    process = start(tmp_path, "exit 0", "run_name=a", nodes="one")
    assert process.wait(200) == 0
    assert [line for line in calls(tmp_path) if line.startswith("ray start --block")] == []


def test_a_job_whose_time_is_over_is_put_back_and_goes_on(tmp_path: Path) -> None:
    run = 'trap "echo ended >>$CALLS; exit 75" TERM; echo running >>$CALLS; while :; do sleep 0.1; done'
    process = start(tmp_path, run, "run_name=a")
    # The other node's Ray is begun beside the run: whichever is faster.
    begun = ("running", "ray start --block --address=10.0.0.1:6379")
    wait_until(lambda: {*begun} <= {*calls(tmp_path)}, 120, "a run on two nodes", 0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == 75 and calls(tmp_path)[-2:] == ["ended", "scontrol requeue 7"]
    again = start(tmp_path, "exit 0", "run_name=a", SLURM_RESTART_COUNT="1")
    again.communicate(timeout=200)
    assert again.returncode == 0
    assert any(line.startswith("opd train") and line.endswith("run_name=a resume=auto") for line in calls(tmp_path))


def test_a_job_without_a_name_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, "exit 0", "steps=3")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 2 and "needs run_name=NAME" in said and not (tmp_path / "calls").exists()


def test_the_run_fits_the_nodes_that_it_asks_for() -> None:
    text = SCRIPT.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    command = re.search(r"^opd train (.*?) \"\$@\"", text, re.MULTILINE)
    assert command is not None
    config = resolved(run_config([*command[1].split(), "experiment=shop", "run_name=a", "output_dir=/shared/runs"]))
    assert config.cluster.address == "auto" and config.cluster.elastic
    node = Machine(cpus=float(asked["cpus-per-task"]), gpus=float(asked["gpus-per-node"]))
    check_fits(roles(config), [node] * int(asked["nodes"]), "the job's nodes")


def test_the_script_can_be_called() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
