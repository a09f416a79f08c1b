"""A run of models that are names on the hub: trained, planned to go on offline at the same commits, pushed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, Done
from tests.hub_stand_in import HubStandIn, folder_files, hub_stand_in
from tests.integration.runs.test_train import SMALL


def command(hub: HubStandIn, home: Path, *arguments: str, **environment: str) -> Done:
    """`opd` in a process of its own, whose environment alone names the hub."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=ROOT,
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Done(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_run_from_the_hub_and_back(tmp_path: Path) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    models = ["student.path=shop/student", "teacher.path=shop/teacher"]
    run = ["train", *SMALL, *models, f"output_dir={runs}", "run_name=a", "evaluation.teacher=false"]
    run += ["learner.schedule=CONSTANT", "doctor=false", "tracker=none"]
    with hub_stand_in() as hub:
        began = {
            role: hub.add("model", f"shop/{role}", folder_files(ROOT / "assets" / "shop" / role) | {"x.bin": b"x"})
            for role in ("student", "teacher")
        }
        done = command(hub, home, *run, "steps=1", "checkpoint_every=1")
        assert done.returncode == 0, done.stderr
        pinned = f"shop/student@{began['student']}"
        assert f"student.path: {pinned}" in done.stdout
        told = json.loads((runs / "a" / "summary.json").read_text())
        assert pinned in told["facts"]["student"] and pinned in (runs / "a" / "config.yaml").read_text()
        assert f"student.path={pinned}" in (runs / "a" / "command.txt").read_text()
        spoilt = hub.repositories["model", "shop/teacher"].commits[began["teacher"]] | {"config.json": b"{}"}
        assert hub.add("model", "shop/teacher", spoilt) != began["teacher"], "the branch has moved"
        # What goes on is decided in the plan: the commits that were recorded, from the cache alone.
        done = command(hub, home, *run, "steps=2", "resume=latest", "dry_run=true", HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert f"teacher.path: shop/teacher@{began['teacher']} " in done.stdout and "from the cache" in done.stdout
        done = command(hub, home, "export", f"run={runs / 'a'}", "step=1", "push=me/shop", HF_TOKEN=hub.token)
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["model", "me/shop"]
        card = repository.commits[repository.branches["main"]]["README.md"].decode()
        assert f"`{pinned}`" in card and "| steps | 1 of 1 |" in card and repository.private and not hub.wrong
