"""Settings of a run as a whole: cluster, hardware and evaluation."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from launch.config.retry_policy import RetryPolicy
from opd.observability.roofline import Hardware
from opd.ports import PromptSource
from opd.settings.ranges import Count, Deadline, Every, In, Names, Tokens, Whole
from opd.settings.validation import settings


class Placement(Enum):
    """Placement strategy: how actors are spread over the nodes of a cluster."""

    NONE = "none"
    PACK = "PACK"
    SPREAD = "SPREAD"


class DeviceLayout(Enum):
    """Division of this machine's GPUs among roles, for a local session in which none asks for any."""

    AUTO = "auto"  # by what they need; without GPUs there is nothing to divide
    GIVEN = "given"  # as cluster.gpus_per_* say


Processors = Annotated[float, In(0, 1024), Whole()]
Devices = Annotated[float, In(0.01, 64, or_zero=True, because="0: none is requested"), Whole()]
OneDevice = Annotated[
    float, In(0.01, 1, or_zero=True, because="such a process uses one device; for more of them raise replicas or ranks")
]
CardMemory = Annotated[float, In(1, 4096, or_zero=True, because="0: what torch says of this machine's GPUs")]
PerSecond = Annotated[float, In(1, 1e21, or_zero=True, because="0: not known")]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class ClusterConfig:
    """Cluster of a run. `address`: `local` starts Ray for this run; otherwise a running cluster is joined.

    `restarts`: how many rollout actors, and how many of each teacher, are replaced in a run before it ends, and how
    often the learner's ranks start anew in place. For the ranks the driver holds on to what was trained since the
    newest checkpoint, up to `replay_log_bytes`, hidden states in the object store included.
    `hedge_quantile` > 0 asks a second actor, too, when a call takes longer than this quantile of those before.
    What a run asks for and the cluster does not have is refused at once; with `elastic`, where an autoscaler adds nodes
    when they are asked for, it is waited for, `start_deadline_s` seconds. `layout=AUTO` divides the GPUs of this
    machine where no `gpus_per_*` is set; `gpu_memory_gib` is what one GPU has, against which memory is planned.
    """

    # local starts Ray for this run; auto or HOST:PORT joins a running cluster
    address: Names = "local"
    # processors that each actor asks the cluster for
    cpus_per_actor: Processors = 0.5
    # devices of each rollout engine (as many as student.tensor_parallel), or a share of one
    gpus_per_engine: Devices = 0.0
    # devices of each teacher actor, or a share of one
    gpus_per_teacher: OneDevice = 0.0
    # devices of each learner rank, or a share of one
    gpus_per_learner: OneDevice = 0.0
    # AUTO divides this machine's GPUs among roles if no gpus_per_* is set; GIVEN takes gpus_per_* as they are
    layout: DeviceLayout = DeviceLayout.AUTO
    # GiB of one GPU, against which memory is planned; 0: what torch says here (elsewhere nothing is compared)
    gpu_memory_gib: CardMemory = 0.0
    # NONE as Ray likes, PACK on few nodes, SPREAD over many
    placement: Placement = Placement.NONE
    elastic: bool = False
    # seconds that Ray, and then every actor, may take to start
    start_deadline_s: Deadline = 300.0
    # rollout actors, teachers of a kind, and starts of the learner in place that are replaced before a run ends
    restarts: Annotated[int, In(0, 10_000)] = 8
    replay_log_bytes: Annotated[int, In(0, 2**50, because="0: the loss of a learner rank ends the run")] = (
        1 << 30
    )  # a part of the object store, which engines and teachers need too
    # above 0: a second actor is asked too when a call takes longer than this quantile of those before
    hedge_quantile: Annotated[float, In(0, 1, high_open=True, because="0: no call is asked twice")] = 0.0

    def retry_policy(self, deadline_s: float) -> RetryPolicy:
        """Retry policy of a pool whose answers have `deadline_s`."""
        return RetryPolicy(
            deadline_s=deadline_s,
            start_deadline_s=self.start_deadline_s,
            restarts=self.restarts,
            hedge_quantile=self.hedge_quantile,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class HardwareConfig:
    """Peak rates of one device, for `perf/fraction_of_limit`: operations, memory bytes and link bytes per second.

    0 = not known. Example, an H200 on a 400 Gbit/s network: `HardwareConfig(flops=989e12, memory=4.8e12, link=50e9)`.
    """

    flops: PerSecond = 0.0
    memory: PerSecond = 0.0
    link: PerSecond = 0.0

    def hardware(self) -> Hardware | None:
        """The device's rates; None if none is set. All three must be set, or none."""
        if not self.flops and not self.memory and not self.link:
            return None
        return Hardware(flops=self.flops, memory=self.memory, link=self.link)

    def __post_init__(self) -> None:
        self.hardware()  # refuses a part of the three


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class EvaluationConfig:
    """Evaluation of a run: the source's step 0 is the held-out set.

    `parts` spreads evaluations evenly over what the run may spend: over the amounts of `stop_after`, and where none is
    set over its steps. `teacher` also measures the teacher itself, once at the end, for which an engine of its size is
    started.
    """

    prompts: PromptSource
    # steps between evaluations; 0 measures at the start and at the end alone
    every: Every = 0
    # instead of every: evaluations at the ends of so many equal parts of the run; 0: as every says
    parts: Annotated[int, In(0, 10_000)] = 0
    # also measure the teacher, once at the end, for which an engine of its size is started
    teacher: bool = True
    # completions of every held-out prompt at temperature 1 (mean@k, pass@k)
    samples: Annotated[int, In(1, 10_000)] = 1
    # longest completion of an evaluation
    max_tokens: Tokens = 256
    # held-out prompts on which the exact divergence is measured
    reverse_kl_prompts: Count = 128
