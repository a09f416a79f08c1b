"""Sizes that a plan decides where they are AUTO: the longest text of an engine, and micro-batches by memory.

A run that goes on keeps what its checkpoint records: another size cuts the sums of a step elsewhere, and rounds
otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import psutil

from hf.folder_check import Folder
from launch.artifacts.checkpoint_state import in_todays_names
from launch.artifacts.checkpoint_store import CheckpointStore, unverified_state
from launch.artifacts.run_directory import LATEST, RunDirectory
from launch.config.run_config import RunConfig
from launch.plan.checks.devices import automatic, visible_gpus
from launch.plan.checks.settings import check_devices
from launch.plan.memory.cards import check_cards, misfit
from launch.plan.memory.footprint import LearnerRole, peak
from launch.plan.memory.layout import best_layout, laid_out
from launch.plan.memory.parts import GIB, Part, card_bytes, parts
from launch.plan.memory.sharing import check_turns
from launch.plan.memory.store import texts_of_step
from launch.services.weight_transports import check_transport
from opd.errors import ConfigurationError, DataError
from opd.rollouts.contexts import with_room
from opd.settings.auto import Auto
from opd.settings.devices import Device
from opd.settings.ranges import Tokens
from opd.settings.validation import fit

CONTEXT = 4096
"""Tokens of prompt and completion that AUTO makes room for, where the model reads as many."""
FIRST, MOST = 8192, 65_536
"""Tokens of a micro-batch that AUTO takes where memory allows it, and the most that it takes on a GPU."""
SPARE = 0.1
"""Share of a GPU that more than 8192 tokens leave free beside the learner: what a plan may err by, for a backward pass
without room ends a run (on a CPU, plans were up to 2.4 % below what was counted)."""
LENGTH, MICROBATCH = "student.max_model_len", "learner.tokens_per_microbatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """Configuration with sizes decided, `notes` on what is unusual, and the reason of each AUTO by its setting."""

    config: RunConfig
    notes: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)


# --- what was recorded ----------------------------------------------------------------------------------------------


def as_recorded(config: RunConfig) -> Sized:
    """`config` with the sizes of the checkpoint that it goes on from in the place of AUTO."""
    where, settings = _recorded(config) if config.resume else (Path(), {})
    given = {LENGTH: config.student.max_model_len, MICROBATCH: config.learner.tokens_per_microbatch}
    found = {
        name: fit(Tokens, settings[name], f"{name} in {where}")
        for name, value in given.items()
        if isinstance(value, Auto) and name in settings
    }
    return Sized(
        config=replace(
            config,
            student=replace(config.student, max_model_len=found.get(LENGTH, given[LENGTH])),
            learner=replace(config.learner, tokens_per_microbatch=found.get(MICROBATCH, given[MICROBATCH])),
        ),
        why=dict.fromkeys(found, f"AUTO: as in {where}, from which the run goes on"),
    )


def as_begun(config: RunConfig) -> RunConfig:
    """`config` with the sizes of its own run's newest checkpoint, if there is one, in the place of AUTO."""
    return replace(as_recorded(replace(config, resume=LATEST)).config, resume=config.resume)


def _recorded(config: RunConfig) -> tuple[Path, Mapping[str, Any]]:
    """The checkpoint that `resume` means, and its settings; what cannot be read is refused where the run resumes."""
    store = CheckpointStore(RunDirectory(Path(config.output_dir) / config.run_name).checkpoints)
    if config.resume == LATEST:
        places = [store.path(step) for step in store.steps()] if config.run_name else []
    else:
        places = [store.path(int(config.resume)) if config.resume.isdecimal() else Path(config.resume)]
    for place in places:
        try:
            return place, in_todays_names(unverified_state(place).config)
        except DataError:  # `launch.checkpoint.resume` says it, and takes an older one for `latest`
            continue
    return Path(), {}


# --- the longest text -----------------------------------------------------------------------------------------------


def with_length(config: RunConfig, student: Folder) -> Sized:
    """`config` with `student.max_model_len` decided, and the room of drafts with it.

    Raises:
        ConfigurationError: it was told, and the model reads fewer tokens.
    """
    told, context = config.student.max_model_len, student.context
    if not isinstance(told, Auto) and context and told > context:
        raise ConfigurationError(
            f"{student.part} reads at most {context} tokens (max_position_embeddings in its config.json, with its rope "
            f"scaling), but student.max_model_len is {told}; lower it to {context}"
        )
    length = min(CONTEXT, context or CONTEXT) if isinstance(told, Auto) else told
    why = f"AUTO: the context of {student.part}" if length < CONTEXT else f"AUTO: {CONTEXT}, or the model's own context"
    short = isinstance(told, Auto) and length < CONTEXT
    return Sized(
        config=replace(
            config,
            student=replace(config.student, max_model_len=length),
            method=with_room(config.method, length),
        ),
        notes=(f"{LENGTH}={length} ({why})",) if short else (),
        why={LENGTH: why} if isinstance(told, Auto) else {},
    )


