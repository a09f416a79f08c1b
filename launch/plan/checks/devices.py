"""Device of every part of a run, its resource request to the cluster, and impossible combinations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from launch.config.run_config import RunConfig, teacher_key
from launch.config.settings import ClusterConfig, DeviceLayout
from launch.plan import environment
from launch.services.ray_session.placement import ActorRole, Machine, asked, check_fits, share
from opd.errors import ConfigurationError
from opd.method.needs import named, needed
from opd.ports import Role
from opd.settings.devices import Device
from teacher_service.config import OWN_ENGINE, REMOTE, Backend, TeacherConfig

ENGINE, WRITER, LEARNER_RANK = "rollout actor", "writing teacher", "learner rank"
TEACHER, REMOTE_TEACHER = "teacher actor", "remote teacher"


def writers_of(config: RunConfig) -> list[str]:
    """Teachers that write for the method: those that a part names, or all where the prompts say which."""
    named_by_parts = named(config.method, Role.WRITER)
    if named_by_parts or not needed(config.method, Role.WRITER):
        return sorted(named_by_parts)
    return list(config.teachers)


def writers_here(config: RunConfig) -> list[str]:
    """Teachers that write for the method in engines of this run; a completions endpoint writes where it is."""
    return [name for name in writers_of(config) if config.teachers[name].backend is not Backend.OPENAI]


def teacher_role(teacher: TeacherConfig) -> str:
    """Name of the role that a teacher's actors have."""
    if teacher.backend in REMOTE:
        return REMOTE_TEACHER
    return TEACHER if teacher.tensor_parallel == 1 else f"{teacher.tensor_parallel}-GPU {TEACHER}"


def gpus_of_teacher(cluster: ClusterConfig, teacher: TeacherConfig) -> float:
    """GPUs that each actor of a teacher requests: as all do, or one for every part of its weights."""
    if teacher.backend in REMOTE or not cluster.gpus_per_teacher:
        return 0.0
    return cluster.gpus_per_teacher if teacher.tensor_parallel == 1 else float(teacher.tensor_parallel)


def roles(config: RunConfig) -> list[ActorRole]:
    """All actors that a run holds from its start to its end."""
    cluster = config.cluster

    def of(name: str, number: int, gpus: float, key: str) -> ActorRole:
        return ActorRole(name=name, count=number, cpus=cluster.cpus_per_actor, gpus=gpus, key=f"cluster.{key}")

    asks = {TEACHER: cluster.gpus_per_teacher, REMOTE_TEACHER: 0.0}
    asks |= {teacher_role(one): gpus_of_teacher(cluster, one) for one in config.teachers.values()}
    replicas = Counter[str]()
    for one in config.teachers.values():
        replicas[teacher_role(one)] += one.replicas
    teachers = [
        of(name, replicas[name], gpus, "cpus_per_actor" if name == REMOTE_TEACHER else "gpus_per_teacher")
        for name, gpus in asks.items()
    ]
    writers = len(writers_here(config))
    return [
        of(ENGINE, config.student.replicas, cluster.gpus_per_engine, "gpus_per_engine"),
        of(WRITER, writers, cluster.gpus_per_engine, "gpus_per_engine"),
        *teachers,
        of(LEARNER_RANK, config.learner.ranks, cluster.gpus_per_learner, "gpus_per_learner"),
    ]


def gpus(config: RunConfig) -> str:
    """GPUs of a run as a sentence, with those for measuring the teacher."""
    cluster, writes = config.cluster, bool(writers_here(config))
    if not (cluster.gpus_per_engine and config.evaluation.teacher) or writes:
        return asked(roles(config))
    return f"{asked(roles(config))}; measuring the teacher at the end takes {cluster.gpus_per_engine:g} more, if free"


