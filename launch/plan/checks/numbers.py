"""Compatibility of the dtypes of engine, learner and teachers."""

from collections.abc import Mapping

from actors.config import StudentConfig
from hf.folder_check import Folder
from launch.config.run_config import RunConfig, teacher_key
from launch.plan.environment import instructions
from opd.errors import ConfigurationError
from opd.settings.devices import Device, Dtype, on_gpu
from opd.settings.validation import spelled
from teacher_service.config import REMOTE, TeacherConfig

_DECIDED = ("dtype", "zero_stage", "gradient_checkpointing")
FINEST = {Dtype.FLOAT32: 1e-6, Dtype.BFLOAT16: 2.0**-7}
"""Nats by which two right programs differ at least on some text, by the coarser of their dtypes: one unit in the last
place of a logit near 1."""
_FOR_BFLOAT16 = ("avx512_bf16", "amx_tile")
_PLAIN = {"F32", "F16", "BF16"}  # dtypes of safetensors that are no quantized numbers


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


def processor_notes(config: RunConfig, student: Folder, teachers: Mapping[str, Folder]) -> list[str]:
    """Notes on BFLOAT16 where this machine's processor computes it in FLOAT32, and where it could be gained by.

    How long both take was measured without such instructions (docs/benchmarks.md).
    """
    if config.cluster.address != "local":  # another machine's processor
        return []
    known = set(instructions())
    if not known.intersection(_FOR_BFLOAT16):
        return _slow(config, teachers)
    stored = {tensor.dtype for tensor in student.stored.values()}
    if "amx_tile" in known and stored == {"BF16"} and engine_dtype(config) is Dtype.FLOAT32:
        told = "student.dtype=BFLOAT16 learner.dtype=BFLOAT16"
        return [
            "this processor multiplies BFLOAT16 by AMX, and the student's weights are stored in it; "
            f"{told} may be faster, and rounds only what is computed (about {FINEST[Dtype.BFLOAT16]:.2g} nats a "
            "log-probability; the start of the run measures it)"
        ]
    return []


def _slow(config: RunConfig, teachers: Mapping[str, Folder]) -> list[str]:
    found = ["student.dtype"] if _narrow_on_processor(config.student) else []
    if config.learner.dtype is Dtype.BFLOAT16 and not on_gpu(config.learner.device):
        found.append("learner.dtype")
    for name, teacher in config.teachers.items():
        plain = {tensor.dtype for tensor in teachers[name].stored.values()} <= _PLAIN
        if plain and teacher.backend not in REMOTE and _narrow_on_processor(teacher):
            found.append(f"{teacher_key(name)}.dtype")
    if not found:
        return []
    told = " ".join(f"{key}=FLOAT32" for key in found)
    return [
        f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} BFLOAT16, for which this machine's processor has "
        f"no instructions ({' or '.join(_FOR_BFLOAT16)}): it takes two to four times as long as FLOAT32; set {told}, "
        "if memory has room for weights of twice the size"
    ]


def _narrow_on_processor(part: StudentConfig | TeacherConfig) -> bool:
    return not on_gpu(part.device) and part_dtype(part) is Dtype.BFLOAT16


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
