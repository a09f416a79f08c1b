"""Layout of a run on the GPUs of this machine: `cluster.layout=AUTO` divides them among roles by their footprints."""

from collections.abc import Iterator
from dataclasses import replace
from math import floor

from launch.config.run_config import RunConfig
from launch.config.settings import Sharing
from launch.plan.checks.devices import ENGINE, LEARNER_RANK, TEACHER, WRITER, automatic, resolved, roles, visible_gpus
from launch.plan.memory.cards import advice, misfit
from launch.plan.memory.footprint import EngineRole, LearnerRole, TeacherRole, asleep, peak
from launch.plan.memory.parts import GIB, card_bytes, device_bytes, parts
from launch.plan.memory.sharing import no_turns
from launch.services.ray_session.placement import share
from opd.errors import ConfigurationError
from opd.settings.devices import Device
from teacher_service.config import TeacherConfig

MIB = 2**20
_LEAST = 0.01  # of a GPU: the least that a setting may be


def laid_out(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """A run whose devices are resolved, with the GPUs of this machine divided among its roles, and why.

    Changed are `cluster.gpus_per_*`, `student.gpu_memory_utilization` where roles share a GPU, and the numbers of
    engines and learner ranks where they are 1 and more are of use. Settings that are told stay as they are.

    Raises:
        ConfigurationError: no layout fits; with settings that would.
    """
    visible = visible_gpus(config)
    if not automatic(config, visible):
        return config, ()
    card = card_bytes(config)
    found = best_layout(config, visible, card)
    if found is None:
        raise _too_small(config, visible, card)
    return resolved(found), (_why(config, found, visible, card),)


def best_layout(config: RunConfig, visible: int, card: int) -> RunConfig | None:
    """The first layout on `visible` GPUs of `card` usable bytes that fits."""
    layouts = _layouts(config, visible, card)
    return next((one for one in layouts if not card or misfit(parts(one, card), card) is None), None)


def _layouts(config: RunConfig, visible: int, card: int) -> Iterator[RunConfig]:
    """Layouts in the order of preference: GPUs of their own, the learner's alone, shares of all."""
    numbers = _counts(config)
    tensors, engines = config.student.tensor_parallel, numbers[ENGINE] + numbers[WRITER]
    spread = _whole_gpus_of_teachers(config)
    for ranks in _ranks(config, visible):
        spare = visible - engines * tensors - spread - ranks
        if spare >= 0:
            more = spare // tensors if engines and config.student.replicas == 1 else 0
            yield _given(config, tensors, 1, 1, ranks=ranks, replicas=config.student.replicas + more)
    others, ranks = engines + numbers[TEACHER], numbers[LEARNER_RANK]
    if spread > numbers[TEACHER]:
        return
    if visible == 1 and max(tensors, ranks) == 1:
        told = config.cluster.share is Sharing.TIME
        if not told:
            yield _on_one(config, card)
        if told or (card and not no_turns(config)):
            yield _by_turns(config, card)
    elif others and tensors == 1 and ranks < visible:
        each = min(1.0, share(others, visible - ranks))
        yield _shared(_given(config, each, each, 1), card, together=floor(1 / each + 1e-6))


def _counts(config: RunConfig) -> dict[str, int]:
    """Numbers of actors on GPUs by role."""
    on_gpu = {
        ENGINE: config.student.device is Device.GPU,
        WRITER: config.student.device is Device.GPU,
        LEARNER_RANK: config.learner.device is Device.GPU,
    }
    numbers = {role.name: role.count * on_gpu.get(role.name, False) for role in roles(config)}
    return numbers | {TEACHER: sum(teacher.replicas for teacher in _on_gpus(config))}


def _on_gpus(config: RunConfig) -> list[TeacherConfig]:
    return [teacher for teacher in config.teachers.values() if teacher.device is Device.GPU]


def _whole_gpus_of_teachers(config: RunConfig) -> int:
    """GPUs of all teachers if none is shared."""
    return sum(teacher.replicas * teacher.tensor_parallel for teacher in _on_gpus(config))


def _ranks(config: RunConfig, visible: int) -> list[int]:
    """Numbers of learner ranks to try: the given one, or several where that is 1."""
    ranks = _counts(config)[LEARNER_RANK]
    return [1, *(n for n in (2, 4, 8, 16) if n < visible)] if ranks == 1 else [ranks]


def _given(
    config: RunConfig, engine: float, teacher: float, learner: float, *, ranks: int = 0, replicas: int = 0
) -> RunConfig:
    """`config` with so many GPUs for each actor of a role that works on one."""
    numbers = _counts(config)
    cluster = replace(
        config.cluster,
        gpus_per_engine=engine if numbers[ENGINE] else 0.0,
        gpus_per_teacher=teacher if numbers[TEACHER] else 0.0,
        gpus_per_learner=learner if numbers[LEARNER_RANK] else 0.0,
    )
    return replace(
        config,
        cluster=cluster,
        student=replace(config.student, replicas=replicas or config.student.replicas),
        learner=replace(config.learner, ranks=ranks or config.learner.ranks),
    )


def _needs(config: RunConfig, card: int) -> tuple[int, int, int]:
    """Bytes of an engine with the smallest cache, of the largest teacher, and of a learner rank; 0 if not on a GPU."""
    small = replace(config, student=replace(config.student, gpu_memory_utilization=_LEAST))
    found = [part for part in parts(small, card) if part.on_gpu]
    kinds = (EngineRole, TeacherRole, LearnerRole)
    engine, teacher, learner = (
        max((peak(part.role).total for part in found if isinstance(part.role, kind)), default=0) for kind in kinds
    )
    return engine, teacher, learner


def _on_one(config: RunConfig, card: int) -> RunConfig:
    """All on one GPU, in shares of what they need; engines also have what is left, for their key-value caches."""
    numbers, (engine, teacher, learner) = _counts(config), _needs(config, card)
    engines = numbers[ENGINE] + numbers[WRITER]
    others = numbers[TEACHER] * teacher + numbers[LEARNER_RANK] * learner
    engine = max(
        engine, min((card - others) // max(engines, 1), int(config.student.gpu_memory_utilization * device_bytes(card)))
    )
    total = max(engines * engine + others, 1)
    each = [max(_LEAST, floor(100 * need / total) / 100) for need in (engine, teacher, learner)]
    return _with_share(_given(config, *each), engine, card)


def _by_turns(config: RunConfig, card: int) -> RunConfig:
    """All on one GPU, one role at a time; engines have what the others leave when they sleep.

    Ray gives each actor the same share of the GPU and keeps one for another that is started for a while.
    """
    numbers = _counts(config)
    each = share(sum(numbers.values()) + 1, 1)
    taking = _given(replace(config, cluster=replace(config.cluster, share=Sharing.TIME)), each, each, each)
    others = parts(taking, card)[1:]
    sleeping = sum(part.count * asleep(part.role).total for part in others if part.on_gpu)
    most = int(config.student.gpu_memory_utilization * device_bytes(card))
    return _with_share(taking, min(most, (card - sleeping) // max(numbers[ENGINE], 1)), card)


def _shared(config: RunConfig, card: int, *, together: int) -> RunConfig:
    """`together` engines or teachers on each GPU that is not the learner's."""
    engine, teacher, _ = _needs(config, card)
    left = min(card // together, card - (together - 1) * teacher)
    return _with_share(
        config, max(engine, min(left, int(config.student.gpu_memory_utilization * device_bytes(card)))), card
    )


def _with_share(config: RunConfig, engine: int, card: int) -> RunConfig:
    """`config` whose engines take so many bytes of a GPU.

    Several that may meet on one are told the size of their caches: vLLM measures what is free while another takes it.
    """
    numbers = _counts(config)
    if not card or not numbers[ENGINE]:
        return config
    part = max(_LEAST, floor(1000 * engine / device_bytes(card)) / 1000)
    student = replace(config.student, gpu_memory_utilization=min(1.0, part))
    shared = replace(config, student=student)
    if numbers[ENGINE] == 1 or config.student.kv_cache_bytes:
        return shared
    role = parts(shared, card)[0].role
    return replace(shared, student=replace(student, kv_cache_bytes=peak(role).cache // MIB * MIB))


def _why(before: RunConfig, after: RunConfig, visible: int, card: int) -> str:
    """The layout as a sentence, with the overrides that say the same."""
    cluster, student = after.cluster, after.student
    turned = cluster.share is not before.cluster.share
    told = [f"cluster.share={cluster.share.name}"] * turned
    told += [f"cluster.gpus_per_{name}={getattr(cluster, f'gpus_per_{name}'):g}" for name in _ROLES]
    if student.replicas != before.student.replicas:
        told.append(f"student.replicas={student.replicas}")
    if after.learner.ranks != before.learner.ranks:
        told.append(f"learner.ranks={after.learner.ranks}")
    if student.kv_cache_bytes != before.student.kv_cache_bytes:
        told.append(f"student.kv_cache_bytes={student.kv_cache_bytes}")
    if student.gpu_memory_utilization != before.student.gpu_memory_utilization:
        told.append(f"student.gpu_memory_utilization={student.gpu_memory_utilization:g}")
    sizes = ", ".join(f"{p.name} {peak(p.role).total / GIB:.1f} GiB" for p in parts(after, card) if p.on_gpu)
    has = f" of {card / GIB:.1f} usable GiB" if card else ""
    turns = ", which do not fit at once and take turns" if turned else ""
    return (
        f"layout: this machine has {visible} GPU{'s' * (visible != 1)}{has}, and they need at most: {sizes}{turns}; so "
        f"{' '.join(told)} (cluster.layout=GIVEN takes these settings as they are)"
    )


_ROLES = ("engine", "teacher", "learner")


def _too_small(config: RunConfig, visible: int, card: int) -> ConfigurationError:
    engine, teacher, learner = (need / GIB for need in _needs(config, card))

    def fits(changed: RunConfig) -> bool:
        return best_layout(changed, visible, card) is not None

    return ConfigurationError(
        f"this run does not fit the {visible} GPU{'s' * (visible != 1)} of this machine ({card / GIB:.1f} GiB of each "
        f"can be used): a rollout actor needs {engine:.1f} GiB at least, a teacher actor {teacher:.1f}, a learner rank "
        f"{learner:.1f}; {advice(config, fits, card)}"
    )
