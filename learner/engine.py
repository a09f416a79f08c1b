"""Calls of DeepSpeed and torch.distributed: joining ranks, partitioning a model, gathering it."""

import contextlib
import faulthandler
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, cast

import deepspeed
import torch
from deepspeed.comm import comm
from deepspeed.runtime.engine import DeepSpeedEngine
from jaxtyping import Float64
from torch import Tensor, distributed, nn

from learner.config import LearnerConfig
from learner.model import Student
from learner.published import Published, full_shape
from opd.errors import ConfigurationError, OpdError
from opd.settings.devices import Dtype
from weight_sync.parking import park, tensors_in
from weight_sync.rendezvous import meeting_place

_GRACE_S = 30.0  # what the library's own timeouts may be late by


def configure_torch(config: LearnerConfig, device: torch.device, seed: int) -> None:
    """Set torch up in this process: threads, seed, determinism, and no warnings that do not apply here."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    elif config.offload_optimizer:  # the update is the host's work; `learner.config.environment` leaves it one core
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.ranks))
    torch.manual_seed(seed)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Arrays out of an object store are read-only, and we only read them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    # DeepSpeed's own calls; one line per bucket and step otherwise.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def join(rank: int, world: int, host: str, port: int, device: torch.device, deadline_s: float) -> None:
    """Enter the process group of all ranks; every wait in it, this one included, ends after `deadline_s` seconds.

    Raises `OpdError` if the others do not come; a wait that cannot be interrupted ends the process.
    """
    # One device is visible to a process (Ray hides the others), hence local rank 0 everywhere.
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    # DeepSpeed would compile this op on CPU (44 s, and it needs a compiler); gloo does the same job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _ending_within(deadline_s + _GRACE_S):
        try:
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=deadline_s),
                init_method=meeting_place(host, port),
                rank=rank,
                world_size=world,
                verbose=False,
            )
        except (RuntimeError, OSError) as error:  # torch's own classes for stores and networks derive from it
            raise OpdError(
                f"learner rank {rank} of {world} could not meet the other ranks at {host}:{port} within "
                f"{deadline_s:.0f} s ({str(error).splitlines()[0]}); look at their logs, or raise learner.deadline_s"
            ) from error
    _bound_subgroups(deadline_s)


def _bound_subgroups(deadline_s: float) -> None:
    """Give DeepSpeed's groups the deadline too: it creates them without one, and torch's own is 30 minutes."""
    backend: Any = comm.cdb
    backend.new_group = lambda ranks: distributed.new_group(ranks, timeout=timedelta(seconds=deadline_s))


@contextlib.contextmanager
def _ending_within(seconds: float) -> Iterator[None]:
    """End this process, with the stacks of all threads on stderr, if the block takes longer.

    The store's timeout covers a peer that never comes. On GPUs DeepSpeed also binds the group to a device, and then
    NCCL connects at once, in a call that has no timeout of its own and that no exception can interrupt: a peer that
    dies in it would leave this rank there for ever.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def initialize(student: Student, config: LearnerConfig, device: torch.device) -> DeepSpeedEngine:
    """The student under DeepSpeed: optimizer, ZeRO, mixed precision. Moves it to `device`."""
    student.to(device)  # what `divide` has divided is there already
    optimizer = adam(student, config)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=_settings(config, _numel(student)))
    if config.ranks == 1 and config.stage == 0:
        engine.enable_backward_allreduce = False  # would copy all gradients twice to add nothing
    return engine


def adam(student: nn.Module, config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; one fused kernel on CPUs and GPUs alike.

    Never DeepSpeed's own choice: its fused_adam wants a compiler. An update that is not fused would have two numbers a
    parameter in temporaries.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(full_shape(p)) > 1]
    others = [p for p in trained if len(full_shape(p)) <= 1]
    if config.weight_decay:  # gains and biases are not decayed; otherwise one group, which is cheaper
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": matrices + others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _numel(student: Student) -> int:
    return sum(math.prod(full_shape(p)) for p in student.parameters())


def divide(student: Student, values: Callable[[nn.Parameter], Tensor], config: LearnerConfig) -> None:
    """Divide parameters among ranks one by one, as ZeRO-3 has them, each filled on the first rank just before.

    `values` gives a whole parameter on its device; what other ranks have of it does not matter.
    """
    settings, first = _settings(config, _numel(student)), None
    for parameter in student.parameters():
        parameter.data = values(parameter)
        if first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=settings, dtype=parameter.dtype
            )
            first = cast(Any, parameter)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])


def _settings(config: LearnerConfig, numel: int) -> dict[str, Any]:
    bucket = min(500_000_000, numel)  # DeepSpeed's default, but no buffer larger than the model
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # we say ourselves which micro-batch is the last
        # Without ZeRO DeepSpeed would clip without telling the norm, so `apply` does it.
        "gradient_clipping": config.grad_clip if config.stage else 0.0,
        "zero_optimization": {
            "stage": config.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # `adam` says why
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }
    if config.offload_optimizer:  # a CPU's accelerator pins nothing
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.dtype is Dtype.BFLOAT16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}  # many micro-batches add up
    return settings


