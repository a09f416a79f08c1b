"""Settings of the learner. Imports neither torch nor DeepSpeed, so a driver can read it."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated

from learner.schedule import Schedule, rate
from opd.errors import ConfigurationError
from opd.settings.auto import Auto
from opd.settings.devices import Device, Dtype
from opd.settings.ranges import (
    HARMLESS,
    AtMost,
    Bytes,
    Deadline,
    Every,
    Fraction,
    In,
    Length,
    Names,
    Replicas,
    Tokens,
)
from opd.settings.validation import settings


class LossKernel(Enum):
    """Implementation of a divergence over the whole vocabulary; the loss is the same."""

    TORCH = "torch"
    LIGER = "liger"  # liger-kernel's fused Triton kernel: a GPU and FullReverseKL, FullForwardKL or JensenShannon


class Transport(Enum):
    """Transport of published chunks to the engines (docs/publishing.md)."""

    AUTO = "auto"  # SHARED_MEMORY in a run on this machine alone, else OBJECT_STORE
    OBJECT_STORE = "object_store"  # Ray's, on any number of machines
    SHARED_MEMORY = "shared_memory"  # read where the learner wrote it: one machine
    NCCL = "nccl"  # from GPU to GPU, on any number of machines
    CUDA_IPC = "cuda_ipc"  # read in the learner's GPU memory: one GPU


EPS = "it keeps a division finite; at the size of gradients it would replace Adam by plain descent"
DECAY = "a step shrinks the weights by lr * weight_decay"
TRUST = "nats; an engine further from its learner writes with other weights, and 0 chooses by dtype"
LearningRate = Annotated[
    float,
    In(1e-12, 1, because="Adam moves every weight by about lr a step, and weights of language models are below 1"),
]
ZeroStage = Annotated[int, In(0, 3)]
Beta = Annotated[float, In(0, 1, high_open=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class LoraConfig:
    """Low-rank adapters in place of whole parameters (docs/lora.md); the names are PEFT's. `r=0`: none.

    What an adapter adds is scaled by `lora_alpha / r`. `target_modules` are names of linear layers, or PEFT's
    `all-linear` alone (all but the output matrix). There is no dropout: the policy that is trained must be the one that
    wrote.

    Example: `LoraConfig(r=16, lora_alpha=32, target_modules=("q_proj", "v_proj"))`.
    """

    # rank of the adapters; 0 trains the whole model
    r: Annotated[int, In(0, 65536)] = 0
    # adapters are scaled by lora_alpha / r
    lora_alpha: Annotated[float, In(0.001, 65536)] = 16.0
    # names of linear layers that get adapters; all-linear is all but the output matrix
    target_modules: Annotated[tuple[Names, ...], Length(1)] = ("all-linear",)

    @property
    def scale(self) -> float:
        """Factor of the product of an adapter's two matrices; 0 where there are none."""
        return self.lora_alpha / self.r if self.r else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentText:
    """Token ids that a rank needs of the run's texts.

    `ends` are the ids that end them (they are exported), `sentinel` those of a text by which publications are checked
    (empty: random ids).
    """

    ends: tuple[int, ...] = ()
    sentinel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class LearnerConfig:
    """Settings of the student's training.

    `dtype` is what the student computes and is published in; bfloat16 keeps float32 master weights in the optimizer.
    AUTO is decided when the run is planned: on a GPU bfloat16, ZeRO-2 and checkpointed activations, and float32 in one
    copy where the engine is told to write in float32 or `zero_stage` is 0; on a CPU float32 and ZeRO-0.
    `zero_stage`: what the ranks share instead of each keeping a copy: 0 nothing (float32 only), 1 the
    optimizer's state, 2 also gradients, 3 also the weights. `offload_optimizer` (DeepSpeed's name) keeps float32 master
    weights and moments in host memory through the step, too: AdamW runs on the host's cores.
    `tokens_per_microbatch` bounds the packed tokens of one forward pass (AUTO is decided by memory, in
    `launch.plan.sizes`), `head_chunk` the rows of vocabulary-wide logits alive at once (0: 64 MiB of them on a CPU,
    512 MiB on a GPU), `loss_kernel` is what computes on them; none of these changes the result. Diagnostics compare the
    `overlap_k` likeliest tokens of student and teacher (16 in the literature; 0: none). `sentinel_tolerance` is
    the largest allowed |engine - learner| logprob after a publication, in nats (0: a few times what it is
    on the unchanged checkpoint, see `weight_sync.sentinel`). Weights are published by `transport` in chunks of whole
    parameters, `publish_chunk_bytes` or less each (a larger parameter is a chunk of its own), which is also what a rank
    makes whole at once under ZeRO-3. With
    `lora.r` > 0 only adapters are trained and published. `deadline_s` bounds every wait for another rank. An update
    whose loss or gradient norm is not finite is skipped, weights and optimizer untouched; more than
    `max_skipped_steps` of them in a row end the run.

    Example: `LearnerConfig(ranks=2, zero_stage=2, lr=5e-6, schedule=Schedule.COSINE)`.
    """

    # processes that train
    ranks: Annotated[Replicas, HARMLESS] = 1
    # what ranks share: 0 nothing (float32), 1 optimizer state, 2 also gradients, 3 also weights; AUTO: 2, in float32 0
    zero_stage: Annotated[ZeroStage | Auto, HARMLESS] = Auto.AUTO
    # masters and moments stay in host memory, where AdamW runs: 12 bytes a parameter less on a GPU; zero_stage 1 to 3
    offload_optimizer: Annotated[bool, HARMLESS] = False
    # what the student computes in and is published in; AUTO is BFLOAT16 on a GPU and FLOAT32 on a CPU
    dtype: Dtype = Dtype.AUTO
    # AUTO is a GPU where there is one
    device: Annotated[Device, HARMLESS] = Device.AUTO
    # learning rate at the end of the warm-up (AdamW)
    lr: LearningRate = 5e-6
    # decay of AdamW's mean of gradients
    beta1: Beta = 0.9
    # decay of AdamW's mean of squared gradients
    beta2: Beta = 0.95
    # added to the root of AdamW's second moment
    eps: Annotated[float, In(1e-16, 0.01, because=EPS)] = 1e-8
    # decoupled weight decay of AdamW
    weight_decay: Annotated[float, In(0, 1, because=DECAY)] = 0.0
    # largest global gradient norm; 0 does not clip
    grad_clip: Annotated[float, In(1e-6, 1e6, or_zero=True, because="0 is no clipping")] = 1.0
    # updates in which the rate rises linearly, from 0 at the first one; CONSTANT has no warm-up
    warmup_steps: Every = 5
    # transformers' CONSTANT, CONSTANT_WITH_WARMUP, LINEAR, COSINE or WARMUP_STABLE_DECAY; or ours, WARMUP_TIMES_LINEAR
    schedule: Schedule = Schedule.CONSTANT_WITH_WARMUP
    # share of lr to which what falls falls: floor + (1 - floor) * shape (transformers' min_lr_rate), not cut off at it
    final_lr_fraction: Fraction = 0.0
    # last updates in which WARMUP_STABLE_DECAY falls (transformers' num_decay_steps)
    decay_steps: Every = 0
    # packed tokens of a forward and backward pass, into which a step's batch is cut; AUTO: 8192, on a GPU what fits it
    tokens_per_microbatch: Annotated[Tokens | Auto, HARMLESS] = 8192
    # rows of vocabulary-wide logits alive at once; 0 chooses by memory
    head_chunk: Annotated[int, In(0, 10_000_000), HARMLESS] = 0
    # TORCH, or LIGER's fused kernel on a GPU
    loss_kernel: Annotated[LossKernel, HARMLESS] = LossKernel.TORCH
    # top-k in which the overlap of student and teacher is measured; 0 measures none
    overlap_k: Annotated[int, In(0, 1_000_000), AtMost("vocabulary"), HARMLESS] = 16
    # compute activations anew in the backward pass: less memory, a third more work; AUTO does so on a GPU
    gradient_checkpointing: Annotated[bool | Auto, HARMLESS] = Auto.AUTO
    sentinel_tolerance: Annotated[float, In(1e-6, 5, or_zero=True, because=TRUST), HARMLESS] = 0.0
    # bytes of one piece of published weights
    publish_chunk_bytes: Annotated[Bytes, HARMLESS] = 256 << 20
    # how weights travel: AUTO, OBJECT_STORE, SHARED_MEMORY, NCCL or CUDA_IPC
    transport: Annotated[Transport, HARMLESS] = Transport.AUTO
    # seconds that bound every wait for another rank
    deadline_s: Annotated[Deadline, HARMLESS] = 600.0
    # updates with a gradient that is not finite, in a row, that end a run
    max_skipped_steps: Annotated[int, In(0, 100, because="a run that only skips learns nothing"), HARMLESS] = 3
    # kernels that repeat bit for bit on a GPU (CPUs always do)
    deterministic: Annotated[bool, HARMLESS] = False
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.dtype is Dtype.BFLOAT16 and self.zero_stage == 0:
            raise ConfigurationError(
                "learner.dtype=BFLOAT16 needs an optimizer with float32 master weights, but "
                "learner.zero_stage=0 has none; set learner.zero_stage to 1, 2 or 3, or learner.dtype=FLOAT32"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigurationError(
                "learner.offload_optimizer=true needs master weights that are kept apart from the model's, but "
                "learner.zero_stage=0 has one copy of all; set learner.zero_stage=2, or learner.offload_optimizer=false"
            )
        stable = self.schedule is Schedule.WARMUP_STABLE_DECAY
        if stable and not self.decay_steps:
            raise ConfigurationError(
                "learner.schedule=WARMUP_STABLE_DECAY needs to know how many of the last updates fall, got "
                "learner.decay_steps=0; set learner.decay_steps, e.g. to a fifth of steps"
            )
        if self.decay_steps and not stable:
            raise ConfigurationError(
                f"learner.decay_steps is {self.decay_steps}, but learner.schedule={self.schedule.name} has no decay of "
                "its own; set learner.schedule=WARMUP_STABLE_DECAY or learner.decay_steps=0"
            )

    def decided(self, *, on_gpu: bool, engine: Dtype = Dtype.AUTO) -> "LearnerConfig":
        """Settings without AUTO for a device; `engine` is `student.dtype`."""
        narrow = on_gpu and engine is not Dtype.FLOAT32 and self.zero_stage != 0
        dtype = self.dtype if self.dtype is not Dtype.AUTO else Dtype.BFLOAT16 if narrow else Dtype.FLOAT32
        automatic = 2 if dtype is Dtype.BFLOAT16 or self.offload_optimizer else 0
        again = self.gradient_checkpointing
        return replace(
            self,
            dtype=dtype,
            zero_stage=automatic if isinstance(self.zero_stage, Auto) else self.zero_stage,
            gradient_checkpointing=on_gpu if isinstance(again, Auto) else again,
        )

    @property
    def stage(self) -> int:
        """`zero_stage` of settings that are decided."""
        assert not isinstance(self.zero_stage, Auto), "AUTO is decided when a run is planned"
        return self.zero_stage

    @property
    def checkpointed(self) -> bool:
        """`gradient_checkpointing` of settings that are decided."""
        assert not isinstance(self.gradient_checkpointing, Auto), "AUTO is decided when a run is planned"
        return self.gradient_checkpointing

    @property
    def packed_tokens(self) -> int:
        """`tokens_per_microbatch` of settings that are decided."""
        assert not isinstance(self.tokens_per_microbatch, Auto), "AUTO is decided when a run is planned"
        return self.tokens_per_microbatch


def learning_rate(config: LearnerConfig, update: int, total: int) -> float:
    """The rate of update number `update` (from 0) of `total`; a pure function, so resuming needs the number alone."""
    return rate(
        config.schedule,
        update,
        total,
        lr=config.lr,
        warmup=config.warmup_steps,
        decay=config.decay_steps,
        floor=config.final_lr_fraction,
    )


STREAMED = 1 << 18  # bytes from which a copy in host memory goes past the caches, and of the pieces of such a copy


def environment(device: Device) -> dict[str, str]:
    """Environment a rank's process must start with, before it imports torch."""
    common = {
        # A rank has about one core on CPU and little to do there on GPU; more threads only fight over it.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Nothing here is compiled, but DeepSpeed decorates a helper, which loads the whole compiler at start.
        "TORCHDYNAMO_DISABLE": "1",
        # Asked for by torch.use_deterministic_algorithms on CUDA; without effect elsewhere.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    host = {
        # glibc gives every large tensor back to the kernel and asks for it again: 5000 page faults in a step
        # of the shop task, a twentieth of its time. Keep the memory (32 MiB is the most that glibc accepts).
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_TOP_PAD_": str(2**26),
        # glibc's own bound is three quarters of the last cache, hundreds of MiB on servers. Published weights are
        # read by other processes, not here: copied and digested that way they cost a quarter less (docs/benchmarks.md).
        "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={STREAMED}",
    }
    if device is Device.GPU:
        return common
    if device is Device.AUTO:
        return common | host
    return common | host | {"DS_ACCELERATOR": "cpu"}
