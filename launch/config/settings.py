"""Settings of a run as a whole: cluster, hardware and evaluation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated

from launch.artifacts.evaluation_point import MAIN
from launch.config.retry_policy import RetryPolicy
from opd.errors import ConfigurationError
from opd.evaluation.estimates import MOST_VOTES
from opd.observability.roofline import Hardware
from opd.ports import PromptSource, Sources
from opd.prompts.held_out import first_step, held_out
from opd.settings.ranges import Count, Deadline, Every, In, Names, Seed, Temperature, Tokens, TopP, Whole
from opd.settings.validation import settings
from opd.types import Prompt
from opd.types.prompt_rows import Row


class Placement(Enum):
    """Placement strategy: how actors are spread over the nodes of a cluster."""

    NONE = "none"
    PACK = "PACK"
    SPREAD = "SPREAD"


class DeviceLayout(Enum):
    """Division of this machine's GPUs among roles, for a local session in which none asks for any."""

    AUTO = "auto"  # by what they need; without GPUs there is nothing to divide
    GIVEN = "given"  # as cluster.gpus_per_* say


class Sharing(Enum):
    """Sharing of memory between engines, teachers and learner."""

    RESIDENT = "resident"  # all hold theirs from start to end
    TIME = "time"  # they take turns: one works, all others sleep and hold next to nothing


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
    With `share=TIME` roles take turns on their memory, so that a step's largest role must fit and not their sum
    (docs/gpus.md).
    """

    # local starts Ray for this run; auto or HOST:PORT joins a running cluster
    address: Names = "local"
    # processors that each actor asks the cluster for
    cpus_per_actor: Processors = 0.5
    # devices of each rollout engine (as many as student.tensor_parallel), or a share of one
    gpus_per_engine: Devices = 0.0
    # devices of each teacher actor, or a share of one; above 0 a teacher of tensor_parallel GPUs has that many
    gpus_per_teacher: OneDevice = 0.0
    # devices of each learner rank, or a share of one
    gpus_per_learner: OneDevice = 0.0
    # AUTO divides this machine's GPUs among roles if no gpus_per_* is set; GIVEN takes gpus_per_* as they are
    layout: DeviceLayout = DeviceLayout.AUTO
    # GiB of one GPU, against which memory is planned; 0: what torch says here (elsewhere nothing is compared)
    gpu_memory_gib: CardMemory = 0.0
    # RESIDENT: every role holds its memory all the time; TIME: roles take turns, so that one GPU does for all
    share: Sharing = Sharing.RESIDENT
    # with share=TIME: seconds that a role waits for its turn while nothing ends or begins in that of another
    turn_deadline_s: Deadline = 3600.0
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


Samples = Annotated[int, In(1, 10_000)]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class EvaluationSet:
    """A named set of held-out prompts with a sampler of its own (docs/evaluation.md).

    All rows of `prompts` are asked, or `subset` of them: the first ones, or drawn with `seed` where `random_subset` is
    set. mean@k has k = `samples`; `pass_at` and `maj_at` name further k, each at most `samples`.
    """

    # source of the held-out prompts, with their task, template and system message, as in prompts
    prompts: PromptSource
    # completions of every prompt: the k of mean@k
    samples: Samples = 1
    # completions in evaluations between the first and the last; 0: as many as samples
    samples_between: Annotated[int, In(0, 10_000, because="0: as many as samples")] = 0
    # of those completions; 1 samples the model's own distribution, 0 is greedy
    temperature: Temperature = 1.0
    # share of probability that is sampled from; 1 is all of it
    top_p: TopP = 1.0
    # longest completion
    max_tokens: Tokens = 256
    # also one greedy completion of every prompt
    greedy: bool = False
    # k of pass@k, the chance that one of k samples is right; none: samples
    pass_at: Sequence[Samples] = ()
    # k of maj@k, the reward of the answer that most of k samples give; none: not measured
    maj_at: Sequence[Samples] = ()
    # steps between evaluations on this set; 0 measures at the start and at the end alone
    every: Every = 0
    # prompts that are asked; 0 is all of them
    subset: Annotated[int, In(0, 1_000_000, because="0: all of them")] = 0
    # draw the subset with seed; false takes the first ones
    random_subset: bool = False
    # prompts on which the divergence from the teacher is measured; 0: it is not
    reverse_kl_prompts: Annotated[int, In(0, 1_000_000, because="0: it is not measured")] = 0
    # of the subset and of the intervals
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name in ("pass_at", "maj_at"):
            if wrong := [k for k in getattr(self, name) if k > self.samples]:
                raise ConfigurationError(
                    f"EvaluationSet.{name} has {wrong[0]}, but samples is {self.samples}, of which so many cannot "
                    f"be drawn; set EvaluationSet.samples={wrong[0]} or a smaller k"
                )
        if self.samples > MOST_VOTES and any(k < self.samples for k in self.maj_at):
            raise ConfigurationError(
                f"EvaluationSet.maj_at has {min(self.maj_at)} of {self.samples} samples, which is counted exactly up "
                f"to {MOST_VOTES} samples; set EvaluationSet.samples={MOST_VOTES} or "
                f"EvaluationSet.maj_at=[{self.samples}]"
            )
        if self.temperature == 0 and self.samples > 1:
            raise ConfigurationError(
                f"EvaluationSet.samples is {self.samples}, but at temperature 0 all of a prompt's samples are the "
                "same; set EvaluationSet.samples=1, or EvaluationSet.temperature above 0"
            )
        if self.reverse_kl_prompts and (self.temperature != 1 or self.top_p < 1):
            raise ConfigurationError(
                f"EvaluationSet.reverse_kl_prompts is {self.reverse_kl_prompts}, but the divergence is one of texts "
                f"from the model's own distribution, and these have temperature {self.temperature:g} and top_p "
                f"{self.top_p:g}; set EvaluationSet.reverse_kl_prompts=0, or EvaluationSet.temperature=1 "
                "EvaluationSet.top_p=1"
            )

    def count(self, *, between: bool) -> int:
        """Completions of a prompt in an evaluation at the ends of a run, or `between` them."""
        return self.samples_between if between and self.samples_between else self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class EvaluationConfig:
    """Evaluation of a run: step 0 of `prompts` is the held-out set; `sets` are further ones, by name.

    `parts` spreads evaluations evenly over what the run may spend: over the amounts of `stop_after`, and where none is
    set over its steps. `teacher` also measures the teacher itself, once at the end, for which an engine of its size is
    started. `prompts` may be null where there are `sets`: then the first of them stands for the run in tables of one
    figure.
    """

    prompts: PromptSource | None
    # steps between evaluations; 0 measures at the start and at the end alone
    every: Every = 0
    # also measure the student before its first step; without it nothing says what training changed
    on_start: bool = True
    # instead of every: evaluations at the ends of so many equal parts of the run; 0: as every says
    parts: Annotated[int, In(0, 10_000)] = 0
    # also measure the teacher, once at the end, for which an engine of its size is started
    teacher: bool = True
    # completions of every held-out prompt at temperature 1 (mean@k, pass@k)
    samples: Samples = 1
    # longest completion of an evaluation
    max_tokens: Tokens = 256
    # held-out prompts on which the exact divergence is measured
    reverse_kl_prompts: Count = 128
    # named sets with samplers of their own: evaluation.sets.NAME.samples=8 (docs/evaluation.md)
    sets: Mapping[str, EvaluationSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts is None and not self.sets:
            raise ConfigurationError(
                "evaluation has no prompts: evaluation.prompts is null, and evaluation.sets is empty; give held-out "
                "rows by evaluation=dataset evaluation.prompts.path=FILE, or sets by evaluation_sets=[math500]"
            )
        for name in self.sets:
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
                raise ConfigurationError(
                    f"evaluation.sets.{name}: a set needs a name of small letters, digits and _ (at most 40); rename it"
                )

    @property
    def by_name(self) -> Mapping[str, EvaluationSet]:
        """All sets in the order in which they are measured; `MAIN` is that of `prompts`, if there is one."""
        if self.prompts is None:
            return dict(self.sets)
        main = EvaluationSet(
            prompts=self.prompts,
            samples=self.samples,
            samples_between=1,
            max_tokens=self.max_tokens,
            greedy=True,
            every=self.every,
            reverse_kl_prompts=self.reverse_kl_prompts,
        )
        return {MAIN: main, **self.sets}

    @property
    def sources(self) -> Mapping[str, PromptSource]:
        """Source of every set by the setting that names it, such as `evaluation.sets.aime24.prompts`."""
        return {place_of(name): one.prompts for name, one in self.by_name.items()}

    def asked(self, name: str, sources: Sources) -> list[Prompt]:
        """Prompts as a set asks them; of the main one whatever step 0 of its source has."""
        if name == MAIN and self.prompts is not None:
            return list(self.prompts(0, sources))
        return [prompt for _, prompt in self.held_out(name, sources)]

    def held_out(self, name: str, sources: Sources) -> Sequence[tuple[Row, Prompt]]:
        """Different prompts of a set with their rows."""
        one, below = self.by_name[name], replace(sources, place=place_of(name))
        if name == MAIN:
            return first_step(one.prompts, below)
        return held_out(one.prompts, below, one.subset, one.seed if one.random_subset else None)


def place_of(name: str) -> str:
    """Setting with the prompts of a set."""
    return "evaluation.prompts" if name == MAIN else f"evaluation.sets.{name}.prompts"
