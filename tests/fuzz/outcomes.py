"""What is to become of each family in `tests.fuzz.families`: the rows of the table in docs/models.md.

Tests compare every row with what the plan says and with what models and engines compute, and the table with the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

REASONS: Mapping[str, str] = {
    "logits scaled or bounded after the output matrix": "scales or bounds them afterwards",
    "output layer with a bias": "the output layer of .* has a bias",
    "attention that cannot be replaced": "an attention of its own",
    "does not pass arguments on to its attention": "is not told how sequences are packed",
    "attention in chunks": "chunked_attention",
    "state from token to token": "carry a state from token to token",
    "tensors that are stored and not trained": "a stored tensor that is not trained",
    "engine that keeps old experts": "loads past what takes new weights",
    "windows in some layers, no engine": "for which vLLM has no engine",
}
"""Short reasons of a refusal, and a pattern in the plan's sentence."""

SCALED, BIAS, OWN, DEAF, CHUNKS, STATE, CONSTANT, OLD, WINDOWS = REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Expected outcome of a family: why it is refused as a student and as a teacher ("": it works).

    `fast` families are tried whenever the tests run, the others with `-m slow`.
    """

    student: str = ""
    teacher: str = ""
    fast: bool = False

    def cells(self, engine: str = "equal") -> tuple[str, str, str, str]:
        """What the table in the docs says."""
        roles = [f"refused: {reason}" if reason else "works" for reason in (self.student, self.teacher)]
        return roles[0], "-" if self.student else engine, roles[1], "always" if self.fast else "slow"


def _neither(reason: str, *, fast: bool = False) -> Row:
    return Row(student=reason, teacher=reason, fast=fast)


ROWS: Mapping[str, Row] = {
    "Qwen3 (tied)": Row(),
    "Qwen3, 151,936 rows": Row(),
    "Qwen2.5": Row(fast=True),
    "Qwen2.5 + YaRN": Row(),
    "Qwen2 + window": Row(student=WINDOWS, fast=True),
    "Llama-3": Row(fast=True),
    "Llama-3.2 (tied)": Row(),
    "Mistral (window)": Row(fast=True),
    "OLMo-2": Row(fast=True),
    "OLMo-3": Row(),
    "Gemma-1": Row(),
    "Gemma-2": _neither(SCALED, fast=True),
    "Gemma-2, head not capped": Row(fast=True),
    "Gemma-3": Row(fast=True),
    "Phi-2": Row(student=BIAS, fast=True),
    "Phi-3": Row(fast=True),
    "OPT": Row(),
    "SmolLM3": Row(),
    "StarCoder2": Row(),
    "GPT-2": Row(),
    "GPT-NeoX": Row(),
    "GPT-J": _neither(OWN),
    "StableLM": _neither(OWN),
    "Nemotron": _neither(DEAF, fast=True),
    "GLM-4": Row(),
    "ERNIE-4.5": Row(),
    "Granite": _neither(SCALED, fast=True),
    "Cohere": _neither(SCALED),
    "Cohere-2": _neither(SCALED),
    "EXAONE-4": Row(),
    "Apertus": Row(student=CONSTANT),
    "Arcee": Row(),
    "HunYuan": Row(),
    "SeedOSS": Row(),
    "Falcon": _neither(OWN),
    "BLOOM": _neither(OWN, fast=True),
    "MPT": _neither(OWN),
    "Mixtral": Row(fast=True),
    "Qwen3-MoE": Row(fast=True),
    "Qwen2-MoE": Row(),
    "GLM-4-MoE": Row(student=CONSTANT),
    "ERNIE-4.5-MoE": Row(student=CONSTANT),
    "FlexOLMo": Row(),
    "Granite-MoE": _neither(SCALED),
    "HunYuan-MoE": Row(),
    "OLMoE": Row(),
    "DeepSeek-V3": Row(student=CONSTANT, fast=True),
    "gpt-oss": Row(student=OLD, fast=True),
    "Llama-4": _neither(CHUNKS, fast=True),
    "Qwen3-Next": _neither(STATE, fast=True),
    "Qwen3.5": _neither(STATE),
    "Falcon-H1": _neither(STATE),
    "Jamba": _neither(STATE),
    "Mamba": _neither(STATE),
    "Mamba-2": _neither(STATE, fast=True),
    "LFM2": _neither(STATE),
    "RWKV": _neither(STATE),
}
