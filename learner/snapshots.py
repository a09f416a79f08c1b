"""Snapshots: named host copies of the trained weights on a rank, to restore or to extrapolate from."""

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.checkpoints import checkpoint
from learner.checkpoints.optimizer_shards import Fragment, pieces
from opd.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Copies of a rank's fragments, in their order; never changed.

    With the optimizer they have its moments, and `updates` is the place in the schedule; None: weights alone.
    """

    held: Sequence[Fragment]
    updates: int | None


class Snapshots:
    """A rank's snapshots by name. What is done with one reads or fills the live fragments it is given."""

    def __init__(self) -> None:
        self._kept: dict[str, Snapshot] = {}

    @property
    def places(self) -> dict[str, int | None]:
        """`Snapshot.updates` by name."""
        return {name: snapshot.updates for name, snapshot in self._kept.items()}

    def take(self, name: str, held: Sequence[Fragment], updates: int | None) -> None:
        """Copy `held`: the weights alone where `updates` is None."""
        if not re.fullmatch(checkpoint.SNAPSHOT_NAME, name):
            raise ConfigurationError(
                f"a snapshot's name needs 1 to 64 letters, digits and . _ -, got {name!r}; choose another name"
            )
        keys = checkpoint.snapshot_keys(updates)
        copies = [replace(f, state={key: f.state[key].detach().to("cpu", copy=True) for key in keys}) for f in held]
        self._kept[name] = Snapshot(held=copies, updates=updates)

    @torch.no_grad()
    def restore(self, name: str, held: Sequence[Fragment]) -> int | None:
        """Fill `held` with what the snapshot has; returns its `updates`."""
        snapshot = self._named(name)
        for live, kept in zip(held, snapshot.held, strict=True):
            for key, values in kept.state.items():
                live.state[key].copy_(values)
        return snapshot.updates

    @torch.no_grad()
    def extrapolate(self, name: str, factor: float, held: Sequence[Fragment], moved: Set[str]) -> None:
        """Set the weights in `held` of the parameters `moved` to `now + factor * (now - snapshot)`, each element by
        itself.

        Product and sum are rounded apart, so that the result does not depend on where a rank's part begins.
        """
        snapshot = self._named(name)
        if not math.isfinite(factor):
            raise ConfigurationError(f"extrapolate needs a finite factor, got {factor}; -1 is the snapshot, 0 is now")
        for live, kept in zip(held, snapshot.held, strict=True):
            if live.parameter not in moved:
                continue
            now = live.state[checkpoint.MASTER]
            then = kept.state[checkpoint.MASTER].to(now.device)
            if factor == -1:  # `now - (now - then)` is rounded
                now.copy_(then)
            elif factor:  # adding 0 would turn -0 into 0
                now.add_((now - then).mul_(factor))

    def pieces(self, zero_stage: int, rank: int, ranks: int) -> dict[str, Tensor]:
        """This rank's pieces of all snapshots, for a checkpoint."""
        return {
            checkpoint.piece_name(checkpoint.snapshot_key(key, name), start, parameter): values
            for name, snapshot in self._kept.items()
            for (key, start, parameter), values in pieces(snapshot.held, zero_stage, rank, ranks)
        }

    def load(self, shards: checkpoint.Shards, places: Mapping[str, int | None], held: Sequence[Fragment]) -> None:
        """Load the snapshots of a checkpoint in place of all there are; `held` has the elements of this rank.

        Raises:
            DataError: the checkpoint lacks a part of one.
        """

        def read(name: str, updates: int | None, f: Fragment) -> Fragment:
            names = {key: checkpoint.snapshot_key(key, name) for key in checkpoint.snapshot_keys(updates)}
            stop = f.start + len(f)
            return replace(f, state={k: shards.read(at, f.parameter, f.start, stop) for k, at in names.items()})

        self._kept = {
            name: Snapshot(held=[read(name, updates, f) for f in held], updates=updates)
            for name, updates in places.items()
        }

    def _named(self, name: str) -> Snapshot:
        if name not in self._kept:
            have = ", ".join(map(repr, self._kept)) or "none"
            raise ConfigurationError(
                f"the learner has no snapshot {name!r} (have: {have}); call snapshot({name!r}) before"
            )
        return self._kept[name]


def matching(names: Sequence[str], pattern: str) -> Set[str]:
    """Names of parameters in which the regular expression `pattern` is found; all for "".

    Raises:
        ConfigurationError: it is none, or found in no name.
    """
    try:
        found = frozenset(name for name in names if re.search(pattern, name))
    except re.error as error:
        raise ConfigurationError(
            f"extrapolate needs a regular expression over names of parameters, got {pattern!r} ({error}); correct it"
        ) from None
    if not found:
        raise ConfigurationError(
            f"extrapolate needs parameters to move, but {pattern!r} is found in the name of none (such as "
            f"{names[0]!r}); correct the pattern"
        )
    return found
