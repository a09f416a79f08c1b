"""What a user sets about a run as a whole: where it runs, what it may use, how it is measured."""

from dataclasses import dataclass
from enum import Enum

from launch.supervision import Care
from opd.errors import ConfigurationError
from opd.limits import Hardware
from opd.ports import PromptSource


class Placement(Enum):
    """How actors are spread over the nodes of a cluster."""

    NONE = "none"
    PACK = "PACK"
    SPREAD = "SPREAD"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Where actors run. `address`: `local` starts Ray for this run; otherwise a running cluster is joined.

    `restarts`: how many rollout actors, and how many of each teacher, are replaced in a run before it ends, and how
    often the learner's ranks start anew in place. For the ranks the driver holds on to what was trained since the
    newest checkpoint, up to `journal_bytes`, hidden states in the object store included.
    `hedge_quantile` > 0 asks a second actor, too, when a call takes longer than this quantile of those before.
    """

    address: str = "local"
    cpus_per_actor: float = 0.5
    gpus_per_engine: float = 0.0
    gpus_per_teacher: float = 0.0
    gpus_per_learner: float = 0.0
    placement: Placement = Placement.NONE
    start_deadline_s: float = 300.0
    restarts: int = 8
    journal_bytes: int = 1 << 30  # a part of the object store, which engines and teachers need too
    hedge_quantile: float = 0.0

    def __post_init__(self) -> None:
        if self.journal_bytes < 0:
            raise ConfigurationError(
                f"cluster.journal_bytes must be at least 0, got {self.journal_bytes}; use 0 if a learner that "
                "dies is to end the run"
            )

    def care(self, deadline_s: float) -> Care:
        """How the replicas of a pool whose answers have `deadline_s` are looked after."""
        return Care(
            deadline_s=deadline_s,
            start_deadline_s=self.start_deadline_s,
            restarts=self.restarts,
            hedge_quantile=self.hedge_quantile,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareConfig:
    """What one device can do at most, for `perf/fraction_of_limit`: operations, memory bytes and link bytes per second.

    0 = not told. Example, an H200 on a 400 Gbit/s network: `HardwareConfig(flops=989e12, memory=4.8e12, link=50e9)`.
    """

    flops: float = 0.0
    memory: float = 0.0
    link: float = 0.0

    def hardware(self) -> Hardware | None:
        """None where nothing is told; all three rates or none."""
        if not self.flops and not self.memory and not self.link:
            return None
        return Hardware(flops=self.flops, memory=self.memory, link=self.link)

    def __post_init__(self) -> None:
        self.hardware()  # refuses a part of the three


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What is measured: the source's step 0 is the held-out set.

    `teacher` also measures the teacher itself, once at the end, for which an engine of its size is started.
    """

    prompts: PromptSource
    every: int = 0
    teacher: bool = True
    samples: int = 1
    max_tokens: int = 256
    reverse_kl_prompts: int = 128

    def __post_init__(self) -> None:
        if self.every < 0 or self.samples < 1 or self.max_tokens < 1 or self.reverse_kl_prompts < 1:
            raise ConfigurationError(
                "evaluation needs every >= 0 and samples, max_tokens, reverse_kl_prompts >= 1, got "
                f"every={self.every}, samples={self.samples}, max_tokens={self.max_tokens}, "
                f"reverse_kl_prompts={self.reverse_kl_prompts}; correct the field that is out of range"
            )
