"""One GPU for all roles: what fits if they take turns, the experiments for such GPUs, and what cannot take turns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.config.settings import Sharing
from launch.plan.checks.devices import resolved, roles
from launch.plan.memory.cards import Crowd, check_cards, fullest, host_bytes, lines, misfit
from launch.plan.memory.footprint import (
    CONTEXT,
    GRAPHS,
    LearnerRole,
    Phase,
    TeacherRole,
    asleep,
    footprint,
    on_host,
    parked,
    peak,
)
from launch.plan.memory.layout import laid_out
from launch.plan.memory.parts import GIB, Part, card_bytes, parts
from launch.plan.memory.sharing import check_turns
from launch.plan.plan import Plan, make_plan
from launch.services.ray_session.placement import Machine, check_fits
from opd.errors import ConfigurationError
from tests.command import ROOT
from tests.hollow_models import hollow, qwen3
from tests.hub_stand_in import hub_stand_in
from tests.records import with_row
from tests.unit.hub.conftest import use
from tests.unit.hub.test_adopter import rows
from tests.unit.plan.test_footprint import LEARNER, MODEL
from tests.unit.plan.test_layout import CHECKPOINTED, models, pair, part, shows, told

__all__ = ["models"]
SIZES = {"0.6B": (1024, 28, 16, 3072), "1.7B": (2048, 28, 16, 6144), "4B": (2560, 36, 32, 9728)}
PAGE = ROOT / "docs" / "gpus.md"
CARDS = {"one_gpu_24gb": 24, "one_gpu_80gb": 80}


@contextmanager
def served(home: Path) -> Iterator[None]:
    """Models and data that the experiments name, at a stand-in of the hub."""
    with hub_stand_in() as hub, pytest.MonkeyPatch.context() as patch:
        use(patch, hub.url, home)
        for size, shape in SIZES.items():
            hub.add("model", f"Qwen/Qwen3-{size}", hollow(qwen3(*shape, tied=True)))
        hub.add("model", "Qwen/Qwen3-8B", hollow(qwen3(4096, 36, 32, 12_288, tied=False)))
        splits = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in ("train", "test"))
        files = {
            f"{split}.jsonl": rows(12, question="What is #?", answer="It is #.\n#### #") for split in ("train", "test")
        }
        head = f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}---\n"
        hub.add("dataset", "openai/gsm8k", {**files, "README.md": head.encode()})
        yield
    assert not hub.wrong


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with served(tmp_path_factory.mktemp("home")):
        yield


def planned(experiment: str, gib: int, *more: str) -> Plan:
    given = [f"experiment={experiment}", f"cluster.gpu_memory_gib={gib}", "tracker=none", "dry_run=true", *more]
    return make_plan(run_config(given))


def row(experiment: str, plan: Plan, card: int) -> str:
    """What the page says about an experiment."""
    found = parts(plan.config, card, exact=plan.exact_kl)
    gib = [f"{peak(one.role).total / GIB:.1f}" for one in found]
    small = replace(plan.config, student=replace(plan.config.student, gpu_memory_utilization=0.01))
    at_once = sum(peak(one.role).total for one in parts(small, card, exact=plan.exact_kl))
    return (
        f"| `experiment={experiment}` | {' | '.join(gib)} | {fullest(found).total / GIB:.1f} of {card / GIB:.1f} | "
        f"{at_once / GIB:.1f} | {host_bytes(found) / GIB:.1f} |"
    )


@pytest.mark.parametrize(("experiment", "gib"), CARDS.items())
@pytest.mark.usefixtures("hub")
def test_an_experiment_for_one_gpu_is_planned_and_told(
    experiment: str, gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows(monkeypatch, 1)
    plan = planned(experiment, gib)
    card = card_bytes(plan.config)
    found = parts(plan.config, card, exact=plan.exact_kl)
    assert plan.config.cluster.share is Sharing.TIME and misfit(found, card) is None
    check_fits(roles(plan.config), [Machine(cpus=16, gpus=1)], "this machine")
    written = row(experiment, plan, card)
    assert written in PAGE.read_text(), f"{written}: record it with `python -m tests.records`"
    assert experiment in (ROOT / "README.md").read_text()


def record(home: Path) -> None:
    """Write the rows of docs/gpus.md."""
    with served(home), pytest.MonkeyPatch.context() as patch:
        shows(patch, 1)
        for experiment, gib in CARDS.items():
            plan = planned(experiment, gib)
            with_row(PAGE, row(experiment, plan, card_bytes(plan.config)))


@pytest.mark.usefixtures("hub")
def test_a_card_that_cannot_hold_the_largest_role_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shows(monkeypatch, 1)
    with pytest.raises(ConfigurationError, match=r"does not fit the 1 GPU .*; set .* learner\.offload_optimizer=true"):
        planned("one_gpu_24gb", 12)


def test_an_optimizer_in_host_memory_is_counted_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all phases, with or without turns; it leaves the GPU, and sleeps where it is."""
    role = replace(LEARNER, offloaded=True)
    assert footprint(role, Phase.REST).optimizer == 0 and asleep(role).total == CONTEXT
    assert parked(role) == 2 * 10**9, "weights"
    assert on_host(role) == 2 * (1 << 32) + (1 << 31) + 8 * 10**9, "masters, gradients, copies, all pinned; moments"
    assert on_host(replace(role, on_gpu=False)) == on_host(LEARNER) == 0
    assert peak(LEARNER).total - peak(role).total == 12 * 10**9
    found = [Part(name="learner rank", count=2, gpus=1.0, on_gpu=True, role=role)]
    assert lines(found, 0)["host, of the optimizer"] == f"{2 * on_host(role) / GIB:.1f} GiB"
    shows(monkeypatch, 1)
    given = [*pair(models, "1.7B", "4B"), *CHECKPOINTED, "learner.offload_optimizer=true", "cluster.share=TIME"]
    config = resolved(run_config(given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB))
    sentence = r"cluster\.share=TIME keeps .* and learner\.offload_optimizer=true keeps 33\.8 GiB .* has 32\.0 GiB;"
    with pytest.raises(ConfigurationError, match=sentence):
        check_cards(config, 0, exact=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    check_cards(config, 0, exact=True)


def test_turns_are_proposed_where_roles_do_not_fit_at_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and with overrides that say the same."""
    shows(monkeypatch, 1)
    given = [*pair(models, "0.6B", "4B"), *CHECKPOINTED, "cluster.gpu_memory_gib=24"]
    config, (note,) = laid_out(resolved(run_config(given)))
    assert config.cluster.share is Sharing.TIME
    assert "which do not fit at once and take turns; so cluster.share=TIME cluster.gpus_per_engine=0.25" in note
    again = resolved(run_config([*given, "cluster.share=TIME", *told(note)]))
    assert again.cluster == replace(config.cluster, layout=again.cluster.layout)
    assert again.student == config.student
    fits, _ = laid_out(resolved(run_config([*given, "cluster.gpu_memory_gib=80"])))
    assert fits.cluster.share is Sharing.RESIDENT, "turns cost time"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["learner.transport=CUDA_IPC"],
            "lets the learner sleep .* learner.transport=CUDA_IPC reads them from its GPU",
        ),
        (
            ["learner.device=GPU", "learner.zero_stage=1", "learner.dtype=BFLOAT16"],
            "moves the optimizer .*; set learner.zero_stage=2",
        ),
        (
            ["max_staleness=1", "deterministic=false"],
            "lets engines finish .* weight_update=IN_FLIGHT wants it to be; set weight_update=DRAIN",
        ),
    ],
)
def test_what_cannot_take_turns_is_refused(overrides: Sequence[str], sentence: str) -> None:
    config = run_config(["experiment=shop", *overrides])
    check_turns(config)
    with pytest.raises(ConfigurationError, match=f"cluster.share=TIME {sentence}"):
        check_turns(replace(config, cluster=replace(config.cluster, share=Sharing.TIME)))
    check_turns(run_config(["experiment=shop", "cluster.share=TIME", "max_staleness=1"]))
    alone = ["learner.device=GPU", "learner.zero_stage=1", "learner.dtype=BFLOAT16", "learner.offload_optimizer=true"]
    check_turns(run_config(["experiment=shop", "cluster.share=TIME", *alone]))


def test_a_process_that_sleeps_keeps_little_and_the_host_the_rest() -> None:
    assert asleep(LEARNER).total == CONTEXT
    assert parked(LEARNER) == (2 + 4 + 8) * 10**9, "weights, masters and moments; gradients are given up after a step"
    assert parked(replace(LEARNER, on_gpu=False)) == 0
    read = TeacherRole(model=MODEL, bytes_each=2, tokens=4096, rows=512, on_gpu=True)
    run = replace(read, reserved=30 * GIB, head=GIB)
    assert (asleep(read).total, parked(read)) == (CONTEXT, MODEL.weights(2))
    assert asleep(run).total == CONTEXT + GRAPHS + MODEL.weights(2) // 16, "what vLLM captured stays on the GPU"
    assert parked(run) == MODEL.weights(2) + GIB
    frozen = replace(LEARNER, adapters=True, stage=3)
    assert asleep(frozen).weights == 2 * 10**9, "DeepSpeed leaves frozen parameters of ZeRO-3 where they are"


LEARNERS = st.builds(
    lambda ranks, tokens: Part(
        name="learner rank",
        count=ranks,
        gpus=0.0,
        on_gpu=True,
        role=LearnerRole(model=MODEL, bytes_each=2, stage=2, ranks=ranks, tokens=tokens, rows=64, on_gpu=True),
    ),
    st.integers(1, 2),
    st.integers(1, 10_000),
)


@given(st.integers(1, 9), st.integers(1, 9), LEARNERS)
def test_turns_take_the_largest_role_and_what_others_keep(first: int, second: int, learner: Part) -> None:
    """The fullest moment by every turn, and never more than all roles awake."""
    others = [replace(part(0.0, n, gib), name=f"teacher actor {gib}") for n, gib in ((1, first), (2, second + 9))]
    resident = [*others, learner]
    found = [replace(one, turns=True) for one in resident]
    moments = [
        sum(one.count * (peak(one.role) if one is awake else asleep(one.role)).total for one in found)
        for awake in found
    ]
    assert fullest(found).total == max(moments) <= fullest(resident).total
    assert fullest(resident) == Crowd(members=[(one, one.count) for one in resident])
    assert misfit(found, max(moments)) is None
    lacking = misfit(found, max(moments) - 1)
    assert lacking is not None and lacking.bytes == max(moments) and "keep while they sleep" in lacking.why