def resolved(config: RunConfig) -> RunConfig:
    """`config` with the device of every part resolved, once for the whole run, and what follows from the learner's.

    An actor that asks for a GPU works on it. One that asks for none works on what this machine has if Ray is started
    here, and elsewhere on processors: what the driver sees says nothing of other machines.

    Raises:
        ConfigurationError: GPUs are here that no role is given, or the numbers of GPUs cannot be right.
    """
    cluster, visible = config.cluster, visible_gpus(config)
    undivided = automatic(config, visible)  # launch.plan.memory.layout divides them, and checks again
    if not undivided:
        _check_counts(config, visible)
    if cluster.address == "local" and not undivided:
        _check_driver(config, visible)
        _check_idle(config, visible)
        here = f"this machine (torch sees {visible} GPU{'s' * (visible != 1)})"
        check_fits([replace(role, cpus=0.0) for role in roles(config)], [Machine(cpus=0, gpus=visible)], here)
    if torch.cuda.is_available() and cluster.address == "local":
        _check_tools(config)

    def device(setting: Device, requires: float) -> Device:
        return setting if setting is not Device.AUTO else Device.GPU if requires or visible else Device.CPU

    def teacher(of: TeacherConfig) -> TeacherConfig:
        return replace(of, device=Device.CPU if of.backend in REMOTE else device(of.device, cluster.gpus_per_teacher))

    trains_on = device(config.learner.device, cluster.gpus_per_learner)
    learner = config.learner.decided(on_gpu=trains_on is Device.GPU, engine=config.student.dtype)
    return replace(
        config,
        student=replace(config.student, device=device(config.student.device, cluster.gpus_per_engine)),
        teachers={name: teacher(of) for name, of in config.teachers.items()},
        learner=replace(learner, device=trains_on),
    )


def visible_gpus(config: RunConfig) -> int:
    """GPUs that torch sees here, if the run's actors will be here."""
    return torch.cuda.device_count() if config.cluster.address == "local" else 0


def automatic(config: RunConfig, visible: int) -> bool:
    """Whether the GPUs of this machine are still to be divided: there are some, and no role is given any."""
    cluster = config.cluster
    told = cluster.gpus_per_engine or cluster.gpus_per_teacher or cluster.gpus_per_learner
    wanted = any(device is not Device.CPU for device, _ in _asks_here(config))
    return cluster.layout is DeviceLayout.AUTO and visible > 0 and wanted and not told


def _check_counts(config: RunConfig, visible: int) -> None:
    cluster, parallel, device = config.cluster, config.student.tensor_parallel, config.student.device
    on_gpu = device is Device.GPU or (device is Device.AUTO and (visible or cluster.gpus_per_engine))
    if parallel > 1 and on_gpu and cluster.gpus_per_engine != parallel:
        raise ConfigurationError(
            f"student.tensor_parallel={parallel} spreads each rollout actor over {parallel} GPUs of one node, but "
            f"cluster.gpus_per_engine={cluster.gpus_per_engine:g}; set cluster.gpus_per_engine={parallel}"
        )
    if cluster.gpus_per_engine > max(parallel, 1):
        raise ConfigurationError(
            f"cluster.gpus_per_engine={cluster.gpus_per_engine:g}, but student.tensor_parallel={parallel} uses "
            f"{parallel} and the others would be idle; set one to the other"
        )
    for name, teacher in config.teachers.items():
        on_gpu = teacher.device is Device.GPU or (teacher.device is Device.AUTO and visible)
        if teacher.tensor_parallel > 1 and on_gpu and not cluster.gpus_per_teacher:
            key = teacher_key(name)
            raise ConfigurationError(
                f"{key}.tensor_parallel={teacher.tensor_parallel} spreads each of its actors over as many GPUs of one "
                "node, but cluster.gpus_per_teacher=0 requests none; set cluster.gpus_per_teacher=1, which is "
                f"{teacher.tensor_parallel} for this teacher"
            )
    if config.learner.ranks > 1 and 0 < cluster.gpus_per_learner < 1 and config.learner.device is not Device.CPU:
        raise ConfigurationError(
            f"learner.ranks={config.learner.ranks} with cluster.gpus_per_learner={cluster.gpus_per_learner:g} puts two "
            "ranks on one GPU, which NCCL refuses; set cluster.gpus_per_learner=1, or learner.ranks=1"
        )


