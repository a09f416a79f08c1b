"""Optimizer shards: the part of master weights and moments on this rank, under every ZeRO stage.

DeepSpeed keeps float32 master weights and Adam's moments in flat partitions (stage 1 to 3), or leaves everything to
the optimizer (stage 0). Here they are seen as runs of elements of named parameters, which is what a checkpoint holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, distributed, nn

from learner.checkpoints import checkpoint
from weight_sync.manifest import runs

Named = Sequence[tuple[str, nn.Parameter]]
_GATHER_ELEMENTS = 256 * 2**20  # parameters made whole at once under ZeRO-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Elements `start : start + len` of a flattened parameter; `state` has live float32 views by key."""

    parameter: str
    start: int
    state: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.state[checkpoint.MASTER])


def fragments(engine: DeepSpeedEngine, named: Named, zero_stage: int) -> list[Fragment]:
    """Fragments on this rank, as views into the live state; moments that do not exist yet are made (zero)."""
    flat = list(_flat_partitions(engine, zero_stage))
    state = _moments(engine, flat)
    if zero_stage == 0:
        return [_whole(name, p, state[p]) for name, p in named]
    if zero_stage == 3:
        return [_partition(name, p, flat, state) for name, p in named]
    return [_mapped(name, p, flat, state) for name, p in named if p._hp_mapping is not None]  # type: ignore[attr-defined]


def pieces(
    held: Sequence[Fragment], zero_stage: int, rank: int, ranks: int
) -> Iterator[tuple[tuple[str, int, str], Tensor]]:
    """Pieces that a rank writes, by key, start and parameter: all it holds, at stage 0 an equal part of it."""
    for fragment in held:
        first, last = 0, len(fragment)
        if zero_stage == 0:
            first, last = last * rank // ranks, last * (rank + 1) // ranks
        if first < last:
            for key, values in fragment.state.items():
                yield (key, fragment.start + first, fragment.parameter), values[first:last]


def host_copies(held: Sequence[Fragment], zero_stage: int, rank: int, ranks: int) -> dict[str, Tensor]:
    """Host copies of the rank's `pieces`, by name."""
    return {
        checkpoint.piece_name(*place): values.detach().to("cpu", copy=True)
        for place, values in pieces(held, zero_stage, rank, ranks)
    }


@torch.no_grad()
def fill(engine: DeepSpeedEngine, named: Named, zero_stage: int, shards: checkpoint.Shards, updates: int) -> None:
    """Load the state in `shards`, of any number of ranks and any stage; all ranks must call."""
    for fragment in fragments(engine, named, zero_stage):
        stop = fragment.start + len(fragment)
        for key, values in fragment.state.items():
            values.copy_(shards.read(key, fragment.parameter, fragment.start, stop))
    set_updates(engine, updates)
    if zero_stage:  # what is computed with is a copy of the master weights, in its own dtype

        def read(name: str, numel: int) -> Tensor:
            return shards.read(checkpoint.MASTER, name, 0, numel)

        _fill_working_copy(named, zero_stage, read)


def set_updates(engine: DeepSpeedEngine, updates: int) -> None:
    """Set Adam's step count, which corrects its moments, to `updates`."""
    for state in _adam(engine).state.values():
        state["step"].fill_(float(updates))


@torch.no_grad()
def refresh(named: Named, zero_stage: int, held: Sequence[Fragment]) -> None:
    """Copy the master weights in `held` into the working copy, bit for bit; all ranks must call."""
    if not zero_stage:
        return
    own = {fragment.parameter: fragment for fragment in held}

    def gather(name: str, numel: int) -> Tensor:
        whole = torch.zeros(numel, dtype=torch.float32, device=named[0][1].device)
        if name in own:
            begin, values = own[name].start, own[name].state[checkpoint.MASTER]
            whole[begin : begin + len(values)] = values
        if distributed.get_world_size() > 1:
            distributed.all_reduce(whole.view(torch.int32))  # of every element all ranks but one have zero bits
        return whole

    _fill_working_copy(named, zero_stage, gather, everywhere=True)


