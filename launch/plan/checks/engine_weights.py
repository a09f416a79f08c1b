"""Weights that vLLM must divide among GPUs, or read in a quantized form."""

from hf.folder import text_config
from hf.folder_check import Folder
from hf.quantized import READ, quantization, quantized_head
from launch.config.run_config import RunConfig, teacher_key
from launch.plan.checks.devices import writers_of
from launch.plan.checks.numbers import engine_dtype, part_dtype
from launch.plan.environment import instructions
from launch.plan.memory.shapes import read_shape, uneven
from opd.errors import ConfigurationError
from opd.ports import LastHidden
from opd.settings.devices import Dtype, on_gpu
from teacher_service.config import OWN_ENGINE, REMOTE, TeacherConfig


def check_divided(path: str, number: int, key: str) -> None:
    """Refuse a model that cannot be divided among `number` devices."""
    if number == 1:
        return
    shape = read_shape(path)
    if wrong := uneven(shape, number):
        fits = [str(n) for n in (2, 4, 8, 16) if not uneven(shape, n)]
        few = f"set it to {' or '.join(fits)}" if fits else "set it to 1"
        raise ConfigurationError(
            f"{key}.tensor_parallel={number} divides each layer among {number} devices, but {path!r} has {wrong}; {few}"
        )


def check_quantized(config: RunConfig, name: str, folder: Folder) -> None:
    """Refuse a quantized teacher that its backend, or a part of the run that reads its weights, cannot use."""
    teacher, key = config.teachers[name], teacher_key(name)
    raw = text_config(teacher.path, folder.part)
    known = quantization(raw, folder.part)
    if known is None:
        return
    has = f"{folder.part} has quantized weights (quant_method {known.method!r})"
    if LastHidden in teacher.supports and folder.stored:
        _check_head(folder, has, tied=bool(raw.get("tie_word_embeddings")))
    if teacher.backend in REMOTE:
        return
    if teacher.backend not in OWN_ENGINE:
        raise ConfigurationError(
            f"{has}, which {key}.backend={teacher.backend.name} does not read; set {key}.backend=VLLM, or choose the "
            "unquantized model"
        )
    if known.method not in READ:
        raise ConfigurationError(
            f"{has}, but an engine reads {', '.join(READ)} here; choose such a checkpoint, or the unquantized model"
        )
    _check_dtypes(config, teacher, has, key, writes=name in writers_of(config))
    if known.fp8_blocks and not on_gpu(teacher.device) and config.cluster.address == "local":
        _check_processor(has, key)


def _check_processor(has: str, key: str) -> None:
    """Refuse blocks of FP8 on this machine's processor where vLLM has no way to multiply them."""
    if "amx_tile" not in instructions():
        raise ConfigurationError(
            f"{has} in blocks of FP8, which vLLM multiplies on a processor only with AMX (Sapphire Rapids and later), "
            f"and this machine's has none; set {key}.device=GPU, serve it elsewhere ({key}.backend=HTTP), or choose "
            "the unquantized model or one of integers (W8A8, AWQ)"
        )


def _check_head(folder: Folder, has: str, *, tied: bool) -> None:
    """Refuse a quantized output matrix: hidden states are multiplied with it outside the engine."""
    if wrong := quantized_head(folder.stored, tied=tied):
        raise ConfigurationError(
            f"{has}, its output matrix among them ({wrong}), which is needed plain where hidden states become "
            "logits; set its backend to VLLM_LOGPROBS, or choose a checkpoint whose lm_head is not quantized"
        )


def _check_dtypes(config: RunConfig, teacher: TeacherConfig, has: str, key: str, *, writes: bool) -> None:
    if part_dtype(teacher) is not Dtype.BFLOAT16:
        raise ConfigurationError(f"{has}, which are computed with in BFLOAT16; set {key}.dtype=BFLOAT16")
    if writes and engine_dtype(config) is not Dtype.BFLOAT16:
        raise ConfigurationError(
            f"{has} and writes for the method in an engine of the student's settings, which needs BFLOAT16 for them; "
            "set student.dtype=BFLOAT16"
        )