def apply(engine: DeepSpeedEngine, config: LearnerConfig, lr: float) -> float:
    """Clip, take the optimizer's step at rate `lr`, clear the gradients; returns the norm before clipping.

    A norm that is not finite leaves weights and optimizer as they were.
    """
    optimizer: Any = engine.optimizer  # a wrapper of ours, or ours itself
    for group in optimizer.param_groups:
        group["lr"] = lr
    if config.stage:
        engine.step()
        if optimizer.overflow:  # and DeepSpeed has dropped the step
            if config.offload_optimizer:  # but not the sum of its gradients, to which the next ones would be added
                optimizer.averaged_gradients.clear()
            return math.inf
        known = engine.get_global_grad_norm()
        assert known is not None, "DeepSpeed computes the norm under every ZeRO stage"
        return float(known)
    parameters = [p for p in cast(Student, engine.module).parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    value = float(norm)
    if math.isfinite(value):
        engine.step()
    else:
        optimizer.zero_grad()
    return value


def offload(
    engine: DeepSpeedEngine, config: LearnerConfig, heads: Sequence[Tensor], device: torch.device
) -> Callable[[], None]:
    """Move model, optimizer and `heads` from the GPU to host memory, on a CPU to a file; returns what moves them back.

    What `offload_optimizer` keeps in host memory stays as it is. Frozen parameters that ZeRO-3 has taken apart stay on
    a GPU.

    Raises:
        ConfigurationError: DeepSpeed cannot move this optimizer.
    """
    zero_stage = config.stage
    # DeepSpeed's own way would move an optimizer that is on the host to the GPU, and refuses ours under ZeRO-3.
    if device.type == "cpu" or config.offload_optimizer or zero_stage == 3:
        kept = {_place(tensor) for tensor in on_host(engine, config)}
        return park([*(tensor for tensor in _held(engine, device) if _place(tensor) not in kept), *heads]).unpark
    if zero_stage and not hasattr(engine.optimizer, "offload_states"):
        raise ConfigurationError(
            f"offload needs an optimizer that DeepSpeed can move, but learner.zero_stage={zero_stage} in bfloat16 has "
            "another; set learner.zero_stage=2 or 3"
        )
    host = torch.device("cpu")
    if zero_stage:
        engine.offload_states()
    _move_the_rest(engine, zero_stage, heads, host)
    torch.cuda.empty_cache()
    return partial(_reload, engine, zero_stage, heads, device)


def on_host(engine: DeepSpeedEngine, config: LearnerConfig) -> list[Tensor]:
    """Tensors that DeepSpeed keeps in host memory through a step: masters, moments, gradients and its buffers."""
    if not config.offload_optimizer:
        return []
    outer: Any = engine.optimizer
    moments = [value for state in outer.optimizer.state.values() for value in state.values()]
    if config.stage == 3:
        masters, buffers = outer.fp32_partitioned_groups_flat, [outer.grad_partitions_flat_buffer]
    else:
        masters = outer.single_partition_of_fp32_groups
        buffers = [*outer.param_buffer_of_bit16_for_cpu_offload_groups, outer.temp_grad_buffer_for_cpu_offload]
        buffers += outer.accumulated_grads_in_cpu.values()
    gradients = [master.grad for master in masters if master.grad is not None]
    return [*masters, *gradients, *moments, *buffers]


def _held(engine: DeepSpeedEngine, device: torch.device) -> Iterator[Tensor]:
    """Every tensor that model and optimizer hold on `device` on this rank, gradients included."""
    module = cast(nn.Module, engine.module)
    found = tensors_in([list(module.parameters()), list(module.buffers()), engine.optimizer, engine])
    return (tensor for tensor in found if tensor.device.type == device.type)


def _place(tensor: Tensor) -> int:
    """Address of a tensor's storage, which its views have in common with it."""
    return tensor.untyped_storage().data_ptr()


def _reload(engine: DeepSpeedEngine, zero_stage: int, heads: Sequence[Tensor], device: torch.device) -> None:
    if zero_stage:
        engine.reload_states()
    _move_the_rest(engine, zero_stage, heads, device)


def _move_the_rest(engine: DeepSpeedEngine, zero_stage: int, heads: Sequence[Tensor], device: torch.device) -> None:
    """Move what DeepSpeed's own functions leave: heads, frozen parameters, and without ZeRO everything."""
    module = cast(nn.Module, engine.module)
    for head in heads:
        head.data = head.data.to(device)
    for parameter in module.parameters():
        if zero_stage == 0 or (zero_stage < 3 and not parameter.requires_grad):
            parameter.grad = None
            parameter.data = parameter.data.to(device)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    if zero_stage == 0:
        optimizer: Any = engine.optimizer
        for state in optimizer.state.values():
            state.update({key: value.to(device) for key, value in state.items() if key != "step"})


@contextlib.contextmanager
def whole(parameters: Sequence[nn.Parameter], zero_stage: int) -> Iterator[list[Tensor]]:
    """The full values of `parameters` on every rank, for reading; all ranks must enter."""
    if zero_stage == 3:
        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield [p.data for p in parameters]
    else:
        yield [p.data for p in parameters]


@contextlib.contextmanager
def complete(chosen: Sequence[Published], zero_stage: int) -> Iterator[list[Tensor]]:
    """The full values of `chosen` on every rank, for reading; all ranks must enter."""
    parameters = list({id(one.parameter): one.parameter for one in chosen}.values())
    with whole(parameters, zero_stage) as tensors:
        values = {id(parameter): value for parameter, value in zip(parameters, tensors, strict=True)}
        yield [
            values[id(one.parameter)] if one.piece is None else one.piece.of(values[id(one.parameter)])
            for one in chosen
        ]


def sum_over_ranks(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """The sum over all ranks, on every rank."""
    if distributed.get_world_size() > 1:
        distributed.all_reduce(values)
    return values


def max_over_ranks(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """The greatest over all ranks, on every rank."""
    if distributed.get_world_size() > 1:
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    distributed.barrier()


def leave(engine: DeepSpeedEngine) -> None:
    """Give up the model and the process group, if that has not happened."""
    if distributed.is_initialized():
        engine.destroy()
        distributed.destroy_process_group()
