"""Metrics of every shipped method: pages, alerts and trackers read their names; values cost no second softmax."""

from typing import Any

import pytest
import torch

from launch.config.run_config import run_config
from launch.config.shipped_files import groups
from opd.objectives.bridged import BridgeDivergence
from opd.objectives.reweighted import AtTemperature
from opd.types import (
    AdvantageScores,
    CreditScores,
    DeltaScores,
    DeviationScores,
    EvidenceScores,
    Scores,
    TargetScores,
    TokenScores,
    TopKReturnScores,
    TopKScores,
    VocabularyScores,
)
from scripts.method_digests import ROWS, V, evaluated, kind_of


def by_depth(*names: str) -> set[str]:
    return {f"{name}{end}" for name in names for end in ("", "_0_63", "_64_255", "_256_1023", "_1024_up")}


MISMATCH = {"ratio", "probs_diff", "logprob_gap"}
TEXT = by_depth("entropy")
SAMPLED = TEXT | MISMATCH
SUPPORT = SAMPLED | {"student_mass", "teacher_mass", "support_overlap", "support_token_advantage"}
VOCABULARY = SAMPLED | by_depth("teacher_entropy", "entropy_gap", "fidelity") | {
    *("reverse_kl", "forward_kl"),
    *("overlap_ratio", "overlap_token_advantage", "overlap_student_mass", "overlap_teacher_mass"),
}  # fmt: skip
DIAGNOSTICS: dict[type[Scores], set[str]] = {
    Scores: TEXT,
    TokenScores: SAMPLED,
    AdvantageScores: SAMPLED,
    CreditScores: SAMPLED,
    DeltaScores: SUPPORT,
    DeviationScores: SAMPLED,
    EvidenceScores: SAMPLED,
    TargetScores: SAMPLED,
    TopKScores: SUPPORT,
    TopKReturnScores: SUPPORT,
    VocabularyScores: VOCABULARY,
}
CHOSEN = "support_size student_mass teacher_mass"
OWN: dict[str, str] = {  # metrics that the objective alone knows
    **dict.fromkeys(("full_reverse_kl", "full_forward_kl", "ensemble_reverse_kl", "vopd", "sft", "effopd"), ""),
    **dict.fromkeys(("context_distillation", "topd", "topd_downweight", "trd", "cold_start", "open_prompts"), ""),
    "opsd": "jsd",
    "judged": "reverse_kl",
    "golden_data": "",
    "cal_opd": "reverse_kl discrepancy discrepancy_kept",
    "edge_opd": "reverse_kl evident_share",
    "sdpo": "support_divergence ratio_truncated",
    "sdft": "support_divergence ratio_truncated",
    **dict.fromkeys(("fire", "ta_opd", "top_entropy", "top_divergence"), ""),
    **dict.fromkeys(("monte_carlo_reverse_kl", "monte_carlo_forward_kl", "topk_jensen_shannon"), ""),
    **dict.fromkeys(("jensen_shannon", "gkd"), "jsd"),
    **dict.fromkeys(("skewed_reverse_kl", "skewed_forward_kl", "distillm2"), "skewed_kl"),
    **dict.fromkeys(
        (
            *("sampled_reverse_kl", "reasoning_prefixes", "thinking_machines", "squared_reverse_kl", "vopd_topk"),
            "lookahead_optimizer",
        ),
        "reverse_kl",
    ),
    **dict.fromkeys(("sampled_jensen_shannon", "ratio_reverse_kl"), "reverse_kl"),
    **dict.fromkeys(("reference_kl", "reward_extrapolation"), "reverse_kl"),
    **dict.fromkeys(("topk_reverse_kl", "student_topk_reverse_kl", "tail_bucket_reverse_kl"), "reverse_kl"),
    **dict.fromkeys(("local_support_matching", "rethinking_eq5", "rethinking_code", "mopd_topk"), "reverse_kl"),
    **dict.fromkeys(("tail_bucket_forward_kl", "renormalized_forward_kl"), "forward_kl"),
    "tail_bucket_jensen_shannon": "support_divergence",
    "union_forward_kl": f"support_divergence {CHOSEN}",
    **dict.fromkeys(("many_faces", "trb", "union_reverse_kl", "intersection_reverse_kl"), f"support_kl {CHOSEN}"),
    "eopd": f"uncertain_share {CHOSEN}",
    **dict.fromkeys(("lgr", "mopd_orm"), "reverse_kl credit credited_share"),
    "opd2": "reverse_kl delta agreed_share",
    "minillm": "reverse_kl return",
    **dict.fromkeys(("top_d", "sign_log", "log_ratio_clip"), "reverse_kl reward_changed"),
    "fixed_advantage": "",
    **dict.fromkeys(("veto", "taid"), "bridge_divergence"),
    "reopold": "reward_changed",
    **dict.fromkeys(
        ("grpo", "grpo_token_mean", "kdrl", "kdrl_annealed", "opd_then_rl", "top_d_returns"), "pg_clipfrac"
    ),
}


@pytest.fixture
def softmaxes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of all that a log-softmax was taken of."""
    shapes, original = list[torch.Size](), torch.Tensor.log_softmax

    def counted(x: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        shapes.append(x.shape)
        return original(x, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "log_softmax", counted)
    return shapes


@pytest.mark.parametrize("name", groups()["method"])
def test_a_method_reports_its_own_metrics_and_the_diagnostics_of_its_scores(
    name: str, softmaxes: list[torch.Size]
) -> None:
    method = run_config(["experiment=shop", f"method={name}", "prompts.group_size=4"]).method
    result, _ = evaluated(method, torch.float64, 0)
    assert set(result.metrics) == DIAGNOSTICS[kind_of(method)] | {*OWN[name].split()}
    assert all(len(values) == ROWS and not values.requires_grad for values in result.metrics.values())
    again = 2 * isinstance(method.objective, AtTemperature)  # both distributions, at another temperature
    again += isinstance(method.objective, BridgeDivergence)  # its target
    made = "teacher and behavior, which the batch is made of, and student"
    assert softmaxes.count(torch.Size((ROWS, V))) == 3 + again, made
