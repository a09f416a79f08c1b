"""A machine of the cluster is lost in the middle of a run: what ran there is replaced, and the run goes on."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fault_matrix import Witness
from tests.integration.runs.test_train import ROOT, lines
from tests.processes import MARK, end_family, end_of, nobody_is_left, own_port, wait_until

STEPS, PROMPTS = 16, 16
RAY = str(Path(sys.executable).parent / "ray")


@contextmanager
def node(log: Path, *arguments: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start`, with every process of the node in one group; yielded when it is up."""
    command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=8", "--num-gpus=1", *arguments]
    command += [f"--dashboard-agent-listen-port={own_port()}", f"--dashboard-agent-grpc-port={own_port()}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        up = "Ray runtime started"
        wait_until(lambda: process.poll() is not None or up in log.read_text(), 300, "a node")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.faults("machine lost")
@pytest.mark.timeout(900)
def test_a_run_survives_the_loss_of_a_machine(tmp_path: Path, witness: Witness) -> None:
    """Two Ray nodes with one (pretended) GPU each, so that each has one of the two rollout actors."""
    mark = f"nodes-{os.getpid()}-{time.monotonic_ns()}"
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {MARK: mark}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as in an activated environment
    environment |= {"RAY_raylet_start_wait_time_s": "280"}  # a busy machine starts nothing quickly
    port = own_port()
    address = f"127.0.0.1:{port}"
    head = ["--head", f"--port={port}", "--include-dashboard=false"]
    head += ["--ray-client-server-port", str(own_port())]
    options = ["experiment=shop", f"steps={STEPS}", f"prompts.prompts_per_step={PROMPTS}", "student.replicas=2"]
    options += ["evaluation.every=0", "evaluation.teacher=false", "evaluation.samples=1", "doctor=false"]
    options += ["evaluation.prompts.prompts_per_step=8", "evaluation.reverse_kl_prompts=4", "student.device=CPU"]
    options += ["deterministic=false", "max_staleness=1", "student.deadline_s=60"]
    options += [
        "cluster=existing",
        f"cluster.address={address}",
        "cluster.gpus_per_engine=1",
        "cluster.cpus_per_actor=1",
    ]
    options += [f"output_dir={tmp_path}", "run_name=r"]
    metrics = tmp_path / "r" / "metrics.jsonl"
    try:
        with (
            node(tmp_path / "head.log", *head, environment=environment),
            node(tmp_path / "second.log", f"--address={address}", environment=environment) as second,
        ):
            driver = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", "train", *options],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            wait_until(lambda: driver.poll() is not None or len(lines(metrics)) >= 3, 240, "three steps")
            assert driver.poll() is None, driver.communicate()[0]
            os.killpg(second.pid, signal.SIGKILL)  # raylet, workers and all
            before = len(lines(metrics))
            output = end_of(driver, 300)
        assert driver.returncode == 0, output
        assert before < STEPS, "it was all over when the machine went"
        summary = json.loads((tmp_path / "r" / "summary.json").read_text())
        assert re.search(r"rollout actor \d died", " ".join(summary["alerts"])), f"nobody was lost: {summary['alerts']}"
        witness("machine lost")
        ledger = summary["ledger"]
        assert ledger["issued"] == ledger["trained"] == STEPS * PROMPTS and ledger["outstanding"] == 0
        assert [line["step"] for line in lines(metrics)] == list(range(1, STEPS + 1))
        nobody_is_left(mark)
    finally:
        end_family(mark)
