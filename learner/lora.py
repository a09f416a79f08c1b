"""Adapters in place of whole parameters: PEFT's layers on a frozen student, and PEFT's files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf.packable import has_experts
from learner.config import LoraConfig
from learner.model import ADAPTER
from opd.errors import ConfigurationError
from weight_sync.lora import A, B

_ROOT = "base_model.model."  # what PEFT's files call the model that was wrapped


def adapt(causal: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze `causal` and put an adapter that does nothing yet (B = 0) on the chosen layers; A depends on `seed` alone.

    Of a mixture of experts `all-linear` is the attention: PEFT would take the experts' matrices, which are several in
    one parameter, for linear layers.

    Raises:
        ConfigurationError: no layer is called so, or one is not linear.
    """
    dtype = causal.dtype
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(_peft(config, _attention(causal)), causal, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigurationError(
            f"learner.lora.target_modules={config.target_modules!r} does not fit the student ({error}); name linear "
            "layers such as q_proj, or set all-linear"
        ) from error
    for name, module in causal.named_modules():
        if isinstance(module, BaseTunerLayer) and not (isinstance(module, Linear) and _is_plain(module)):
            raise ConfigurationError(
                f"learner.lora.target_modules names {name}, which is no linear layer; an engine merges adapters with "
                "matrices only, so name others"
            )
    for name, p in causal.named_parameters():
        p.requires_grad_(f".{ADAPTER}.weight" in name)
        if p.requires_grad:
            p.data = p.data.to(dtype)


def _is_plain(module: Linear) -> bool:
    return isinstance(module.get_base_layer(), torch.nn.Linear)


def _attention(causal: PreTrainedModel) -> list[str]:
    """Last names of the linear layers of a mixture of experts' attention; [] for a dense model."""
    linear = [name for name, module in causal.named_modules() if isinstance(module, torch.nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear if "attn" in name}) if has_experts(causal) else []


def save_adapter(
    folder: Path, config: LoraConfig, adapters: Mapping[str, Tensor], base: str, *, experts: bool = False
) -> None:
    """Write `adapters` (names of `weight_sync.lora`) so that `PeftModel.from_pretrained(base, folder)` reads them.

    `experts`: the student is a mixture of them, of which PEFT is told the names of the adapted layers.
    """
    folder.mkdir()
    layers = {name.removesuffix(end).rpartition(".")[2] for name in adapters for end in (A, B) if name.endswith(end)}
    described = _peft(config, sorted(layers) if experts else [])
    described.base_model_name_or_path, described.inference_mode = base, True
    described.save_pretrained(str(folder))
    tensors = {_ROOT + name: value.contiguous() for name, value in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft(config: LoraConfig, everything: Sequence[str]) -> PeftConfig:
    """PEFT's configuration; `everything` is what `all-linear` is ([]: as PEFT has it)."""
    chosen = list(config.target_modules)
    chosen = list(everything) if everything and chosen == ["all-linear"] else chosen
    return PeftConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it, and says int
        target_modules="all-linear" if chosen == ["all-linear"] else chosen,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
