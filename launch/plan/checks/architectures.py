"""Architectures of student and teachers, built on the meta device before anything is started."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from hf.folder_check import Folder, read_folder
from hf.packable import check_head, check_layers, unlike
from hf.weight_names import stored_names, stored_pieces
from launch.config.run_config import RunConfig, teacher_key
from launch.plan.checks.engine_weights import check_divided, check_quantized
from launch.plan.checks.engines import check_head_width, check_updates
from launch.plan.checks.numbers import narrow, part_dtype
from launch.plan.checks.survey import Survey
from opd.errors import ConfigurationError, DataError
from opd.loss.packed_attention import Packing, attend, mask
from opd.ports import LastHidden
from teacher_service.config import REMOTE, Backend

_REHEARSAL = "opd_rehearsal"


def check_student(config: RunConfig) -> Folder:
    """Refuse a student that learner or engine could not use; returns the folder as it was read."""
    folder = read_folder(config.student.path, "student")
    causal, part = folder.causal, folder.part
    if getattr(causal.config, "quantization_config", None):
        raise ConfigurationError(f"{part} has quantized weights, which cannot be trained; choose the unquantized model")
    check_layers(causal, part)
    _rehearse(folder)
    check_head(causal, part, bias=False)
    stored_names(causal, folder.stored, part)
    check_updates(folder)
    check_head_width(folder, config.student.device)
    check_divided(config.student.path, config.student.tensor_parallel, "student")
    return folder


def check_teacher(config: RunConfig, name: str) -> Folder:
    """Refuse a teacher whose backend could not use it; a remote one counts where its weights are read here."""
    teacher, requires = config.teachers[name], config.method.requires
    folder = read_folder(teacher.path, teacher_key(name))
    if teacher.backend is Backend.TORCH:
        check_layers(folder.causal, folder.part)
        _rehearse(folder)
    if teacher.backend in (Backend.TORCH, Backend.VLLM) or (folder.stored and LastHidden in requires):
        # Where the vocabulary is made elsewhere than in the model, a bias would be lost.
        check_head(folder.causal, folder.part, bias=teacher.backend is Backend.TORCH and LastHidden not in requires)
    if teacher.backend not in (Backend.TORCH, *REMOTE):
        check_head_width(folder, teacher.device)
    check_quantized(config, name, folder)
    check_divided(teacher.path, teacher.tensor_parallel, teacher_key(name))
    return folder


def check_followers(config: RunConfig, student: Folder, teachers: Mapping[str, Folder]) -> None:
    """Refuse a teacher that is to follow the student and cannot load the weights it publishes."""
    for name, folder in teachers.items():
        teacher, key = config.teachers[name], teacher_key(name)
        if not teacher.mixup:
            continue
        if teacher.mixup < 1 and narrow(part_dtype(teacher)):
            raise ConfigurationError(
                f"{folder.part} follows the student (mixup={teacher.mixup}), a moving average, which needs float32 (a "
                f"small share of a change vanishes in bfloat16); set {key}.dtype=FLOAT32"
            )
        if wrong := unlike(folder.causal, _published(student)):
            raise ConfigurationError(
                f"{folder.part} follows the student (mixup={teacher.mixup}), which publishes its weights under the "
                f"names of its folder; {wrong[0]!r} and {len(wrong) - 1} more have another name or shape there than in "
                f"a {type(folder.causal).__name__}; set {key}.mixup=0, or, if the architectures differ, "
                f"{key}.path to a copy of the student's checkpoint"
            )


def _published(student: Folder) -> Mapping[str, Sequence[int]]:
    """Names and shapes of what a student publishes."""
    kept = stored_names(student.causal, student.stored, student.part)
    pieces = stored_pieces(student.causal, student.stored)
    shapes = {kept[own]: p.shape for own, p in student.causal.named_parameters() if own not in pieces}
    return shapes | {piece.name: student.stored[piece.name].shape for cut in pieces.values() for piece in cut}


def check_contexts(config: RunConfig, teachers: Mapping[str, Folder], longest: int, *found: Survey) -> None:
    """Refuse a teacher that cannot read the longest sequence."""
    longest = max(longest, *(survey.longest_for_teacher[0] + config.max_tokens for survey in found))
    for folder in teachers.values():
        if folder.context and longest > folder.context:
            raise ConfigurationError(
                f"{folder.part} reads at most {folder.context} tokens (max_position_embeddings in its config.json, "
                f"with its rope scaling), but a sequence may have {longest}; lower max_tokens, shorten the prompts, or "
                "choose another teacher"
            )


def check_ids(folders: Sequence[Folder], *found: Survey) -> None:
    """Refuse a prompt with a token that a model has no row for."""
    highest, where = max((survey.highest for survey in found), key=lambda pair: pair[0])
    for folder in folders:
        rows = folder.causal.get_output_embeddings().weight.shape[0]
        if highest >= rows:
            raise DataError(
                f"{where} has the token {highest}, but {folder.part} has an output matrix of {rows} rows; its "
                "tokenizer has tokens that the model was never given, so choose another, or resize the model"
            )


_REHEARSED = set[str]()  # configurations that went well in this process, which plans several runs of a comparison


def _rehearse(folder: Folder) -> None:
    """Run one forward pass on the meta device, which shows each layer's use of packed attention."""
    causal, called = folder.causal, []
    if (configuration := causal.config.to_json_string()) in _REHEARSED:
        return

    def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        return attend(module, *args, **kwargs)

    AttentionInterface.register(_REHEARSAL, watched)
    AttentionMaskInterface.register(_REHEARSAL, mask)
    causal.set_attn_implementation(_REHEARSAL)
    if causal._can_set_experts_implementation():
        causal.set_experts_implementation("batched_mm")  # the others look at numbers
    ids, places = torch.ones(1, 4, dtype=torch.long, device="meta"), torch.arange(4, device="meta")[None]
    try:
        with torch.no_grad():
            causal.base_model(
                input_ids=ids,
                position_ids=places,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                packing=Packing.of(torch.tensor([0, 4])),
            )
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder.part} cannot be packed: {error}") from error
    layers = causal.config.get_text_config().num_hidden_layers
    if len(called) < layers:
        raise ConfigurationError(
            f"{folder.part} is a {type(causal).__name__}, of whose {layers} layers {layers - len(called)} have an "
            "attention of their own, which would not read packed sequences exactly; choose a model with full or "
            "sliding-window attention in every layer"
        )
    _REHEARSED.add(configuration)