def _fill_working_copy(
    named: Named, zero_stage: int, read: Callable[[str, int], Tensor], *, everywhere: bool = False
) -> None:
    """Copy `read(name, elements)` into the working copy; `everywhere`: all ranks call `read`, also for one alone."""
    for first, last in runs([_numel(p) for _, p in named], _GATHER_ELEMENTS):
        chosen = named[first:last]
        if zero_stage < 3:
            _copy_whole(chosen, read)
            continue
        with deepspeed.zero.GatheredParameters([p for _, p in chosen], modifier_rank=0):
            if everywhere or distributed.get_rank() == 0:
                _copy_whole(chosen, read)


def _copy_whole(chosen: Named, read: Callable[[str, int], Tensor]) -> None:
    for name, p in chosen:
        p.data.copy_(read(name, p.numel()).view(p.shape))


def _numel(p: nn.Parameter) -> int:
    """Elements of a parameter, also when ZeRO-3 has taken it apart."""
    return int(getattr(p, "ds_numel", p.numel()))


def _whole(name: str, p: nn.Parameter, moments: Mapping[str, Tensor]) -> Fragment:
    state = {checkpoint.MASTER: p.data.view(-1)}
    return Fragment(parameter=name, start=0, state=state | {k: moments[k].view(-1) for k in checkpoint.KEYS[1:]})


def partition(elements: int, each: int, rank: int) -> range:
    """Range of a parameter's `elements` on `rank`, where every rank has `each` and the last ones are padded."""
    return range(rank * each, min((rank + 1) * each, elements))


def _partition(name: str, p: Any, flat: Sequence[Tensor], moments: Mapping[Tensor, Mapping[str, Tensor]]) -> Fragment:
    """ZeRO-3: equal parts by rank."""
    outer = p._z3_optimizer  # whose own safe_get_local_* copy to a GPU what is kept in host memory
    group, start, count = outer.grad_position[outer.get_param_id(p)]
    state = _views(flat[group], moments, start, count)
    own = partition(p.ds_numel, count, distributed.get_rank())
    return Fragment(parameter=name, start=own.start, state={k: v[: len(own)] for k, v in state.items()})


def _mapped(name: str, p: Any, flat: Sequence[Tensor], moments: Mapping[Tensor, Mapping[str, Tensor]]) -> Fragment:
    """ZeRO-1 and 2: the part of a parameter that fell into this rank's flat partition of its group."""
    mapping = p._hp_mapping  # where DeepSpeed's own safe_get_full_* look; they miss the moments of a second group
    own, place = flat[mapping.param_group_index], mapping.get_hp_fragment_address()
    state = _views(own, moments, place.start, place.numel)
    return Fragment(parameter=name, start=mapping.lp_fragment_address.start, state=state)


def _views(own: Tensor, moments: Mapping[Tensor, Mapping[str, Tensor]], start: int, count: int) -> dict[str, Tensor]:
    """Live `count` elements from `start` on of a flat partition and of its moments."""
    whole = {checkpoint.MASTER: own.data} | {key: moments[own][key] for key in checkpoint.KEYS[1:]}
    return {key: values.narrow(0, start, count) for key, values in whole.items()}


def _adam(engine: DeepSpeedEngine) -> torch.optim.AdamW:
    """Our own optimizer, inside whatever DeepSpeed has put around it."""
    outer: Any = engine.optimizer
    return outer if isinstance(outer, torch.optim.AdamW) else outer.optimizer


def _moments(engine: DeepSpeedEngine, flat: Sequence[Tensor]) -> Any:
    """Adam's state; what it makes at its first step is made now (a step of 0 is the same to it as no state)."""
    adam = _adam(engine)
    for part in flat:
        if not adam.state.get(part):
            moments = {key: torch.zeros_like(part.data) for key in checkpoint.KEYS[1:]}
            # The fused kernel of a device reads the step there.
            adam.state[part] = {"step": torch.zeros((), dtype=torch.float32, device=part.device)} | moments
    return adam.state


def _flat_partitions(engine: DeepSpeedEngine, zero_stage: int) -> Iterator[Tensor]:
    outer: Any = engine.optimizer
    if zero_stage == 0:
        yield from (p for group in outer.param_groups for p in group["params"])
    elif zero_stage == 3:
        yield from outer.fp32_partitioned_groups_flat
    elif hasattr(outer, "single_partition_of_fp32_groups"):
        yield from outer.single_partition_of_fp32_groups
    else:  # stage 1 in bfloat16 has an optimizer of its own
        yield from outer.fp32_groups_flat_partition
