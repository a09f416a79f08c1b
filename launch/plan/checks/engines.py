"""Students and vLLM: which families its engines take new weights of, as the locked version does it."""

from collections.abc import Iterator

from actors.config import CPU_HEAD_SIZES
from hf.folder_check import Folder
from hf.packable import has_experts
from launch.config.run_config import RunConfig
from opd.errors import ConfigurationError
from opd.settings.devices import Device, on_gpu

TRIED = frozenset(
    {"arcee", "exaone4", "ernie4_5", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox"}
    | {"hunyuan_v1_dense", "hunyuan_v1_moe", "llama", "mistral", "mixtral", "olmo2", "olmo3", "olmoe", "opt", "phi3"}
    | {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"}
)
"""Kinds of models whose engine was compared with the learner after new weights (docs/models.md)."""


def check_updates(folder: Folder) -> None:
    """Refuse a student to whose engine vLLM could not give new weights, or that it does not start."""
    config, name, part = folder.causal.config.get_text_config(), type(folder.causal).__name__, folder.part
    if config.model_type == "gpt_oss":
        raise ConfigurationError(
            f"{part} is a {name}, whose experts and sinks vLLM loads past what takes new weights, so that its engine "
            "would keep the old ones; choose a student of another family, or make this one the teacher"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if config.model_type == "qwen2" and len(kinds) > 1 and config.max_window_layers != config.num_hidden_layers:
        raise ConfigurationError(
            f"{part} is a {name} with a sliding window in some layers (max_window_layers={config.max_window_layers} of "
            f"{config.num_hidden_layers}), for which vLLM has no engine; choose another student, or one that was "
            "trained with use_sliding_window=false"
        )


def check_head_width(folder: Folder, device: Device) -> None:
    """Refuse head widths that vLLM's CPU kernels do not have."""
    config = folder.causal.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if not on_gpu(device) and width and width not in CPU_HEAD_SIZES and not getattr(config, "kv_lora_rank", None):
        raise ConfigurationError(
            f"{folder.part} has attention heads of width {width}, which vLLM has no CPU kernel for (it has "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}); choose another model, or run its engine on a GPU"
        )


def engine_notes(config: RunConfig, folder: Folder) -> Iterator[str]:
    """Remarks on a student that is a mixture of experts, or of a kind that was not tried."""
    kind, experts = folder.causal.config.model_type, has_experts(folder.causal)
    if kind not in TRIED:
        yield (
            f"{folder.part}: no test compares vLLM's {kind} with the learner (docs/models.md); the sentinel does "
            "before the first step, and the run ends there if they differ"
        )
    if experts:
        adapted = "; adapters leave the experts as they are" if config.learner.lora.r else ""
        yield f"{folder.part}: a mixture of experts, trained without a loss that balances them{adapted}"
