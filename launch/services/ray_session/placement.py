"""Resources that a run needs of a machine or a cluster, role by role, and whether they are there.

GPUs are counted as Ray counts them: fractions of one share it, more than one are whole.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Any

from opd.errors import ConfigurationError, OpdError

_SLACK = 1e-6  # Ray counts in ten-thousandths


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRole:
    """`count` actors that ask for `cpus` and `gpus` each; `key` is the setting that decides about the GPUs."""

    name: str
    count: int
    cpus: float
    gpus: float
    key: str = ""

    def on(self, node: "Machine") -> int:
        """The most of them that fit on one node, were it empty."""
        rooms = [floor(node.cpus / self.cpus + _SLACK)] if self.cpus else []
        if 0 < self.gpus < 1:  # a share never lies on two GPUs
            rooms.append(floor(node.gpus + _SLACK) * floor(1 / self.gpus + _SLACK))
        elif self.gpus:
            rooms.append(floor(node.gpus / self.gpus + _SLACK))
        return min(rooms, default=self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine of the cluster."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> "Machine":
        """The machine of Ray's resource names."""
        return cls(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))


@dataclass(slots=True)
class Bundles:
    """Bundles of a placement group, each reserved for one actor of the role in `names` at its index.

    Ray would put an actor that names no bundle into any with room for it: two that take a GPU each may then fill the
    bundle of an engine that takes two, and the engine waits forever.
    """

    names: Sequence[str]
    holders: dict[int, Any] = field(default_factory=dict)

    def free(self, name: str) -> int:
        """Index of the first bundle of a role that no actor holds.

        Raises:
            OpdError: all are held.
        """
        index = next((i for i, n in enumerate(self.names) if n == name and i not in self.holders), None)
        if index is None:
            raise OpdError(
                f"all {self.names.count(name)} places of the placement group for a {name} are held; end one first"
            )
        return index

    def release(self, actor: Any) -> None:
        """Let the bundle of `actor`, if it has one, be taken by another."""
        for index in [i for i, holder in self.holders.items() if holder is actor]:
            del self.holders[index]


def asked(roles: Iterable[ActorRole]) -> str:
    """The GPUs of all for people, e.g. `2 rollout actors + 1 teacher actor + 1 learner rank = 4`."""
    roles = [role for role in roles if role.count and role.gpus]
    total = sum(role.count * role.gpus for role in roles)
    parts = [f"{role.count * role.gpus:g} ({_counted(role)})" for role in roles]
    return f"{' + '.join(parts)} = {total:g}" if parts else "0"


def _counted(role: ActorRole) -> str:
    return f"{role.count} {role.name}{'s' * (role.count != 1)}"


def check_fits(roles: Sequence[ActorRole], nodes: Sequence[Machine], where: str) -> None:
    """Raise `ConfigurationError` if these actors cannot all run at once on these nodes, however they are laid out.

    Only what cannot be is refused; what other runs hold now may be given back.
    """
    roles = [role for role in roles if role.count]
    for unit in ("gpus", "cpus"):
        needs = sum(role.count * getattr(role, unit) for role in roles)
        has = sum(getattr(node, unit) for node in nodes)
        if needs > has + _SLACK:
            raise _too_much(roles, unit, needs, has, where)
    for role in roles:
        room = sum(role.on(node) for node in nodes)
        if role.count > room:
            each = f"{role.cpus:g} CPUs and {role.gpus:g} GPUs"
            largest = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Machine(cpus=0, gpus=0))
            raise ConfigurationError(
                f"this run asks for {_counted(role)} of {each} each, all of one on one node, but {where} has room for "
                f"{room} (its largest node has {largest.cpus:g} CPUs and {largest.gpus:g} GPUs); lower "
                f"{role.key or 'cluster.cpus_per_actor'} or cluster.cpus_per_actor, or join larger nodes"
            )


def _too_much(roles: Sequence[ActorRole], unit: str, needs: float, has: float, where: str) -> ConfigurationError:
    name = unit.removesuffix("s").upper()
    parts = " + ".join(
        f"{role.count * getattr(role, unit):g} for {_counted(role)}" for role in roles if getattr(role, unit)
    )
    if unit == "cpus":
        fair = floor(100 * has / sum(role.count for role in roles if role.cpus)) / 100
        remedy = f"set cluster.cpus_per_actor={fair:g} (or 0: actors share processors), or lower replicas"
    else:
        remedy = _fewer_gpus(roles, has)
    return ConfigurationError(
        f"this run asks for {needs:g} {name}s ({parts}), but {where} has {has:g}; {remedy}, or add nodes"
    )


def _fewer_gpus(roles: Sequence[ActorRole], has: float) -> str:
    on_gpus = [role for role in roles if role.gpus]
    if has < 1:
        return f"set {' '.join(f'{role.key}=0' for role in on_gpus)} to run on processors"
    shares = share(sum(role.count for role in on_gpus), int(has))
    return f"lower replicas or ranks, or set {' '.join(f'{role.key}={shares:g}' for role in on_gpus)}"


def share(actors: int, gpus: int) -> float:
    """Share of a GPU for each actor, if `actors` of them have equal parts of `gpus`."""
    return floor(100 / ceil(actors / gpus)) / 100
