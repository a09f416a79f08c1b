"""`python -m tests.moe_student FOLDER`: the student of the task `shop` as a mixture of experts.

Every expert of a layer is that layer's MLP with some noise, and a random router sends each token to two of four: a
Qwen3-MoE that writes about what the dense student does.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

DENSE = Path(__file__).resolve().parents[1] / "assets" / "shop" / "student"
EXPERTS, CHOSEN = 4, 2
_NOISE = 0.1  # of what a tensor scatters


def save_student(folder: Path, source: Path = DENSE) -> Qwen3MoeForCausalLM:
    """The mixture made of the dense student in `source`, saved in `folder` with its tokenizer, in float32."""
    dense = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("architectures", "model_type", "dtype")}
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "norm_topk_prob": True, "mlp_only_layers": []}
    experts |= {"decoder_sparse_step": 1, "moe_intermediate_size": dense.config.intermediate_size}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(fields | experts)))
    state = dense.state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            layer, _, last = name.partition(".experts.")
            if last:
                parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
                whole = torch.cat([state[f"{layer}.{part}.weight"] for part in parts])
                p.copy_(whole + _NOISE * whole.std() * torch.randn(p.shape))
            elif "mlp.gate" not in name:
                p.copy_(state[name])
            else:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    for file in source.glob("*token*.json"):
        shutil.copy(file, folder)
    shutil.copy(source / "generation_config.json", folder)
    return model


if __name__ == "__main__":
    save_student(Path(sys.argv[1]))