# --- micro-batches --------------------------------------------------------------------------------------------------


def ladder(longest: int) -> tuple[int, ...]:
    """Sizes of a micro-batch that are tried, smallest first: the longest sequence, and powers of two above it."""
    return (longest, *(2**n for n in range(MOST.bit_length()) if longest < 2**n <= MOST))


def with_microbatch(config: RunConfig, longest: int, *, exact: bool, kept: str = "") -> Sized:
    """`config` with the GPUs of this machine divided, and `learner.tokens_per_microbatch` decided.

    `longest`: tokens of the longest sequence that is trained; `exact` as in `Plan.exact_kl`; `kept`: why a size that
    was AUTO is a number already. AUTO is 8192, fewer where memory does not hold that, and on a GPU as many more as fit
    beside the others with a tenth to spare, once 8192 have their place. It is never less than `longest`.

    Raises:
        ConfigurationError: no layout fits, or the given one does not.
    """
    told = config.learner.tokens_per_microbatch
    if not isinstance(told, Auto):
        with _reminded(kept):
            return _divided(config, exact)
    sizes = ladder(longest)
    tried = [size for size in reversed(sizes) if size <= FIRST] or [longest]
    first = next((size for size in tried if _fits(_with(config, size), exact)), tried[-1])
    found = _divided(_with(config, first), exact)
    size, why = _grown(found.config, sizes, first, exact)
    unusual = (f"{MICROBATCH}={size} ({why}; told, it stays)",) if size != FIRST else ()
    return Sized(config=_with(found.config, size), notes=(*found.notes, *unusual), why={MICROBATCH: why})


def _grown(config: RunConfig, sizes: Sequence[int], first: int, exact: bool) -> tuple[int, str]:
    """The largest size that fits a run whose layout is made for `first`, and why it is none larger."""
    longest, card = sizes[0], card_bytes(config)
    more = [size for size in sizes if size > first]
    if first > FIRST:
        least = "AUTO: the longest sequence"
    elif first < FIRST:
        least = f"AUTO: {more[0]} would not fit" if more else "AUTO"
    else:
        least = f"AUTO: {FIRST}, as on every processor"
    if config.learner.device is not Device.GPU:
        return first, least
    if not card:
        return first, "AUTO: what a GPU holds is not known, cluster.gpu_memory_gib says it"
    whole = ceil(texts_of_step(config) * longest / config.learner.ranks)
    size = first
    for larger in more:
        if size >= max(whole, FIRST):
            return size, "AUTO: a whole step at once"
        if misfit(_spared(parts(_with(config, larger), card, exact=exact), card), card):
            return size, f"AUTO: {larger} would not leave {SPARE:.0%} of a GPU of {card / GIB:.1f} usable GiB free"
        size = larger
    return size, "AUTO: the most that is tried" if size > longest else "AUTO: the longest sequence"


def _spared(found: Sequence[Part], card: int) -> list[Part]:
    """The parts, with a learner that holds what is to be left free, too."""
    spare = int(SPARE * card)
    return [
        replace(part, role=replace(part.role, heads=part.role.heads + spare))
        if isinstance(part.role, LearnerRole)
        else part
        for part in found
    ]


def _divided(config: RunConfig, exact: bool) -> Sized:
    """`config` on the GPUs of this machine, checked."""
    divided = automatic(config, visible_gpus(config))
    found, notes = laid_out(config)
    check_turns(found)
    if divided:
        check_transport(found)
        check_devices(found)
    check_cards(found, card_bytes(found), exact=exact)
    return Sized(config=found, notes=notes)


def _fits(config: RunConfig, exact: bool) -> bool:
    """Whether the memory where the learner works, a GPU's or this machine's, holds all processes; yes if unknown."""
    card, visible = card_bytes(config), visible_gpus(config)
    found = parts(config, card, exact=exact)
    if config.learner.device is not Device.GPU:
        on_host = sum(part.count * peak(part.role).total for part in found if not part.on_gpu)
        return config.cluster.address != "local" or on_host <= psutil.virtual_memory().total
    if automatic(config, visible):
        return best_layout(config, visible, card) is not None
    return not card or misfit(found, card) is None


def _with(config: RunConfig, size: int) -> RunConfig:
    return replace(config, learner=replace(config.learner, tokens_per_microbatch=size))


@contextmanager
def _reminded(kept: str) -> Iterator[None]:
    """Context in which a refusal ends with the origin of a size that no setting names."""
    try:
        yield
    except ConfigurationError as error:
        if not kept:
            raise
        raise ConfigurationError(
            f"{error} ({MICROBATCH} is {kept.removeprefix('AUTO: ')}; another one gives results that differ by "
            "rounding)"
        ) from error
