"""Roofline: least time and traffic of a step from model shapes, lengths and hardware.

The equations are those of docs/performance.md ("The roofline"), under the names used there: FORWARD, ROLLOUT,
TEACHER, LEARNER, PUSH, STEP. Everything here is a lower bound of what hardware could do, never an estimate of
what software does: kernels at peak rate, perfect overlap inside a device, no queue, no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from opd.errors import ConfigurationError

FORWARD = 2  # operations per parameter and token: one multiplication, one addition
TRAIN = 3 * FORWARD  # forward and backward, which is twice the forward pass
ADAM_BYTES = 30.0  # read and written per parameter: float32 master and two moments, gradient, 16-bit copy


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Model sizes in the equations: `params` counts all matrices a token is multiplied with, the output matrix included
    and a separate input embedding not (it is looked up).

    Example, Qwen3-8B: `ModelShape(params=7_570_000_000, layers=36, width=4096, vocabulary=151_936, heads=32,
    kv_heads=8, head_dim=128)`.
    """

    params: int
    layers: int
    width: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.params, self.layers, self.width, self.vocabulary, self.heads, self.kv_heads, self.head_dim) < 1:
            raise ConfigurationError(f"a model shape needs numbers >= 1, but got {self}; correct the field below 1")
        if self.params < self.head_params:
            raise ConfigurationError(
                f"a model shape needs params that include its output matrix of {self.head_params}, but got "
                f"params={self.params}; count all matrices"
            )

    @property
    def head_params(self) -> int:
        """`HV`: the output matrix."""
        return self.width * self.vocabulary

    def forward_flops(self, seen: Float[np.ndarray, " _n"], new: Float[np.ndarray, " _n"], logits: float) -> float:
        """FORWARD: `2(N-HV)x + 2Lq((a+x)^2 - a^2) + 2HVh`, summed over sequences.

        `seen` (a) tokens are in the cache, `new` (x) tokens are read; `logits` (h) positions in all need logits.
        """
        attended = ((seen + new) ** 2 - seen**2).sum()
        body = FORWARD * (self.params - self.head_params) * new.sum()
        return float(
            body + 2.0 * self.layers * self.heads * self.head_dim * attended + FORWARD * self.head_params * logits
        )

    def cache_bytes(self, seen: Float[np.ndarray, " _n"], new: Float[np.ndarray, " _n"], width: float) -> float:
        """Bytes of keys and values read to write `new` tokens one after another: `Lk b((a+x)^2 - a^2)`."""
        attended = ((seen + new) ** 2 - seen**2).sum()
        return float(self.layers * self.kv_heads * self.head_dim * width * attended)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device: peak operations/s (F), memory bytes/s (B), bytes/s of the link to others (C).

    Example, an H200 on a 400 Gbit/s network: `Hardware(flops=989e12, memory=4.8e12, link=50e9)`. On a CPU measure F
    with a matrix product of the model's shape and B with a copy, in the run that is to be compared.
    """

    flops: float
    memory: float
    link: float

    def __post_init__(self) -> None:
        if not min(self.flops, self.memory, self.link) > 0:
            raise ConfigurationError(
                f"hardware needs rates > 0, but got {self}; give flops, memory and link per second"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of one step's sequences: `prompt[i]` and `response[i]`; `group` of them share each prompt."""

    prompt: Int[np.ndarray, " _n"]
    response: Int[np.ndarray, " _n"]
    group: int = 1

    def __post_init__(self) -> None:
        wrong = len(self.prompt) != len(self.response) or not len(self.prompt) or self.group < 1
        if wrong or self.prompt.min() < 0 or self.response.min() < 0:
            raise ConfigurationError(
                "lengths need as many prompts as responses, all >= 0, in groups of at least 1, but got "
                f"{len(self.prompt)} prompts and {len(self.response)} responses in groups of {self.group}; correct "
                "what differs"
            )

    @property
    def p(self) -> Float[np.ndarray, " _n"]:
        """Prompt lengths as floats: their squares do not fit into 32 bits."""
        return self.prompt.astype(np.float64)

    @property
    def r(self) -> Float[np.ndarray, " _n"]:
        """Response lengths as floats."""
        return self.response.astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Decoding parameters: `slots` sequences per engine at once; bytes of a weight (FP8: 1) and of a cached number."""

    slots: int
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFloor:
    """Seconds: `prefill`, and decoding if operations (`compute`) or bytes (`memory`) were all that counts."""

    prefill: float
    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        """ROLLOUT: `T >= Fp/F + max(Fd/F, Bd/B)`. The maximum of sums is below the sum of each step's maximum."""
        return self.prefill + max(self.compute, self.memory)


def decode_steps(lengths: Lengths, slots: int) -> float:
    """ROLLOUT: `S >= max(max_i r_i, sum_i r_i / slots)`: the longest response, or the full batches of all."""
    return float(max(lengths.r.max(), lengths.r.sum() / slots))


