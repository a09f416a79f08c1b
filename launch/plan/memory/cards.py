"""A run's processes against the GPUs that they get: what does not fit is refused, with settings that would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import psutil
import torch

from launch.config.run_config import RunConfig, teacher_key
from launch.plan.memory.footprint import EngineRole, Phase, TeacherRole, asleep, footprint, on_host, parked, peak
from launch.plan.memory.parts import GIB, Part, device_bytes, parts
from launch.plan.memory.shapes import read_shape, uneven
from opd.errors import ConfigurationError
from opd.settings.devices import Device, Dtype
from teacher_service.config import REMOTE, Backend

_Crowd = tuple[int, list[tuple[Part, int]]]
_SMALL_CHUNK, _FEW_SEQUENCES, _FEW_TOKENS = 256, 32, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Demand for `bytes` of one GPU, more than it has; `why` names the processes."""

    bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Processes on one GPU while those named `awake` work and all others that take turns sleep."""

    members: Sequence[tuple[Part, int]]
    awake: str = ""

    def bytes_each(self, part: Part) -> int:
        """Bytes that a process of `part` holds."""
        return (peak(part.role) if self.works(part) else asleep(part.role)).total

    def works(self, part: Part) -> bool:
        """Whether processes of `part` are awake."""
        return not part.turns or part.name == self.awake

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(count * self.bytes_each(part) for part, count in self.members)


def fullest(found: Sequence[Part]) -> Crowd:
    """The most that one GPU may have to hold: of all turns, if roles take them."""
    turns = [Crowd(members=(), awake=part.name) for part in found if part.turns] or [Crowd(members=())]
    return max(
        (replace(turn, members=crowd(found, turn.bytes_each)) for turn in turns),
        key=lambda one: one.total,
    )


def _at_peak(part: Part) -> int:
    return peak(part.role).total


def crowd(found: Sequence[Part], need: Callable[[Part], int] = _at_peak) -> list[tuple[Part, int]]:
    """Processes that may meet on one GPU and `need` the most together, by what they ask for.

    Those that ask for none all use the first one; Ray lets shares meet as they add up to 1 at most.
    """
    homeless = [(part, part.count) for part in found if part.on_gpu and not part.gpus and part.count]
    best: list[_Crowd] = [(0, [])] * 101  # by hundredths of a GPU
    for part in [part for part in found if part.on_gpu and part.gpus and part.count]:
        each, bytes_each = (100 if part.gpus >= 1 else max(1, int(100 * part.gpus + 1e-6))), need(part)
        most = 1 if part.gpus >= 1 else min(part.count, 100 // each)
        best = [
            max(
                (_beside(best[left - n * each], part, n, bytes_each) for n in range(min(most, left // each) + 1)),
                key=_sum,
            )
            for left in range(101)
        ]
    return homeless + best[100][1]


def _beside(known: _Crowd, part: Part, number: int, bytes_each: int) -> _Crowd:
    return known[0] + number * bytes_each, known[1] + ([(part, number)] if number else [])


def _sum(crowd: _Crowd) -> int:
    return crowd[0]


def misfit(found: Sequence[Part], card: int) -> Misfit | None:
    """The first GPU on which processes do not fit, if there is one; `card` are a GPU's usable bytes."""
    for part in found:
        role = part.role
        if part.on_gpu and isinstance(role, EngineRole) and 0 < role.reserved < _of_vllm(role):
            share = f"of which vLLM gets {role.reserved / GIB:.1f} GiB (gpu_memory_utilization)"
            return Misfit(bytes=_of_vllm(role), why=f"{_said(part, 1)}, {share}")
    together = fullest(found)
    if together.total <= card:
        return None
    awake = [_said(part, count) for part, count in together.members if together.works(part)]
    sleeping = [part.name for part, _ in together.members if not together.works(part)]
    resting = [f"what {', '.join(sleeping)} keep while they sleep"] if sleeping else []
    return Misfit(bytes=together.total, why=" and ".join([*awake, *resting]))


def _of_vllm(role: EngineRole) -> int:
    """Bytes that must lie within an engine's share of its GPU."""
    return footprint(role, Phase.GENERATE).total


def _said(part: Part, count: int) -> str:
    of = peak(part.role)
    many = f"{count} of {part.name}" if count > 1 else part.name
    return f"{many} with {of.total / GIB:.1f} GiB{' each' if count > 1 else ''} ({of})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A setting that takes less memory, as an override and as a change of the configuration."""

    override: str
    apply: Callable[[RunConfig], RunConfig]


