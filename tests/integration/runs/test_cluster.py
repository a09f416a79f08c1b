"""The product's actors on a real Ray with pretended GPUs: what is asked, what is given, and what is said."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from launch.config.retry_policy import RetryPolicy
from launch.config.run_config import RunConfig, run_config
from launch.config.settings import ClusterConfig
from launch.plan.checks.devices import ENGINE, roles
from launch.services.failure_causes import find_own
from launch.services.pools import StudentPool
from launch.services.ray_session.address import check_cluster
from launch.services.ray_session.cluster import Actors, end, has_died, is_lost, silence
from launch.services.ray_session.node import start_ray
from launch.services.ray_session.placement import ActorRole
from opd.errors import ConfigurationError, OpdError

CPUS, GPUS = 4, 4
FOUR = ["experiment=shop", "cluster=multi_node", "student.replicas=2", "cluster.cpus_per_actor=1"]


class Small:
    """An actor that says what it was given, or fails as it is told."""

    def __init__(self, fails: str = "") -> None:
        if fails == "start":
            raise ValueError("head_dim=16 is unsupported")

    async def ready(self) -> None:
        """It is."""

    async def given(self) -> tuple[int, str, str]:
        """Its process, its GPUs, and whether its environment is that of an engine on a GPU."""
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.environ.get("TORCHDYNAMO_DISABLE", "")

    async def fail(self) -> None:
        """Raise what is no sentence of ours."""
        raise RuntimeError("Unsupported CPU attention configuration: head_dim=16\nand a second line")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    import ray

    options: Any = {"include_dashboard": False, "log_to_driver": False, "logging_level": 40}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        context = start_ray(lambda: ray.init(address="local", num_cpus=CPUS, num_gpus=GPUS, **options), 250.0)
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def four() -> RunConfig:
    config = run_config(FOUR)
    return replace(config, cluster=replace(config.cluster, start_deadline_s=200.0))


def made(actors: Actors, config: RunConfig, *, fails: str = "", environment: dict[str, str] | None = None) -> list[Any]:
    asked = [role for role in roles(config) for _ in range(role.count)]
    return [actors.make(Small, role, environment or {}, fails, concurrency=2) for role in asked]


@pytest.mark.ray
def test_a_real_cluster_is_recognized_at_its_port(address: str) -> None:
    check_cluster(address)


@pytest.mark.ray
@pytest.mark.parametrize("placement", ["NONE", "PACK", "SPREAD"])
def test_four_gpus_are_enough_for_four_and_a_fifth_is_refused_at_once(
    address: str, four: RunConfig, placement: str
) -> None:
    import ray

    cluster = replace(four.cluster, placement=type(four.cluster.placement)[placement])
    actors = Actors(cluster, roles(four))
    running = made(actors, four)
    try:
        found = ray.get([actor.given.remote() for actor in running], timeout=240)
        assert sorted(gpu for _, gpu, _ in found) == ["0", "1", "2", "3"]
        with pytest.raises(OpdError, match=r"no room for a measured teacher: .* 1 GPUs, of which .* and 0 are free"):
            actors.check_room(replace(actors[ENGINE], name="measured teacher"))
    finally:
        for actor in running:
            end(actor)
        actors.close()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["student.replicas=3"],
            r"5 GPUs \(3 for 3 rollout actors .* cluster has 4; .*gpus_per_engine=0.5",
        ),
        (["cluster.cpus_per_actor=2"], r"asks for 8 CPUs .* this cluster has 4; set cluster.cpus_per_actor=1 "),
        (["student.tensor_parallel=8", "cluster.gpus_per_engine=8", "student.replicas=1"], r"asks for 10 GPUs"),
    ],
)
def test_what_a_cluster_does_not_have_is_one_sentence_before_any_actor_is_made(
    address: str, overrides: list[str], sentence: str
) -> None:
    config = run_config(
        ["experiment=shop", "cluster=multi_node", "student.replicas=2", "cluster.cpus_per_actor=1", *overrides]
    )
    with pytest.raises(ConfigurationError, match=sentence):
        Actors(config.cluster, roles(config))


@pytest.mark.ray
def test_what_an_actor_raised_is_the_sentence(address: str) -> None:
    async def fails() -> None:
        actor = Actors(ClusterConfig(), [SMALL]).make(Small, SMALL, {}, concurrency=2)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(wait(actor.fail.remote()))
        finally:
            end(actor)

    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(fails())
    assert "\x1b[36mray::" in str(failed.value.exceptions[0]), "this is what a user read"
    own = find_own(failed.value)
    assert str(own) == (
        "a process of this run failed: RuntimeError: Unsupported CPU attention configuration: head_dim=16"
    )


@pytest.mark.ray
def test_actors_that_cannot_start_end_with_what_they_raised(address: str) -> None:
    actors = Actors(ClusterConfig(), [SMALL])
    pool = StudentPool(RetryPolicy(deadline_s=60), lambda: actors.make(Small, SMALL, {}, "start", concurrency=2))
    with pytest.raises(OpdError, match=r"^rollout actor did not start: ValueError: head_dim=16 is unsupported$"):
        asyncio.run(pool.replicas.start(2))


@pytest.mark.ray
def test_nothing_of_ray_s_is_printed_when_an_actor_is_killed(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker
    from ray.exceptions import RayError

    silence()
    assert worker.print_to_stdstream.__module__ == "launch.services.ray_session.cluster"
    actors = Actors(ClusterConfig(), [SMALL])

    async def killed() -> BaseException:
        actor = actors.make(Small, SMALL, {}, concurrency=2)
        pid, *_ = await wait(actor.given.remote())
        os.kill(pid, signal.SIGKILL)
        try:
            for _ in range(100):
                await wait(actor.given.remote())
                await asyncio.sleep(0.1)
        except RayError as error:
            await asyncio.sleep(3)  # Ray's page comes a little later
            return error
        raise AssertionError("it lives")

    error = asyncio.run(killed())
    assert has_died(error) and is_lost(error)
    printed = "".join(capfd.readouterr())
    assert "worker died" not in printed and "raylet" not in printed, printed


SMALL = ActorRole(name=ENGINE, count=1, cpus=0.1, gpus=0.0)


async def wait(reference: Any) -> Any:
    return await reference
