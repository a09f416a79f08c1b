"""`opd export push=`: a private repository, a card that says what the run directory says, and no work lost."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from launch.artifacts.run_directory import RunDirectory, append_json
from launch.config.run_config import run_config
from launch.plan.hub import HubInput, record
from tests.command import Done, opd
from tests.hub_stand_in import Fault, Files, HubStandIn
from tests.tiny_models import save, tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
POINT = {"greedy": 0.5, "mean_at_k": 0.25, "pass_at_k": 0.75, "k": 4, "reverse_kl": 0.125, "length_mean": 9.0}
POINT |= {"truncation_rate": 0.0, "seconds": 1.0, "tokens": 7, "flops": 1.0, "cpu_s": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that ended after 6 of 6 steps, as its directory tells it."""
    directory = RunDirectory.create(tmp_path / "runs", "sums")
    settings = {
        "student": {"path": f"org/small@{COMMIT}"},
        "teacher": {"path": str(tmp_path / "secret-home" / "big")},
        "teachers": {"judge": {"path": f"org/judge@{COMMIT}"}},
        "method": yaml.safe_load(run_config(["method=full_reverse_kl"]).text)["method"],
        "prompts": {"path": f"org/sums:default:train@{COMMIT}"},
        "evaluation": {"prompts": {"_target_": "demos.prompts.shop.ShopPrompts"}},
        "learner": {"lr": 0.001, "schedule": "LINEAR", "lora": {"r": 0}},
        "notes": ["The student is engineered."],
        "seed": 3,
        "steps": 6,
    }
    directory.write_config(yaml.safe_dump(settings))
    directory.write_command(["method=full_reverse_kl", f"student.path=org/small@{COMMIT}", "run_name=sums", "steps=6"])
    for step in (0, 6):
        append_json(directory.evaluations, POINT | {"step": step, "greedy": 0.5 + step / 24})
    names = {"student.path": "org/small", "teachers.judge.path": "org/judge", "prompts.path": "org/sums:default:train"}
    record(directory.path, [HubInput(setting=k, asked=n, pinned=f"{n}@{COMMIT}") for k, n in names.items()])
    shutil.rmtree(directory.export)
    save(tiny_model(), directory.export)
    adapter = directory.export / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 2}))
    return directory


def export(run: RunDirectory, *more: str) -> Done:
    return opd("export", f"run={run.path}", *more)


def pushed(hub: HubStandIn, repo: str) -> Files:
    found = hub.repositories["model", repo]
    return found.commits[found.branches["main"]]


@pytest.fixture
def token(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub.token


def test_a_student_is_pushed_privately_with_a_true_card(
    hub: HubStandIn, token: str, run: RunDirectory, tmp_path: Path
) -> None:
    done = export(run, "push=me/sums")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["model", "me/sums"].private and done.stdout.strip().startswith(f"{hub.url}/me/sums/commit/")
    files = pushed(hub, "me/sums")
    assert files["model.safetensors"] == (run.export / "model.safetensors").read_bytes()
    assert not [name for name in files if name.endswith((".bin", ".py"))]
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/small" and head["datasets"] == ["org/sums"] and "license" not in head
    for said in (
        f"| base model | `org/small@{COMMIT}` |",
        f"| teachers.judge | `org/judge@{COMMIT}` |",
        f"| prompts | `org/sums:default:train@{COMMIT}` |",
        "| promise of its gradient | `ReverseKL()` |",
        "| steps | 6 of 6 |",
        "| student after step 0 | 0.5 | 0.25 | 0.75 | 4 | 0.125 | 9 | 0 |",
        "| student after step 6 | 0.75 | 0.25 | 0.75 | 4 | 0.125 | 9 | 0 |",
        f"opd train method=full_reverse_kl student.path=org/small@{COMMIT} steps=6",
        "The student is engineered.",
        "None is stated here.",
    ):
        assert said in card, said
    everything = b"".join(files.values())
    assert token.encode() not in everything and str(tmp_path).encode() not in everything
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == "org/small"
    assert json.loads(files["opd_export.json"])["inputs"]["student.path"] == f"org/small@{COMMIT}"


def test_public_is_asked_for_and_an_own_repository_is_renewed(hub: HubStandIn, token: str, run: RunDirectory) -> None:
    assert export(run, "push=me/sums", "public=true").returncode == 0
    assert not hub.repositories["model", "me/sums"].private
    done = export(run, "push=me/sums")
    assert done.returncode == 2 and "exists and is public" in done.stderr and "add public=true" in done.stderr
    (run.export / "added_tokens.json").write_text("{}")
    assert export(run, "push=me/sums", "public=true").returncode == 0
    assert "added_tokens.json" in pushed(hub, "me/sums")
    (run.export / "added_tokens.json").unlink()
    assert export(run, "push=me/sums", "public=true").returncode == 0
    assert "added_tokens.json" not in pushed(hub, "me/sums"), "what an earlier push left is no part of this student"


def test_nobody_elses_work_is_replaced_unless_told(hub: HubStandIn, token: str, run: RunDirectory) -> None:
    hub.add("model", "me/precious", {"README.md": b"mine", "model.safetensors": b"w" * 5000}, private=True)
    done = export(run, "push=me/precious")
    assert done.returncode == 2 and "was not made by opd export" in done.stderr and "overwrite=true" in done.stderr
    assert pushed(hub, "me/precious")["README.md"] == b"mine"
    assert export(run, "push=me/precious", "overwrite=true").returncode == 0
    assert b"None is stated here" in pushed(hub, "me/precious")["README.md"]


def test_what_cannot_be_pushed_is_one_sentence(
    hub: HubStandIn, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {
        ("push=me/sums",): "needs a token that may write; log in with `hf auth login`",
        ("push=sums",): "is no name of a repository; write push=ORG/NAME",
        ("output=x", "public=true"): "belongs to push=ORG/NAME",
        (): "needs run=NAME_OR_DIRECTORY and output=NEW_FOLDER or push=ORG/NAME",
    }
    for arguments, sentence in cases.items():
        done = export(run, *arguments)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
    monkeypatch.setenv("HF_TOKEN", hub.token)
    done = export(run, "push=forbidden/sums")
    assert done.returncode == 2 and "may not write there; make one with write access to forbidden" in done.stderr
    done = export(run, "push=me/sums", "public=perhaps")
    assert done.returncode == 2 and "public is true or false" in done.stderr
    hub.faults.append(Fault("/commit/", "POST", status=500))
    done = export(run, "push=me/sums")
    assert done.returncode == 1 and "refuses it (it answers 500)" in done.stderr
    assert hub.token not in done.stderr + done.stdout


def test_an_export_to_a_folder_has_the_same_card(hub: HubStandIn, run: RunDirectory, tmp_path: Path) -> None:
    assert export(run, f"output={tmp_path / 'out'}").returncode == 0
    assert f"`org/small@{COMMIT}`" in (tmp_path / "out" / "README.md").read_text()
    assert not hub.seen, "an export sends no request"