def rollout(
    model: ModelShape, lengths: Lengths, hardware: Hardware, decoding: Decoding, engines: int = 1
) -> RolloutFloor:
    """ROLLOUT of a step shared evenly by `engines`: a group's prompt is read once, and the longest response bounds from
    below how often at least one engine reads its weights.
    """
    zero = np.zeros_like(lengths.p)
    once = model.forward_flops(zero, lengths.p, float(len(lengths.p))) / lengths.group
    written = model.forward_flops(lengths.p, lengths.r, float(lengths.r.sum()))
    weights = decode_steps(lengths, decoding.slots * engines) * model.params * decoding.weight_bytes
    cache = model.cache_bytes(lengths.p, lengths.r, decoding.cache_bytes) / engines
    return RolloutFloor(
        prefill=once / (engines * hardware.flops),
        compute=written / (engines * hardware.flops),
        memory=(weights + cache) / hardware.memory,
    )


def teacher(
    model: ModelShape, lengths: Lengths, hardware: Hardware, actors: int = 1, *, sends_hidden: bool = False
) -> float:
    """TEACHER: `fwd(t, 0->p+r, r)/F` in seconds; logits on response rows only, none if hidden states are sent."""
    logits = 0.0 if sends_hidden else float(lengths.r.sum())
    return model.forward_flops(np.zeros_like(lengths.p), lengths.p + lengths.r, logits) / (actors * hardware.flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCost:
    """Learner parameters: `ranks`, ZeRO `stage`, whether activations are computed again (`recompute`), bytes of a sent
    number, micro-batches a step, and output matrices of teachers whose hidden states are read here (`teacher_head`:
    parameters).
    """

    ranks: int = 1
    stage: int = 0
    recompute: bool = False
    number_bytes: float = 2.0
    microbatches: int = 1
    teacher_head: int = 0


def zero_bytes(model: ModelShape, training: UpdateCost) -> float:
    """LEARNER: bytes a rank sends per step, `2Nb` up to stage 2 and `3Nb` per micro-batch in stage 3, by rings.

    A ring of `R` ranks sends `(R-1)/R` of it: a single rank sends nothing.
    """
    rounds = 3 * training.microbatches if training.stage == 3 else 2
    return rounds * model.params * training.number_bytes * (training.ranks - 1) / training.ranks


def learner(model: ModelShape, lengths: Lengths, hardware: Hardware, training: UpdateCost) -> float:
    """LEARNER: `(3 + recompute) fwd(s, 0->p+r, r)/F + 30N/(DP B)` in seconds; traffic may hide behind computing."""
    logits = float(lengths.r.sum())
    passes = TRAIN // FORWARD + training.recompute
    flops = passes * model.forward_flops(np.zeros_like(lengths.p), lengths.p + lengths.r, logits)
    flops += FORWARD * training.teacher_head * logits
    computing = flops / (training.ranks * hardware.flops)
    optimizer = ADAM_BYTES * model.params / (training.ranks * hardware.memory)
    return max(computing, zero_bytes(model, training) / hardware.link) + optimizer


def dense_bytes(model: ModelShape, weight_bytes: float = 2.0) -> float:
    """PUSH: all weights."""
    return model.params * weight_bytes


def push(nbytes: float, hardware: Hardware, receivers: int = 1, chunks: int = 64) -> float:
    """PUSH: `bytes/min(C, B) * (1 + (R-1)/chunks)` in seconds: a pipelined chain is flat in receivers."""
    return nbytes / min(hardware.link, hardware.memory) * (1 + (receivers - 1) / chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """Least seconds of each role for one step, on the devices it has."""

    rollout: float
    teacher: float
    learner: float
    push: float

    @property
    def lock_step(self) -> float:
        """STEP, one role after another: `T = T_roll + T_teach + T_learn + T_push`."""
        return self.rollout + self.teacher + self.learner + self.push

    @property
    def overlapped(self) -> float:
        """STEP, all roles at once: `T >= max` over roles."""
        return max(self.rollout, self.teacher, self.learner, self.push)


def balanced(work: Sequence[float], devices: int) -> float:
    """STEP: `T* = sum(work)/G`, the step if every device could do the work of every role."""
    return sum(work) / devices


def best_split(work: Sequence[float], devices: int) -> tuple[int, ...]:
    """STEP: whole devices per role with the smallest `max(work/n)`; the next device goes where it is slowest.

    `work` is device-seconds of a step per role; every role gets one device. Ties go to the earlier role.
    """
    if devices < len(work):
        raise ConfigurationError(
            f"a split needs a device for each of {len(work)} roles, but got {devices}; give more devices"
        )
    split = [1] * len(work)
    for _ in range(devices - len(work)):
        slowest = max(range(len(work)), key=lambda i: (work[i] / split[i], -i))
        split[slowest] += 1
    return tuple(split)
