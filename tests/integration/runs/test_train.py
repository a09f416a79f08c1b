"""The main job on real parts: Ray actors, vLLM, the teacher pool and DeepSpeed, started by the program itself."""

import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.command import ROOT, opd
from tests.onlooker import Onlooker, looking

pytestmark = pytest.mark.timeout(600)  # the machine may be slow, and another process of tests at work on it
SMALL = [
    "experiment=shop",
    "steps=3",
    "prompts.prompts_per_step=16",
    "evaluation.prompts.prompts_per_step=16",
    "evaluation.reverse_kl_prompts=8",
    "evaluation.samples=2",
    "evaluation.every=2",
]
QUICK = [*SMALL, "evaluation.every=0", "evaluation.samples=1", "evaluation.teacher=false", "tracker.mode=DISABLED"]
QUICK += ["evaluation.on_start=false"]
# Two ranks of ZeRO-3 that publish many small chunks, for two rollout actors.
TWO_OF_EACH = ["learner.ranks=2", "learner.zero_stage=3", "student.replicas=2", "learner.publish_chunk_bytes=20000"]


def lines(path: Path) -> list[dict]:
    """The whole lines of a file that a run may be writing, or has not begun yet."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


SECRETS = {
    name: f"planted-{i}-{secrets.token_hex(12)}"
    for i, name in enumerate(
        ["WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPD_TEACHER_TOKEN", "AWS_SECRET_ACCESS_KEY",
         "OPENAI_API_KEY", "MY_PASSWORD", "NETRC"]
    )
}  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """A finished small run, what it said, and what was seen of it while it lasted."""

    path: Path
    said: str
    seen: Onlooker


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """It is given a secret in every place of the environment that takes one."""
    runs, known = tmp_path_factory.mktemp("runs"), {**SECRETS, "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    login = runs.parent / "netrc"
    login.write_text(f"machine api.wandb.ai login user password {known.pop('NETRC')}\n")
    with pytest.MonkeyPatch.context() as patch, looking({*SECRETS.values(), *known.values()}) as seen:
        for name, value in known.items():
            patch.setenv(name, value)
        patch.setenv("NETRC", str(login))
        patch.setenv("SOME_PROXY", f"http://user:{SECRETS['MY_PASSWORD']}@127.0.0.1:1")
        done = opd("train", *SMALL, "notes=['${oc.env:MY_PASSWORD}']", f"output_dir={runs}", "run_name=first")
    assert done.returncode == 0, done.stdout + done.stderr
    return Watched(runs / "first", done.stdout + done.stderr, seen)


@pytest.fixture(scope="module")
def run(watched: Watched) -> Path:
    """One finished small run."""
    return watched.path


@pytest.mark.ray
def test_a_local_run_listens_on_the_loopback_only(watched: Watched) -> None:
    listening = watched.seen.listening
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening} and len(listening) > 3, "nothing was looked at"
    assert not watched.seen.open_to_others(), watched.seen.opened


@pytest.mark.ray
def test_no_secret_is_in_any_file_argument_or_message(watched: Watched) -> None:
    """Of the run, of Ray's session while it lasted, and of wandb, whose stored arguments were read as well."""
    seen = watched.seen
    assert any("raylet" in line for line in seen.arguments) and any(path.suffix == ".out" for path in seen.sizes)
    seen.read(path for path in watched.path.rglob("*") if not path.is_symlink())
    assert any(path.suffix == ".wandb" for path in seen.sizes) and watched.path / "config.yaml" in seen.sizes
    assert seen.told == set()
    for secret in seen.secrets:
        assert secret not in watched.said and not [line for line in seen.arguments if secret in line]
    assert "notes:\n- <redacted>" in (watched.path / "config.yaml").read_text(), "what was planted has not arrived"


