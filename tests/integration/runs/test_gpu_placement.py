"""Placement of the pages' commands on pretended GPUs: a head without one beside a node of four, and one shared card.

The product's own roles, environments and `Actors`; the actors only report what they were given.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.config import environment as engine_environment
from actors.startup import engine_arguments
from launch.config.run_config import RunConfig, run_config
from launch.config.settings import Placement
from launch.plan.checks.devices import ENGINE, LEARNER_RANK, TEACHER, resolved, roles, teacher_role
from launch.plan.plan import make_plan
from launch.services.ray_session.cluster import Actors, end, machines, sees
from launch.services.ray_session.node import bare, start_ray
from launch.services.ray_session.placement import ActorRole
from learner.config import environment as learner_environment
from opd.errors import OpdError
from opd.settings.devices import Device
from teacher_service.backends.vllm_scoring import engine_arguments as of_teacher
from teacher_service.config import environment as teacher_environment
from tests.given import Given, Report
from tests.unit.plan.test_layout import Shown, shown_commands

pytestmark = pytest.mark.ray
PACK = ["experiment=shop", "cluster=multi_node", "cluster.cpus_per_actor=1"]


@contextmanager
def few_processes() -> Iterator[None]:
    """Ray without what only pages and autoscalers need, as a local run starts it."""
    with pytest.MonkeyPatch.context() as patch, bare():
        for name in ("ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "enable_worker_prestart", "prestart_worker_first_driver"):
            patch.setenv(f"RAY_{name}", "0")
        yield


@pytest.fixture
def one_card() -> Iterator[None]:
    """A machine with one GPU; its test is the first, for a process has one session of Ray."""
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": 40}
    with few_processes():
        start_ray(lambda: ray.init(address="local", num_cpus=4, num_gpus=1, **options), 250.0)
    try:
        yield
    finally:
        ray.shutdown()


def shared(monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]) -> RunConfig:
    """The layout of a command on a machine with one GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        plan = make_plan(run_config(overrides))
    assert sum(remark.startswith("layout: this machine has 1 GPU") for remark in plan.remarks) == 1
    return plan.config


@pytest.mark.usefixtures("one_card")
def test_one_card_is_shared_by_all_roles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Layouts of the demo and of the pages' commands for one GPU, of which the last are placed."""
    chosen = list[RunConfig]()
    commands = [shown for shown in shown_commands() if shown.gpus == 1]
    for overrides in (
        ["experiment=shop", "cluster.gpu_memory_gib=24", "dry_run=true"],
        *(c.here(tmp_path) for c in commands),
    ):
        config = shared(monkeypatch, overrides)
        cluster = config.cluster
        assert cluster.gpus_per_engine + cluster.gpus_per_teacher + cluster.gpus_per_learner <= 1
        chosen.append(config)
    assert devices(reports(chosen[-1], look_for=tmp_path)) == ["0", "0", "0"]


@pytest.fixture(scope="module")
def headless() -> Iterator[None]:
    """A head without a GPU, where the driver is, and a node with four."""
    import ray
    from ray.cluster_utils import Cluster

    with few_processes(), pytest.MonkeyPatch.context() as patch:
        for name in engine_environment(Device.CPU):  # which other tests of this process may have set for it
            patch.delenv(name, raising=False)
        head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
        cluster = start_ray(lambda: Cluster(initialize_head=True, head_node_args=head), 250.0)
        try:
            start_ray(lambda: cluster.add_node(num_cpus=8, num_gpus=4), 250.0)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def given(actors: Actors, role: ActorRole, config: RunConfig) -> Any:
    """An actor in the place of one of this role, with its environment."""
    environments = {
        ENGINE: engine_environment(config.student.device),
        teacher_role(config.teacher): teacher_environment(config.teacher.device, config.teacher.backend),
        LEARNER_RANK: learner_environment(config.learner.device),
    }
    return actors.make(Given, role, environments[role.name], concurrency=2)


def reports(config: RunConfig, look_for: Path | None = None) -> dict[str, list[Report]]:
    """What the actors of a run are given, by role; one of them must see `look_for`."""
    import ray

    actors = Actors(replace(config.cluster, start_deadline_s=200.0), roles(config))
    made = [(role.name, given(actors, role, config)) for role in roles(config) for _ in range(role.count)]
    try:
        found = ray.get([actor.report.remote() for _, actor in made], timeout=240)
        if look_for:
            missing = look_for / "absent"
            assert ray.get([sees(made[-1][1], look_for), sees(made[-1][1], missing)], timeout=240) == [True, False]
        names = [name for name, _ in made]
        return {name: [r for n, r in zip(names, found, strict=True) if n == name] for name in dict.fromkeys(names)}
    finally:
        for _, actor in made:
            end(actor)
        actors.close()


