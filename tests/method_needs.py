"""Settings without which a shipped method means nothing: a group of answers to compare, a second teacher."""

from collections.abc import Mapping, Sequence

_GROUP = ("prompts.group_size=2",)
_BASE = ("teachers.base.path=${student.path}", "teachers.base.dtype=FLOAT32")
_START = ("teachers.start.path=${student.path}", "teachers.start.dtype=FLOAT32")

NEEDS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("grpo", "grpo_token_mean", "kdrl", "kdrl_annealed", "opd_then_rl", "sdpo", "mopd_orm"), _GROUP),
    "opd2": _BASE,
    "judged": (
        *_GROUP,
        "teachers.judge.path=${teacher.path}",
        "teachers.judge.dtype=FLOAT32",
        "method.terms.verdict.scorer.yes=1",
        "method.terms.verdict.scorer.no=0",  # words that the embedded tasks have
    ),
    **dict.fromkeys(("reference_kl", "reward_extrapolation"), _START),
}
