"""What a run asks of a machine or a cluster, and the sentence about what is not there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import RunConfig, run_config
from launch.config.settings import DeviceLayout
from launch.plan.checks.devices import check_idle_cluster, gpus, resolved, roles, undecided, unseen_notes
from launch.run.session import measuring
from launch.services.ray_session.placement import ActorRole, Bundles, Machine, asked, check_fits, share
from opd.errors import ConfigurationError, OpdError
from opd.settings.devices import Device

REMOTE = ("teacher.backend=OPENAI", "teacher.url=http://x", "teacher.model=m", "method=sampled_reverse_kl")


@pytest.fixture(scope="module")
def shop() -> RunConfig:
    return run_config(["experiment=shop"])


def with_gpus(config: RunConfig, engine: float, teacher: float, learner: float, **cluster: object) -> RunConfig:
    given = {"gpus_per_engine": engine, "gpus_per_teacher": teacher, "gpus_per_learner": learner} | cluster
    return replace(config, cluster=replace(config.cluster, **given))  # pyright: ignore


def devices(config: RunConfig) -> tuple[Device, Device, Device]:
    return config.student.device, config.teacher.device, config.learner.device


def shows(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("shares", "here", "address", "expected"),
    [
        ((0, 0, 0), 0, "local", "CCC"),
        ((0, 0, 0), 1, "local", "GGG"),
        ((0, 0, 0), 8, "auto", "CCC"),  # what the driver sees says nothing of other machines
        ((1, 1, 1), 0, "auto", "GGG"),  # a head node has no GPU
        ((1, 0, 1), 0, "auto", "GCG"),
        ((0.4, 0.3, 0.3), 1, "local", "GGG"),
    ],
)
def test_the_device_follows_from_what_is_asked_and_never_from_the_driver(
    shop: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    shares: tuple[float, float, float],
    here: int,
    address: str,
    expected: str,
) -> None:
    shows(monkeypatch, here)
    found = devices(resolved(with_gpus(shop, *shares, address=address)))
    assert "".join(device.name[0] for device in found) == expected


def test_what_is_told_stays(shop: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shows(monkeypatch, 0)
    told = replace(shop, student=replace(shop.student, device=Device.CPU))
    assert devices(resolved(with_gpus(told, 1, 1, 1, address="auto"))) == (Device.CPU, Device.GPU, Device.GPU)


@pytest.mark.parametrize(("visible", "each"), [(2, "0.5"), (3, "1"), (8, "1")])
def test_several_gpus_of_which_nobody_is_given_one_are_refused(
    shop: RunConfig, monkeypatch: pytest.MonkeyPatch, visible: int, each: str
) -> None:
    shows(monkeypatch, visible)
    given = with_gpus(shop, 0, 0, 0, layout=DeviceLayout.GIVEN)
    with pytest.raises(ConfigurationError, match=rf"shows {visible} GPUs.*gpus_per_engine={each} .*\(3 actors\)"):
        resolved(given)
    shares = float(each)
    assert resolved(with_gpus(given, shares, shares, shares)), "what is proposed is accepted"
    with pytest.raises(ConfigurationError, match=r"a part of cluster\.gpus_per_engine"):
        resolved(with_gpus(shop, 1, 0, 0)), "nothing is divided where some are given"


def test_gpus_of_a_cluster_are_not_left_idle_by_accident(shop: RunConfig) -> None:
    there = with_gpus(shop, 0, 0, 0, address="auto")
    assert undecided(there) and not undecided(with_gpus(there, 0, 1, 0, address="auto"))
    check_idle_cluster(there, [Machine(cpus=8, gpus=0)])
    with pytest.raises(ConfigurationError, match=r"this cluster has 8 GPUs.*run on processors"):
        check_idle_cluster(there, [Machine(cpus=8, gpus=4)] * 2)


def test_a_driver_that_is_too_old_is_one_sentence(
    shop: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    shows(monkeypatch, 0)
    monkeypatch.setattr("launch.plan.environment.DEVICE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert resolved(shop), "a build of torch for processors runs on them"
    (note,) = unseen_notes(shop)
    assert "built for processors" in note and "pip install -e '.[gpu]'" in note, "but not without a word"
    quiet = ["student.device=CPU", "teacher.device=CPU", "learner.device=CPU"]
    assert not unseen_notes(run_config(["experiment=shop", *quiet]))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigurationError, match=r"built for CUDA 13.0\) sees none.*driver is older"):
        resolved(shop)


def test_an_engine_on_a_gpu_needs_a_compiler_and_says_so_before_it_starts(
    shop: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shows(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("launch.plan.environment.shutil.which", lambda _: None)
    monkeypatch.setattr("launch.plan.environment.sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"needs a C compiler.* and Python\.h.*student\.device=CPU"):
        resolved(shop)
    assert resolved(replace(shop, student=replace(shop.student, device=Device.CPU)))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["student.tensor_parallel=2", "cluster.gpus_per_engine=1"], "set cluster.gpus_per_engine=2"),
        (["cluster.gpus_per_engine=2"], "others would be idle"),
        (["cluster.gpus_per_learner=0.5", "learner.ranks=2"], "NCCL refuses"),
    ],
)
def test_numbers_of_gpus_that_cannot_be_right_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        resolved(run_config(["experiment=shop", "cluster=existing", *overrides]))


FOUR = ["cluster=multi_node", "student.replicas=2"]


def test_readme_s_four_gpus_are_four() -> None:
    config = run_config(["experiment=shop", *FOUR])
    check_fits(roles(config), [Machine(cpus=16, gpus=4)], "this cluster")
    assert gpus(config) == (
        "2 (2 rollout actors) + 1 (1 teacher actor) + 1 (1 learner rank) = 4; measuring the teacher at the end takes 1 "
        "more, if free"
    )
    with pytest.raises(ConfigurationError, match=r"asks for 4 GPUs .* but this cluster has 3; .*=0\.5"):
        check_fits(roles(config), [Machine(cpus=64, gpus=3)], "this cluster")


def test_a_writer_counts_where_the_method_needs_one_and_a_remote_teacher_takes_no_gpu() -> None:
    written = {role.name: role for role in roles(run_config(["experiment=shop", "method=sft", *FOUR]))}
    assert (written["writing teacher"].count, written["writing teacher"].gpus) == (1, 1)
    remote = run_config(["experiment=shop", *FOUR, *REMOTE])
    assert asked(roles(remote)) == "2 (2 rollout actors) + 1 (1 learner rank) = 3"
    assert resolved(remote).teacher.device is Device.CPU


def test_a_head_with_two_processors_is_told_at_once_which_override_helps() -> None:
    config = run_config(["experiment=shop", "cluster=existing"])
    with pytest.raises(ConfigurationError, match=r"asks for 3 CPUs .* has 2; set cluster.cpus_per_actor=0.66 "):
        check_fits(roles(config), [Machine(cpus=2, gpus=0)], "this cluster")
    helped = replace(config, cluster=replace(config.cluster, cpus_per_actor=0.66))
    check_fits(roles(helped), [Machine(cpus=2, gpus=0)], "this cluster")


def test_a_tensor_parallel_engine_needs_one_node() -> None:
    engines = [ActorRole(name="rollout actor", count=1, cpus=1, gpus=2, key="cluster.gpus_per_engine")]
    with pytest.raises(ConfigurationError, match=r"1 rollout actor of 1 CPUs and 2 GPUs each, all of one on one node"):
        check_fits(engines, [Machine(cpus=8, gpus=1)] * 2, "this cluster")
    check_fits(engines, [Machine(cpus=8, gpus=2)], "this cluster")


ROLES = st.builds(
    ActorRole,
    name=st.just("actor"),
    count=st.integers(0, 3),
    cpus=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    gpus=st.sampled_from([0.0, 0.3, 0.5, 0.66, 1.0, 2.0]),
    key=st.just("cluster.gpus_per_engine"),
)
MACHINES = st.builds(Machine, cpus=st.integers(0, 8).map(float), gpus=st.integers(0, 4).map(float))


def fit(actors: list[ActorRole], machines: list[tuple[float, list[float]]]) -> bool:
    """Is there a place for every actor? Tries all."""
    if not actors:
        return True
    first, rest = actors[0], actors[1:]
    for number, (cpus, cards) in enumerate(machines):
        if first.cpus > cpus + 1e-9:
            continue
        for place in range(len(cards)) if 0 < first.gpus < 1 else [None]:
            left = list(cards)
            if place is not None:
                left[place] -= first.gpus
            elif first.gpus:
                empty = [i for i, card in enumerate(left) if card > 1 - 1e-9][: int(first.gpus)]
                left = [card - (i in empty) for i, card in enumerate(left)] if len(empty) == first.gpus else [-1.0]
            if min(left, default=0.0) < -1e-9:
                continue
            changed = [*machines[:number], (cpus - first.cpus, left), *machines[number + 1 :]]
            if fit(rest, changed):
                return True
    return False


@given(st.lists(ROLES, min_size=1, max_size=2), st.lists(MACHINES, min_size=1, max_size=2))
def test_nothing_that_fits_is_refused(asking: list[ActorRole], machines: list[Machine]) -> None:
    """Against every layout there is; what is refused is one sentence."""
    actors = [replace(role, count=1) for role in asking for _ in range(role.count)]
    possible = fit(actors, [(m.cpus, [1.0] * int(m.gpus)) for m in machines])
    said = refusal(asking, machines)
    assert not (said and possible) and "\n" not in said and (not said or "set " in said or "lower " in said)


def refusal(asking: list[ActorRole], machines: list[Machine]) -> str:
    try:
        check_fits(asking, machines, "this cluster")
    except ConfigurationError as error:
        return str(error)
    return ""


@given(st.integers(1, 20), st.integers(1, 16))
def test_equal_shares_fit(actors: int, cards: int) -> None:
    each = min(1.0, share(actors, cards))
    check_fits([ActorRole(name="actor", count=actors, cpus=0, gpus=each)], [Machine(cpus=0, gpus=cards)], "here")


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.tuples(st.booleans(), st.sampled_from("abc"))))
def test_a_bundle_is_one_living_actor_s_and_always_of_its_own_role(
    names: list[str], steps: list[tuple[bool, str]]
) -> None:
    bundles, living = Bundles(names), dict[int, tuple[object, str]]()
    for ends, name in steps:
        if ends and living:
            index, (actor, _) = next(iter(living.items()))
            bundles.release(actor)
            del living[index]
        elif names.count(name) == sum(of == name for _, of in living.values()):
            with pytest.raises(OpdError, match=f"for a {name} are held"):
                bundles.free(name)
        else:
            index = bundles.free(name)
            assert names[index] == name and index not in living
            bundles.holders[index] = actor = object()
            living[index] = (actor, name)


@pytest.mark.parametrize(
    ("told", "first"),
    [
        (["teacher.backend=VLLM", "cluster.gpus_per_teacher=0.4"], ["default"]),
        (["teacher.backend=VLLM_LOGPROBS", "method=topk_reverse_kl", "cluster.gpus_per_teacher=0.4"], ["default"]),
        (["teacher.backend=VLLM", "cluster.gpus_per_teacher=1"], []),
        (["teacher.backend=VLLM", "cluster.gpus_per_teacher=0.4", "teacher.tensor_parallel=2"], []),
        (["cluster.gpus_per_teacher=0.4"], []),
        (["teacher.backend=VLLM"], []),
    ],
)
def test_teachers_that_measure_a_shared_gpu_start_before_the_roles_that_share_it(
    told: list[str], first: list[str]
) -> None:
    """vLLM measures what is free while it starts, so that none may take or leave memory meanwhile."""
    config = resolved(run_config(["experiment=shop", "cluster=existing", *told]))
    assert measuring(config) == first