def remedies(config: RunConfig) -> Iterator[Remedy]:
    """Settings that take less memory and train the same, those that cost least first."""
    learner, student = config.learner, config.student
    if learner.device is Device.GPU:
        yield from _of_learner(config)
    for name, teacher in config.teachers.items():
        key = teacher_key(name)
        if teacher.device is Device.GPU and teacher.backend not in REMOTE:
            fewer = max(student.longest, teacher.max_batch_tokens // 4)
            if fewer < teacher.max_batch_tokens:
                yield _teacher(f"{key}.max_batch_tokens={fewer}", name, max_batch_tokens=fewer)
            if teacher.head_chunk > _SMALL_CHUNK:
                yield _teacher(f"{key}.head_chunk={_SMALL_CHUNK}", name, head_chunk=_SMALL_CHUNK)
    if student.device is Device.GPU:
        if student.max_num_seqs > _FEW_SEQUENCES:
            yield _student(f"student.max_num_seqs={_FEW_SEQUENCES}", max_num_seqs=_FEW_SEQUENCES)
        if student.step_tokens(on_gpu=True) > _FEW_TOKENS >= student.max_num_seqs:
            yield _student(f"student.max_num_batched_tokens={_FEW_TOKENS}", max_num_batched_tokens=_FEW_TOKENS)
        if not student.enforce_eager:
            yield _student("student.enforce_eager=true", enforce_eager=True)
    if learner.device is Device.GPU and learner.stage and not (learner.offload_optimizer or learner.lora.r):
        yield _learner("learner.offload_optimizer=true", offload_optimizer=True)  # seconds of a step on the host


def _of_learner(config: RunConfig) -> Iterator[Remedy]:
    learner, least = config.learner, config.student.longest
    if not learner.checkpointed:
        yield _learner("learner.gradient_checkpointing=true", gradient_checkpointing=True)
    tokens = learner.packed_tokens
    while tokens // 2 >= least:
        tokens //= 2
        yield _learner(f"learner.tokens_per_microbatch={tokens}", tokens_per_microbatch=tokens)
    if not learner.head_chunk or learner.head_chunk > _SMALL_CHUNK:
        yield _learner(f"learner.head_chunk={_SMALL_CHUNK}", head_chunk=_SMALL_CHUNK)
    if learner.dtype is Dtype.FLOAT32:
        stage = max(2, learner.stage)
        text = f"learner.dtype=BFLOAT16 learner.zero_stage={stage}"
        yield _learner(text, dtype=Dtype.BFLOAT16, zero_stage=stage)
    elif learner.stage < 2 and learner.ranks > 1:
        yield _learner("learner.zero_stage=2", zero_stage=2)
    yield from _over_ranks(config)


def _over_ranks(config: RunConfig) -> Iterator[Remedy]:
    """More learner ranks, where a layout does not choose them, and weights that they share."""
    learner, cluster = config.learner, config.cluster
    if cluster.address != "local" and cluster.gpus_per_learner == 1:
        yield from (_learner(f"learner.ranks={n}", ranks=n) for n in (2, 4, 8, 16) if n > learner.ranks)
    if learner.stage < 3 and not learner.lora.r:
        yield _learner("learner.zero_stage=3", zero_stage=3)


def cheapest(config: RunConfig, fits: Callable[[RunConfig], bool]) -> list[str] | None:
    """The fewest of `remedies`, in their order, with which `fits` is true; None if all of them do not suffice."""
    chosen = list[Remedy]()
    for remedy in remedies(config):
        if fits(_with(config, chosen)):
            break
        chosen.append(remedy)
    if not fits(_with(config, chosen)):
        return None
    for remedy in list(chosen):
        fewer = [other for other in chosen if other is not remedy]
        if fits(_with(config, fewer)):
            chosen = fewer
    last = {remedy.override.partition("=")[0]: remedy.override for remedy in chosen}
    return list(last.values())


def advice(config: RunConfig, fits: Callable[[RunConfig], bool], card: int) -> str:
    """Settings that would fit, or what else could be done."""
    for part in parts(config, card):
        if part.on_gpu and isinstance(part.role, TeacherRole) and footprint(part.role, Phase.REST).weights > card:
            each = part.role.parallel
            where = "one GPU" if each == 1 else f"{each} GPUs"
            return _spread(config, fits) or (
                f"a {part.name} uses {where}, which its weights alone exceed; spread it over more "
                "(teacher.tensor_parallel), choose a smaller or quantized one, or serve it elsewhere "
                "(teacher.backend=OPENAI or HTTP with teacher.url=...)"
            )
    found = cheapest(config, fits)
    if found:
        return f"set {' '.join(found)}"
    adapted = replace(config, learner=replace(config.learner, lora=replace(config.learner.lora, r=16)))
    with_adapters = None if config.learner.lora.r else cheapest(adapted, fits)
    if with_adapters is not None:
        return f"train adapters alone: {' '.join(['learner.lora.r=16', *with_adapters])}"
    return "use more or larger GPUs, share the learner (learner.ranks, learner.zero_stage=3), or choose smaller models"


def _spread(config: RunConfig, fits: Callable[[RunConfig], bool]) -> str:
    """Teachers over several GPUs each as overrides, and what else is needed then; "" if that does not fit."""
    large = [name for name, teacher in config.teachers.items() if teacher.device is Device.GPU]
    for number in (2, 4, 8):
        if any(uneven(read_shape(config.teachers[name].path), number) for name in large):
            continue
        told, changed = list[str](), config
        for name in large:
            remedy = _teacher("", name, backend=Backend.VLLM, tensor_parallel=number)
            key, changed = teacher_key(name), remedy.apply(changed)
            told.append(f"{key}.backend=VLLM {key}.tensor_parallel={number}")
        more = cheapest(changed, fits)
        if more is not None:
            return f"set {' '.join([*told, *more])}"
    return ""


def check_cards(config: RunConfig, card: int, *, exact: bool) -> None:
    """Refuse what would not fit the GPUs; `card` are the usable bytes of one (0: not known, nothing is checked)."""

    def fits(changed: RunConfig) -> bool:
        return misfit(parts(changed, card, exact=exact), card) is None

    _check_host(parts(config, card, exact=exact), config)
    lacking = misfit(parts(config, card, exact=exact), card) if card else None
    if lacking is None:
        return
    raise ConfigurationError(
        f"{lacking.bytes / GIB:.1f} GiB are needed on a GPU of which {card / GIB:.1f} GiB can be used: {lacking.why}; "
        f"{_utilization(config, card, exact) or advice(config, fits, card)}"
    )


def host_bytes(found: Sequence[Part]) -> int:
    """Host memory that holds what roles on GPUs give up while they sleep."""
    return sum(part.count * parked(part.role) for part in found if part.turns and part.on_gpu)


def offloaded_bytes(found: Sequence[Part]) -> int:
    """Host memory that holds the optimizer of all learner ranks, if `learner.offload_optimizer`."""
    return sum(part.count * on_host(part.role) for part in found)


def _check_host(found: Sequence[Part], config: RunConfig) -> None:
    """Refuse sleeping roles and an optimizer that this machine, if its GPUs are the run's, could not hold."""
    if config.cluster.address != "local" or not torch.cuda.is_available():
        return
    sleepers, optimizer, has = host_bytes(found), offloaded_bytes(found), psutil.virtual_memory().total
    if sleepers + optimizer <= has:
        return
    said = [f"cluster.share=TIME keeps {sleepers / GIB:.1f} GiB of sleeping roles in host memory"] * (sleepers > 0)
    said += [f"learner.offload_optimizer=true keeps {optimizer / GIB:.1f} GiB of the optimizer there"] * (optimizer > 0)
    raise ConfigurationError(
        f"{' and '.join(said)}, but this machine has {has / GIB:.1f} GiB; choose smaller models, train adapters "
        "(learner.lora.r=16), or use more GPUs"
    )


def _utilization(config: RunConfig, card: int, exact: bool) -> str:
    """The share that an engine alone on its GPU would need, where that is all that is wrong."""
    engine = next(part.role for part in parts(config, card, exact=exact) if isinstance(part.role, EngineRole))
    needed = _of_vllm(engine)
    if not engine.reserved < needed <= card:
        return ""
    share = ceil(100 * needed / device_bytes(card)) / 100
    changed = replace(config, student=replace(config.student, gpu_memory_utilization=min(share, 1.0)))
    return "" if misfit(parts(changed, card, exact=exact), card) else f"set student.gpu_memory_utilization={share:g}"


def lines(found: Sequence[Part], card: int) -> dict[str, str]:
    """Memory of every part at its peak, by what it is for, and what the fullest GPU holds."""
    shown = {part.name: f"{peak(part.role)} GiB" for part in found}
    together = fullest(found)
    if together.members:
        of = f" of {card / GIB:.1f} that can be used" if card else "; cluster.gpu_memory_gib says what a GPU has"
        who = ", ".join(
            f"{count} {part.name}{'' if together.works(part) else ' asleep'}" for part, count in together.members
        )
        shown["fullest GPU"] = f"{together.total / GIB:.1f} GiB{of} ({who})"
    if host := host_bytes(found):
        shown["host, of roles that sleep"] = f"{host / GIB:.1f} GiB"
    if host := offloaded_bytes(found):
        shown["host, of the optimizer"] = f"{host / GIB:.1f} GiB"
    return shown


def _with(config: RunConfig, chosen: Sequence[Remedy]) -> RunConfig:
    for remedy in chosen:
        config = remedy.apply(config)
    return config


def _learner(override: str, **changes: Any) -> Remedy:
    return Remedy(override=override, apply=lambda c: replace(c, learner=replace(c.learner, **changes)))


def _student(override: str, **changes: Any) -> Remedy:
    return Remedy(override=override, apply=lambda c: replace(c, student=replace(c.student, **changes)))


def _teacher(override: str, name: str, **changes: Any) -> Remedy:
    def apply(config: RunConfig) -> RunConfig:
        return replace(config, teachers={**config.teachers, name: replace(config.teachers[name], **changes)})

    return Remedy(override=override, apply=apply)
