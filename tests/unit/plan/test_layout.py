"""Golden dry runs of real sizes on pretended GPUs: layouts, memory, and refusals with what would fit."""

import json
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.devices import resolved, roles
from launch.plan.memory.cards import Misfit, crowd, host_bytes, misfit, offloaded_bytes
from launch.plan.memory.footprint import TeacherRole, peak
from launch.plan.memory.layout import laid_out
from launch.plan.memory.parts import GIB, Part, card_bytes, parts
from launch.plan.plan import make_plan
from launch.plan.sizes import with_microbatch
from launch.services.ray_session.placement import Machine, check_fits
from opd.errors import ConfigurationError
from opd.settings.devices import Dtype
from tests.unit.plan.real_sizes import checkpoint
from tests.unit.plan.test_footprint import MODEL

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).with_name("golden.json")
CHECKPOINTED = ["learner.lr=1e-6", "learner.tokens_per_microbatch=16384"]  # as a GPU has it if nothing else is told
TRAINED = [*CHECKPOINTED, "learner.gradient_checkpointing=false"]
ADAPTED = [*CHECKPOINTED, "learner.lora.r=16", "learner.tokens_per_microbatch=4096"]
SPREAD = ["teacher.backend=VLLM", "teacher.tensor_parallel=2"]
SIZED = ["learner.lr=1e-6"]  # all AUTO
LONGEST = 2300  # tokens of a sequence, where a micro-batch is AUTO
# Name -> student, teacher, GPUs, GiB of each, overrides.
CASES = {
    "16 GB": ("0.6B", "4B", 1, 16, CHECKPOINTED),
    "24 GB": ("0.6B", "4B", 1, 24, CHECKPOINTED),
    "24 GB, adapters": ("0.6B", "4B", 1, 24, ADAPTED),
    "24 GB, 1.7B": ("1.7B", "4B", 1, 24, SIZED),
    "24 GB, 1.7B, optimizer on the host": ("1.7B", "4B", 1, 24, [*SIZED, "learner.offload_optimizer=true"]),
    "24 GB, 8B": ("8B", "8B", 1, 24, SIZED),
    "two of 24 GB": ("0.6B", "4B", 2, 24, CHECKPOINTED),
    "80 GB": ("1.7B", "8B", 1, 80, CHECKPOINTED),
    "80 GB, vLLM teaches by turns": ("1.7B", "8B", 1, 80, [*CHECKPOINTED, "teacher.backend=VLLM"]),
    "80 GB, not checkpointed": ("1.7B", "8B", 1, 80, TRAINED),
    "eight of 80 GB": ("8B", "32B", 8, 80, CHECKPOINTED),
    "eight of 80 GB, not checkpointed": ("8B", "32B", 8, 80, TRAINED),
    "four of 48 GB, a teacher larger than one": ("1.7B", "32B", 4, 48, CHECKPOINTED),
    "four of 48 GB, a teacher over two": ("1.7B", "32B", 4, 48, [*CHECKPOINTED, *SPREAD]),
    "16 GB, AUTO": ("0.6B", "4B", 1, 16, SIZED),
    "16 GB, adapters, AUTO": ("0.6B", "4B", 1, 16, [*SIZED, "learner.lora.r=16"]),
    "24 GB, AUTO": ("0.6B", "4B", 1, 24, SIZED),
    "24 GB, adapters, AUTO": ("0.6B", "4B", 1, 24, [*SIZED, "learner.lora.r=16"]),
    "80 GB, AUTO": ("1.7B", "8B", 1, 80, SIZED),
    "eight of 80 GB, AUTO": ("8B", "32B", 8, 80, SIZED),
    "eight of 80 GB, a mixture": ("30B-A3B", "235B-A22B", 8, 80, CHECKPOINTED),
    "eight of 80 GB, a mixture teaches": ("1.7B", "30B-A3B", 8, 80, CHECKPOINTED),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def shows(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def pair(models: Path, student: str, teacher: str) -> list[str]:
    paths = [checkpoint(f"Qwen3-{size}", models) for size in (student, teacher)]
    length = "student.max_model_len=4096"  # as AUTO decides for these
    return ["student=hf", f"student.path={paths[0]}", length, "teacher=hf", f"teacher.path={paths[1]}"]


def outcome(overrides: Sequence[str], models: Path) -> dict[str, object]:
    """What a dry run decides about memory and GPUs, in GiB; or why it refuses."""
    try:
        sized = with_microbatch(resolved(run_config(overrides)), LONGEST, exact=True)
    except ConfigurationError as error:
        return {"refused": str(error).replace(f"{models}/", "")}
    config, notes = sized.config, sized.notes
    card = card_bytes(config)
    cluster, found = config.cluster, parts(config, card)
    known: dict[str, object] = {
        "gpus": [cluster.gpus_per_engine, cluster.gpus_per_teacher, cluster.gpus_per_learner],
        "replicas": config.student.replicas,
        "ranks": config.learner.ranks,
        "tokens": config.learner.packed_tokens,
        "share": cluster.share.name,
        "utilization": config.student.gpu_memory_utilization,
        "memory": {part.name: round(peak(part.role).total / GIB, 1) for part in found},
        "notes": len(notes),
    }
    optimizer = offloaded_bytes(found)
    return known | ({"host": round((host_bytes(found) + optimizer) / GIB, 1)} if optimizer else {})


@pytest.mark.parametrize("name", CASES)
def test_real_sizes_are_laid_out_as_recorded(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m tests.records` records anew."""
    student, teacher, count, gib, more = CASES[name]
    shows(monkeypatch, count)
    overrides = [*pair(models, student, teacher), *more, f"cluster.gpu_memory_gib={gib}"]
    assert outcome(overrides, models) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize(
    "name",
    [
        "80 GB, not checkpointed",
        "eight of 80 GB, not checkpointed",
        "16 GB",
        "24 GB, 1.7B",
        "four of 48 GB, a teacher larger than one",
    ],
)
def test_what_is_proposed_fits(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, count, gib, more = CASES[name]
    shows(monkeypatch, count)
    overrides = [*pair(models, student, teacher), *more, f"cluster.gpu_memory_gib={gib}"]
    said = str(outcome(overrides, models)["refused"])
    proposed = re.findall(r"[a-z_]+(?:\.[a-z_]+)+=\S+", said.partition(";")[2])
    assert proposed and "refused" not in outcome([*overrides, *proposed], models), proposed


@dataclass(frozen=True)
class Shown:
    """A command of a page, and the GPUs that the comment above it names."""

    gpus: int
    gib: int
    overrides: list[str]

    def here(self, models: Path) -> list[str]:
        """The overrides with header-only checkpoints and rows that are here."""
        rows = models / "rows.jsonl"
        row = dict.fromkeys(("messages", "prompt"), "has 2 1 ; Mon buys 4 ?") | {"answer": "6"}
        rows.write_text(f"{json.dumps(row)}\n" * 64)
        for size in re.findall(r"/models/Qwen3-(\S+)", " ".join(self.overrides)):
            checkpoint(f"Qwen3-{size}", models)
        files = [text.replace("/models/", f"{models}/") for text in self.overrides]
        found = [re.sub(r"\b(train|test)\.jsonl", str(rows), text) for text in files]
        return [*found, f"cluster.gpu_memory_gib={self.gib}", "dry_run=true"]


def shown_commands() -> list[Shown]:
    """Every command of the pages on GPUs that says for which GPUs it is."""
    pages = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("docs/howto/many_gpus.md", "docs/gpus.md")]
    found = re.findall(r"^# (\d+) GPUs? of (\d+) GB.*\nopd train (.*)$", "\n".join(pages), re.M)
    return [Shown(gpus=int(gpus), gib=int(gib), overrides=shlex.split(rest)) for gpus, gib, rest in found]


@pytest.mark.parametrize("shown", shown_commands(), ids=lambda c: f"{c.gpus} of {c.gib} GB")
def test_commands_of_the_pages_pass_as_dry_runs(shown: Shown, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the GPUs that the page names; what asks for all of them is refused with one less."""
    shows(monkeypatch, shown.gpus)
    plan = make_plan(run_config(shown.here(models)))
    card = card_bytes(plan.config)
    assert misfit(parts(plan.config, card, exact=plan.exact_kl), card) is None
    check_fits(roles(plan.config), [Machine(cpus=16, gpus=shown.gpus)], "this machine")
    learner = plan.config.learner
    assert (learner.dtype, learner.checkpointed) == (Dtype.BFLOAT16, True) and learner.stage > 0
    assert any("the learner works on a GPU; so learner." in remark for remark in plan.remarks)
    if any("cluster.gpus_per_" in text for text in shown.overrides):
        shows(monkeypatch, shown.gpus - 1)
        with pytest.raises(ConfigurationError, match=f"asks for {shown.gpus} GPUs"):
            make_plan(run_config(shown.here(models)))


def test_readme_has_a_command_for_gpus() -> None:
    assert {(shown.gpus, shown.gib) for shown in shown_commands()} >= {(1, 24), (1, 80), (4, 80), (8, 80)}


@pytest.fixture(scope="module")
def shop() -> RunConfig:
    return run_config(["experiment=shop", "cluster.gpu_memory_gib=24", "learner.tokens_per_microbatch=8192"])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("replicas", [1, 2])
def test_every_layout_of_the_demo_fits_what_is_there(
    shop: RunConfig, monkeypatch: pytest.MonkeyPatch, count: int, replicas: int
) -> None:
    """Also for several engines; every process has a GPU, and a sentence says what was chosen."""
    shows(monkeypatch, count)
    asked = replace(shop, student=replace(shop.student, replicas=replicas))
    config, (note,) = laid_out(resolved(asked))
    cluster, card = config.cluster, card_bytes(config)
    shares = [cluster.gpus_per_engine, cluster.gpus_per_teacher, cluster.gpus_per_learner]
    assert all(shares) and misfit(parts(config, card), card) is None
    total = config.student.replicas * shares[0] + shares[1] + config.learner.ranks * shares[2]
    assert total <= count + 1e-6 and (count < replicas + 2 or total == count or replicas > 1)
    again = run_config(["experiment=shop", "cluster.gpu_memory_gib=24", f"student.replicas={replicas}", *told(note)])
    assert resolved(again).cluster == replace(cluster, layout=again.cluster.layout)
    assert again.student.replicas == config.student.replicas


def told(note: str) -> list[str]:
    """The overrides that a note on a layout names."""
    return [*re.findall(r"[a-z_]+\.[a-z_]+=[\d.]*\d", note.partition("; so ")[2]), "cluster.layout=GIVEN"]


@pytest.mark.parametrize(
    "told",
    [
        [
            "cluster.layout=GIVEN",
            "cluster.gpus_per_engine=1",
            "cluster.gpus_per_teacher=1",
            "cluster.gpus_per_learner=1",
        ],
        ["student.device=CPU", "teacher.device=CPU", "learner.device=CPU"],
    ],
)
def test_what_is_told_is_not_divided(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shows(monkeypatch, 4)
    config = resolved(run_config(["experiment=shop", "cluster.gpu_memory_gib=24", *told]))
    assert laid_out(config) == (config, ())


def test_a_machine_without_gpus_is_left_alone(shop: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shows(monkeypatch, 0)
    config = resolved(shop)
    assert laid_out(config) == (config, ())


def part(gpus: float, count: int, gib: int) -> Part:
    role = TeacherRole(model=replace(MODEL, parameters=gib * GIB), bytes_each=1, tokens=1, rows=0, on_gpu=True)
    return Part(name="teacher actor", count=count, gpus=gpus, on_gpu=True, role=role)


PARTS = st.lists(st.builds(part, st.sampled_from([0.0, 0.25, 0.34, 0.5, 1.0]), st.integers(0, 3), st.integers(1, 9)))


@given(PARTS)
def test_the_fullest_gpu_is_the_fullest_of_all_that_may_come(found: list[Part]) -> None:
    """Against every set of shares that Ray lets meet."""
    shared = [(one.gpus, peak(one.role).total) for one in found if one.gpus for _ in range(one.count)]
    homeless = sum(one.count * peak(one.role).total for one in found if not one.gpus)
    fullest = 0
    for chosen in range(2 ** min(len(shared), 10)):
        picked = [one for i, one in enumerate(shared[:10]) if chosen >> i & 1]
        if sum(gpus for gpus, _ in picked) <= 1:
            fullest = max(fullest, sum(size for _, size in picked))
    total = sum(count * peak(one.role).total for one, count in crowd(found))
    assert total >= homeless + fullest and (len(shared) > 10 or total == homeless + fullest)
    assert misfit(found, total) is None
    assert total == 0 or isinstance(misfit(found, total - 1), Misfit)


def record() -> None:
    """Write the golden file."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, (student, teacher, count, gib, more) in CASES.items():
            shows(patch, count)
            overrides = [*pair(Path(folder), student, teacher), *more, f"cluster.gpu_memory_gib={gib}"]
            found[name] = outcome(overrides, Path(folder))
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