@pytest.mark.ray
def test_the_run_directory_is_the_products_memory(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "finished" and summary["steps"] == 3 and summary["seed"] == 0
    for examinee in ("student_start", "student_end", "teacher"):
        assert set(summary[examinee]) >= {"greedy", "mean_at_k", "pass_at_k", "reverse_kl"}
        assert all(0 <= summary[examinee][k] <= 1 for k in ("greedy", "mean_at_k", "pass_at_k"))
    assert summary["student_start"]["reverse_kl"] > 0.01
    assert abs(summary["teacher"]["reverse_kl"]) < 1e-3  # the teacher as writer and as reader agree
    assert summary["tokens"] > 0 and summary["flops"] > 0 and summary["cpu_s"] > 0 and summary["wall_s"] > 0
    assert summary["ledger"] == {
        "issued": 48, "generated": 48, "scored": 48, "trained": 48, "dropped": 0, "outstanding": 0,
    }  # fmt: skip
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(m["weights/sentinel_gap"] < 1e-4 for m in metrics)
    assert all(m["sample/staleness_max"] == 0 for m in metrics)
    assert [e["step"] for e in lines(run / "evaluations.jsonl")] == [0, 2, 3, 0]
    for name in ("config.yaml", "report.html", "curves.png", "export/model.safetensors", "export/README.md"):
        assert (run / name).stat().st_size > 0
    assert (run / "checkpoints" / "step_3").is_dir()


@pytest.mark.ray
def test_the_doctor_was_asked_before_the_first_step(run: Path) -> None:
    findings = json.loads((run / "doctor.json").read_text())
    assert {f["verdict"] for f in findings} == {"fine"}
    assert {"alignment", "full softmax", "hidden states", "engine and learner"} <= {f["check"] for f in findings}


@pytest.mark.ray
def test_the_doctor_refuses_a_pair_that_would_train_wrongly(run: Path) -> None:
    """Planted: a teacher that writes padding where it should end a text."""
    wrong = _never_ending(run.parent / "wrong")
    done = opd("train", *QUICK, f"teacher.path={wrong}", f"output_dir={run.parent}", "run_name=refused")
    assert done.returncode == 1 and "findings against it; see opd doctor" in done.stderr, done.stderr
    assert not (run.parent / "refused" / "metrics.jsonl").exists(), "it was trained all the same"
    whole = opd("doctor", "experiment=shop", f"teacher.path={wrong}", f"output={run.parent / 'findings.json'}")
    assert whole.returncode == 1
    table = {f["check"]: f["verdict"] for f in json.loads((run.parent / "findings.json").read_text())}
    assert (
        table["end of text"] == table["padding"] == "refused" and table["own teacher"] == table["alignment"] == "fine"
    )
    assert "teacher gain" in table


def _never_ending(folder: Path) -> Path:
    """The shop's teacher with the end-of-text row of its (tied) matrix turned round: it ends texts no more."""
    shutil.copytree(ROOT / "assets" / "shop" / "teacher", folder)
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in ("lm_head.weight", "model.embed_tokens.weight") if n in tensors)
    tensors[name] = tensors[name].clone()
    tensors[name][eos] *= -1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.ray
def test_two_ranks_and_two_actors_give_the_same_losses(run: Path) -> None:
    """Within 1e-4 of one of each, in small micro-batches; whatever the doctor asks before: here with further engines,
    which are gone when training begins. (Two ranks of ZeRO-2 go on with a run of one in test_resume.py.)"""
    options = [*TWO_OF_EACH, "learner.tokens_per_microbatch=300", "learner.transport=SHARED_MEMORY"]
    done = opd("train", *QUICK, *options, "doctor_everything=true", f"output_dir={run.parent}", "run_name=zero3")
    assert done.returncode == 0, done.stderr
    asked = {f["check"]: f["verdict"] for f in json.loads((run.parent / "zero3" / "doctor.json").read_text())}
    assert asked["own teacher"] == "fine", asked
    assert asked["teacher gain"] in ("fine", "warning"), "of eight prompts a gain is hardly told from chance"
    first, losses = ([m["actor/loss"] for m in lines(r / "metrics.jsonl")] for r in (run, run.parent / "zero3"))
    assert losses == pytest.approx(first, abs=1e-4)
    measured = [[point["step"] for point in lines(r / "evaluations.jsonl")] for r in (run, run.parent / "zero3")]
    assert measured == [[0, 2, 3, 0], [3]], "evaluation.on_start=false, and the teacher is at step 0"
    summary = json.loads((run.parent / "zero3" / "summary.json").read_text())
    assert summary["student_start"] is None and summary["student_end"]["step"] == 3


