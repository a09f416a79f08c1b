"""Settings under which roles cannot take turns on their memory (`cluster.share=TIME`)."""

from launch.config.run_config import RunConfig
from launch.config.settings import Sharing
from learner.config import Transport
from opd.errors import ConfigurationError
from opd.loop.staleness import WeightUpdate
from opd.settings.devices import Device, Dtype


def no_turns(config: RunConfig) -> str:
    """Reason why roles of this run cannot take turns, and what to set; "" if they can."""
    learner, schedule = config.learner, config.staleness_schedule
    if learner.transport in (Transport.CUDA_IPC, Transport.NCCL):
        return (
            f"lets the learner sleep while engines load its weights, but learner.transport={learner.transport.name} "
            "reads them from its GPU; set learner.transport=AUTO"
        )
    stays = learner.offload_optimizer or learner.device is not Device.GPU
    if not stays and learner.stage == 1 and learner.dtype is Dtype.BFLOAT16:
        return (
            "moves the optimizer to host memory, which DeepSpeed cannot do with learner.zero_stage=1 in bfloat16; set "
            "learner.zero_stage=2, or learner.offload_optimizer=true"
        )
    if schedule.max_staleness and not schedule.deterministic and schedule.update is WeightUpdate.IN_FLIGHT:
        return (
            "lets engines finish their text before the learner works, so none is in flight when weights arrive, but "
            "weight_update=IN_FLIGHT wants it to be; set weight_update=DRAIN, or deterministic=true"
        )
    return ""


def check_turns(config: RunConfig) -> None:
    """Raise `ConfigurationError` if roles are to take turns and cannot."""
    reason = no_turns(config) if config.cluster.share is Sharing.TIME else ""
    if reason:
        raise ConfigurationError(f"cluster.share=TIME {reason}")