def devices(found: dict[str, list[Report]]) -> list[str]:
    return sorted(gpu for some in found.values() for report in some for gpu in report.gpus)


def readme() -> Shown:
    return next(shown for shown in shown_commands() if shown.gpus == 4)


@pytest.mark.usefixtures("headless")
@pytest.mark.parametrize("placement", ["NONE", "PACK"])
def test_readme_s_command_has_a_gpu_for_each_actor_behind_a_head_without_one(placement: str, tmp_path: Path) -> None:
    assert torch.cuda.device_count() == 0, "the driver sees none"
    assert sorted(machine.gpus for machine in machines()) == [0, 4]
    more = ["cluster=existing", "cluster.cpus_per_actor=1", f"cluster.placement={placement}"]
    told = [text for text in readme().here(tmp_path) if not text.startswith("cluster=")]
    config = resolved(run_config([*told, *more]))
    assert {config.student.device, config.teacher.device, config.learner.device} == {Device.GPU}
    found = reports(config)
    assert [len(found[name]) for name in (ENGINE, TEACHER, LEARNER_RANK)] == [2, 1, 1]
    assert devices(found) == ["0", "1", "2", "3"]
    assert not any(report.dynamo_off for report in found[ENGINE]), "engines on GPUs compile, whatever the driver has"
    assert {report.grouped for some in found.values() for report in some} == {placement != "NONE"}


ENGINES = ["student.tensor_parallel=2", "cluster.gpus_per_engine=2"]
TEACHERS = ["teacher.backend=VLLM", "teacher.tensor_parallel=2"]


@pytest.mark.usefixtures("headless")
@pytest.mark.parametrize(
    ("told", "placement"),
    [(ENGINES, Placement.NONE), (ENGINES, Placement.PACK), (TEACHERS, Placement.PACK)],
    ids=["engine, free", "engine, packed", "teacher, packed"],
)
def test_what_spreads_over_two_gpus_has_both_on_one_node(told: list[str], placement: Placement) -> None:
    """vLLM is told to start its workers itself: in a placement group it would ask Ray for bundles of its own."""
    config = resolved(run_config([*PACK, *told]))
    config = replace(config, cluster=replace(config.cluster, placement=placement))
    found = reports(config)
    spread = ENGINE if told is ENGINES else teacher_role(config.teacher)
    assert len(found[spread][0].gpus) == 2 and devices(found) == ["0", "1", "2", "3"]
    assert found[spread][0].grouped == (placement is not Placement.NONE)
    gpu = torch.device("cuda")
    arguments = engine_arguments(config.student, gpu) if told is ENGINES else of_teacher(config.teacher, gpu, 128)
    assert (arguments["distributed_executor_backend"], arguments["tensor_parallel_size"]) == ("mp", 2)


@pytest.mark.usefixtures("headless")
def test_an_actor_of_a_group_has_its_own_bundle_whichever_comes_first() -> None:
    """Two that take one GPU each, there first, leave the two of the engine's bundle alone; so does one that is new."""
    import ray

    config = resolved(run_config([*PACK, "student.tensor_parallel=2", "cluster.gpus_per_engine=2"]))
    actors = Actors(replace(config.cluster, start_deadline_s=200.0), roles(config))
    has = dict[str, tuple[str, ...]]()
    made = dict[str, Any]()

    def start(name: str) -> tuple[str, ...]:
        made[name] = given(actors, actors[name], config)
        return ray.get(made[name].report.remote(), timeout=240).gpus

    try:
        has |= {name: start(name) for name in (LEARNER_RANK, TEACHER, ENGINE)}
        assert [len(has[name]) for name in (LEARNER_RANK, TEACHER, ENGINE)] == [1, 1, 2]
        assert sorted(gpu for gpus in has.values() for gpu in gpus) == ["0", "1", "2", "3"]
        with pytest.raises(OpdError, match="all 1 places of the placement group for a teacher actor are held"):
            start(TEACHER)
        for name in (TEACHER, ENGINE):
            actors.end(made[name])
            assert start(name) == has[name], "its successor is where it was"
    finally:
        for actor in made.values():
            actors.end(actor)
        actors.close()