def _asks_here(config: RunConfig) -> list[tuple[Device, float]]:
    """Device and GPUs that each part requests."""
    teachers = [teacher.device for teacher in config.teachers.values() if teacher.backend not in REMOTE]
    cluster = config.cluster
    return [
        (config.student.device, cluster.gpus_per_engine),
        *((device, cluster.gpus_per_teacher) for device in teachers),
        (config.learner.device, cluster.gpus_per_learner),
    ]


def _check_driver(config: RunConfig, visible: int) -> None:
    wants = any(device is not Device.CPU for device, _ in _asks_here(config))
    if wants and not visible and torch.version.cuda and environment.DEVICE.exists():
        raise ConfigurationError(
            f"this machine has a GPU ({environment.DEVICE}), but {environment.too_old(torch.version.cuda)}"
        )


def unseen_notes(config: RunConfig) -> tuple[str, ...]:
    """Notes on a GPU of this machine that is left idle, since torch is built for processors."""
    if config.cluster.address != "local" or torch.version.cuda or not environment.DEVICE.exists():
        return ()
    if all(device is Device.CPU for device, _ in _asks_here(config)):
        return ()
    return (
        f"this machine has a GPU ({environment.DEVICE}), but this torch is built for processors, on which everything "
        "runs; pip install -e '.[gpu]' has the other build, and student.device=CPU teacher.device=CPU "
        "learner.device=CPU says that it is meant",
    )


def _check_tools(config: RunConfig) -> None:
    """Refuse an engine on a GPU of this machine without what it compiles its kernels' launchers with."""
    teachers = [t.device for t in config.teachers.values() if t.backend in OWN_ENGINE]
    if all(device is Device.CPU for device in (config.student.device, *teachers)):
        return
    lacking = [lacks for _, lacks in environment.build_tools(on_gpu=True) if lacks]
    if lacking:
        raise ConfigurationError(
            f"an engine on this machine's GPU needs {' and '.join(lacking)}; install that, or set student.device=CPU"
        )


def _check_idle(config: RunConfig, visible: int) -> None:
    """Refuse a visible GPU of which every actor would take the first."""
    if visible > 1 and any(device is not Device.CPU and not requires for device, requires in _asks_here(config)):
        raise _idle(config, visible, f"this machine shows {visible} GPUs", "share the first one")


def undecided(config: RunConfig) -> bool:
    """Whether it is undecided that anything works on a GPU: none is requested, and no device is set."""
    return all(device is Device.AUTO and not requires for device, requires in _asks_here(config))


def check_idle_cluster(config: RunConfig, machines: Sequence[Machine]) -> None:
    """Refuse to leave the GPUs of a cluster idle by accident; for a run that is `undecided`."""
    visible = int(sum(machine.gpus for machine in machines))
    if visible:
        raise _idle(config, visible, f"this cluster has {visible} GPUs", "run on processors")


def _idle(config: RunConfig, visible: int, where: str, would: str) -> ConfigurationError:
    actors = sum(role.count for role in roles(config) if role.name != REMOTE_TEACHER)
    each = share(actors, visible)
    keys = " ".join(f"cluster.gpus_per_{name}={each:g}" for name in ("engine", "teacher", "learner"))
    devices = "student.device=CPU teacher.device=CPU learner.device=CPU"
    return ConfigurationError(
        f"{where}, but a part of cluster.gpus_per_engine, gpus_per_teacher and gpus_per_learner is 0, so that actors "
        f"would {would}; set {keys} ({actors} actors), or {devices} if that is meant"
    )
