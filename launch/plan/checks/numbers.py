"""Compatibility of the dtypes of engine, learner and teachers."""

from actors.config import StudentConfig
from launch.config.run_config import RunConfig
from opd.errors import ConfigurationError
from opd.settings.devices import Device, Dtype, on_gpu
from opd.settings.validation import spelled
from teacher_service.config import TeacherConfig

_DECIDED = ("dtype", "zero_stage", "gradient_checkpointing")
FINEST = {Dtype.FLOAT32: 1e-6, Dtype.BFLOAT16: 2.0**-7}
"""Nats by which two right programs differ at least on some text, by the coarser of their dtypes: one unit in the last
place of a logit near 1."""


def check_numbers(config: RunConfig) -> None:
    """Refuse a tolerance between engine and learner that correct weights could not keep."""
    tolerance, coarser = config.learner.sentinel_tolerance, coarsest(engine_dtype(config), config.learner.dtype)
    if tolerance and tolerance < FINEST[coarser]:
        raise ConfigurationError(
            f"learner.sentinel_tolerance={tolerance} asks engine and learner to agree more closely than "
            f"{coarser.name} can (about {FINEST[coarser]:.2g} nats; student.dtype is {config.student.dtype.name}, "
            f"learner.dtype {config.learner.dtype.name}); leave it 0, which measures it when the run starts, or set "
            "both dtypes to FLOAT32"
        )


def numbers_notes(config: RunConfig) -> list[str]:
    """Notes on other numbers in the engine than in the learner, float32 on a GPU, and copies that spare nothing."""
    engine, learner, notes = engine_dtype(config), config.learner.dtype, list[str]()
    if engine is not learner:
        notes.append(
            f"the engine writes in {engine.name}, the learner reads in {learner.name}: their log-probabilities differ "
            "by rounding, which importance ratios count as a difference of policies; student.dtype="
            f"{learner.name} makes them equal"
        )
    if learner is Dtype.FLOAT32 and on_gpu(config.learner.device):
        notes.append(
            "the learner computes in FLOAT32 on a GPU, which is several times slower than BFLOAT16 and takes twice the "
            "memory; learner.dtype=BFLOAT16 learner.zero_stage=2 keeps float32 master weights"
        )
    if config.learner.offload_optimizer and not on_gpu(config.learner.device):
        notes.append(
            "learner.offload_optimizer=true spares memory of a GPU, but the learner works on a processor, whose memory "
            "holds all of it anyway, and some copies besides"
        )
    return notes


def decided_notes(given: RunConfig, config: RunConfig) -> tuple[str, ...]:
    """Note on what a GPU has decided about the learner: settings that are AUTO in `given`."""
    was, now = given.learner, config.learner
    decided = [name for name in _DECIDED if getattr(was, name) is not getattr(now, name)]
    if now.device is not Device.GPU or not decided:
        return ()
    why = ", and student.dtype is FLOAT32" if "dtype" in decided and now.dtype is Dtype.FLOAT32 else ""
    told = " ".join(f"learner.{name}={spelled(getattr(now, name))}" for name in decided)
    return (f"the learner works on a GPU{why}; so {told} (AUTO in the learner's settings; told, they stay)",)


def narrow(*dtypes: Dtype) -> bool:
    """Whether one of them is bfloat16."""
    return coarsest(*dtypes) is Dtype.BFLOAT16


def coarsest(*dtypes: Dtype) -> Dtype:
    """The dtype with the fewest digits."""
    return Dtype.BFLOAT16 if Dtype.BFLOAT16 in dtypes else Dtype.FLOAT32


def engine_dtype(config: RunConfig) -> Dtype:
    """The dtype of the rollout engines of a run whose devices are decided (`launch.plan.checks.devices.resolved`)."""
    return part_dtype(config.student)


def part_dtype(part: StudentConfig | TeacherConfig) -> Dtype:
    """FLOAT32 or BFLOAT16: the dtype of a part on its device."""
    if part.dtype is not Dtype.AUTO:
        return part.dtype
    return Dtype.BFLOAT16 if on_gpu(part.device) else Dtype.FLOAT32
