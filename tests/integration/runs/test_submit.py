"""`opd submit` against a real Ray head with token authentication on loopback."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import ROOT
from tests.processes import own_port, wait_until


@dataclass(frozen=True)
class Head:
    """A running head: the address of its jobs API, the file that holds its token, and the folder that jobs work in."""

    address: str
    token: Path
    tree: Path


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it is there and asks for the token
    except OSError:
        return False
    return True


def copied_code(tree: Path) -> Path:
    """Copy of the packages in `tree`, for jobs to work in: other tests write in the project's own folder meanwhile."""
    names = [path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    for name in (*names, "conf", "assets"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard = own_port(), own_port()
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_AUTH_TOKEN", None)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # as in an activated environment
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={own_port()}"]  # its default belongs to the first Ray on a machine
    command += ["--ray-client-server-port", str(own_port())]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(lambda: process.poll() is not None or answers(f"{address}/api/version"), 250, "a head")
        assert process.poll() is None, "the head did not start"
        yield Head(address, token, copied_code(folder / "tree"))
    finally:
        os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def submit(head: Head, token: Path | None, *command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    if token is not None:
        env["RAY_AUTH_TOKEN_PATH"] = str(token)
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "submit", f"address={head.address}", f"working_dir={head.tree}", *command],
        env=env,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )


SMALL = ["experiment=shop", "steps=2", "prompts.prompts_per_step=16", "evaluation.prompts.prompts_per_step=8"]
SMALL += ["evaluation.samples=1", "evaluation.reverse_kl_prompts=4", "cluster.cpus_per_actor=0.1"]
SMALL += ["evaluation.teacher=false", "doctor=false"]


@pytest.mark.ray
def test_a_job_runs_to_its_end_with_the_token(head: Head, tmp_path: Path) -> None:
    done = submit(head, head.token, "train", *SMALL, f"output_dir={tmp_path}", "run_name=job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert (tmp_path / "job" / "summary.json").exists()


@pytest.mark.ray
def test_a_failing_job_hands_its_exit_status_on(head: Head, tmp_path: Path) -> None:
    done = submit(head, head.token, "train", "steps=0", f"output_dir={tmp_path}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "steps needs a whole number" in done.stdout


@pytest.mark.ray
def test_it_is_refused_without_the_token_and_with_a_wrong_one(head: Head, tmp_path: Path) -> None:
    without = submit(head, None, "train", *SMALL)
    assert without.returncode == 2 and "needs the cluster's token" in without.stderr
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    refused = submit(head, wrong, "train", *SMALL, f"output_dir={tmp_path}")
    assert refused.returncode == 1 and "did not take the job" in refused.stderr, refused.stderr