@pytest.mark.ray
def test_adapters_are_all_that_is_published(run: Path) -> None:
    """On two ranks of ZeRO-3 and two actors: rank 4 on the 28 linear layers of the shop's student, in float32. (Their
    export is what an engine makes of it: test_lora.py.)"""
    adapters = ["learner.lora.r=4", "learner.lora.lora_alpha=8", "learner.lr=1e-2", "doctor=false"]
    done = opd("train", *QUICK, *TWO_OF_EACH, *adapters, f"output_dir={run.parent}", "run_name=lora")
    assert done.returncode == 0, done.stderr
    metrics, export = lines(run.parent / "lora" / "metrics.jsonl"), run.parent / "lora" / "export"
    assert all(m["weights/sentinel_gap"] < 1e-4 for m in metrics)
    adapter = load_file(export / "adapter" / "adapter_model.safetensors")
    assert {m["weights/nbytes"] for m in metrics} == {sum(4 * t.numel() for t in adapter.values())}
    losses = [m["actor/loss"] for m in metrics]
    assert losses[0] == pytest.approx(lines(run / "metrics.jsonl")[0]["actor/loss"], abs=1e-4), "step 0 is the base"
    assert max(float(t.abs().max()) for name, t in adapter.items() if "lora_B" in name) > 1e-3


@pytest.mark.ray
def test_a_teacher_that_follows_the_student_entirely_has_nothing_left_to_teach(tmp_path: Path) -> None:
    """From the second step on it is the student; before, it is a student whose final norm was scaled."""
    teacher = shutil.copytree(ROOT / "assets" / "shop" / "student", tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] *= 0.8
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    follow = ["method=topk_reverse_kl", f"teacher.path={teacher}", "teacher.mixup=1", "doctor=false"]
    done = opd("train", *QUICK, *follow, f"output_dir={tmp_path}", "run_name=follow")
    assert done.returncode == 0, done.stdout + done.stderr
    divergence = [m["actor/loss"] for m in lines(tmp_path / "follow" / "metrics.jsonl")]
    assert abs(divergence[0]) > 1e-3
    assert max(map(abs, divergence[1:])) < 1e-5


@pytest.mark.ray
def test_an_existing_run_is_never_overwritten(run: Path) -> None:
    before = (run / "summary.json").read_bytes()
    done = opd("train", *SMALL, f"output_dir={run.parent}", "run_name=first")
    assert done.returncode == 2
    assert "exists and is never overwritten" in done.stderr
    assert (run / "summary.json").read_bytes() == before


@pytest.mark.ray
def test_the_export_scores_the_same_alone(run: Path, tmp_path: Path) -> None:
    """`opd export` copies a folder that vLLM loads with the accuracy of the run's end."""
    assert opd("export", f"run={run}", f"output={tmp_path / 'student'}").returncode == 0
    done = opd("eval", f"checkpoint={tmp_path / 'student'}", f"output={tmp_path / 'found.json'}", *SMALL)
    assert done.returncode == 0, done.stderr
    figures = dict(re.findall(r"^(\w+) +(\S+)$", done.stdout, flags=re.MULTILINE))
    end = json.loads((run / "summary.json").read_text())["student_end"]
    (point,) = json.loads((tmp_path / "found.json").read_text())
    assert float(figures["greedy"]) == end["greedy"] == point["greedy"]
    assert float(figures["reverse_kl"]) == pytest.approx(end["reverse_kl"], abs=0.3)  # other samples of 8 prompts


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    done = opd("train", "experiment=shop", "dry_run=true", f"output_dir={tmp_path / 'runs'}")
    assert done.returncode == 0 and "rollout actor" in done.stdout
    assert not (tmp_path / "runs").exists()
    done = opd("eval", f"checkpoint={ROOT / 'assets' / 'shop' / 'student'}", "experiment=shop", "dry_run=true")
    assert done.returncode == 0 and "rollout actor" in done.stdout, done.stderr
