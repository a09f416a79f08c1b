"""The benchmarks that start Ray or vLLM run at a tiny size and print their tables; how fast they are, is not asked.

Together they take more than a minute. All others are in tests/unit/benchmarks/test_benchmarks.py.
"""

import pytest

from tests.benchmark import apart

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_step_breakdown_trains_and_shows_shares_calls_and_seconds() -> None:
    printed = apart("benchmarks.step_breakdown", "3", learners=False)
    for quantity in (
        "process start to first step, s", "wall seconds per step", "CPU seconds per step", "CPU seconds to 90% at T=1",
        "share of a step: rollout", "share of a step: scoring", "share of a step: learner",
        "share of a step: everything else", "Ray calls per sample", "as the driver sees it: publish",
    ):  # fmt: skip
        assert quantity in printed, quantity
    assert "not in these steps" in printed


def test_start_up_and_end_of_a_run_are_shown_by_role_and_stage() -> None:
    small = ["evaluation.prompts.prompts_per_step=16", "evaluation.reverse_kl_prompts=8", "evaluation.samples=1"]
    printed = apart("benchmarks.startup", *small, learners=False)
    for role in ("driver", "rollout actor (vLLM)", "learner rank (DeepSpeed)", "teacher actor", "Ray: raylet"):
        assert f"│ {role} " in printed, role
    assert "to the first step: " in printed and "from the last step to the end: " in printed


def test_publishing_is_compared_with_a_memcpy_with_more_receivers_and_while_an_engine_writes() -> None:
    printed = apart("benchmarks.publish", "1", "8", "4")
    assert "P7: receivers on" in printed and "P7: 0.01 GB in chunks of 32 MiB, one receiver" in printed
    assert "object store" in printed
    assert "P9: 4 completions of up to 64 tokens" in printed
    assert all(arm in printed for arm in ("none arrives", "in-flight swap", "drain and swap"))


def test_the_cost_of_the_loop_is_given_in_calls_of_a_ray_actor() -> None:
    printed = apart("benchmarks.scale", "loop", "8", "ray", learners=False)
    assert "a Ray call took" in printed and "nan" not in printed


def test_the_rollout_engine_is_compared_with_vllm_alone() -> None:
    printed = apart("benchmarks.engine_floor", "1", "4", learners=False)
    assert all(f"│ {arm} " in printed for arm in ("vLLM, bare", "vLLM, asked as here", "VLLMEngine"))
    assert "4 completions at a time; " in printed and "nan" not in printed


def test_memory_by_turns_is_shown_by_role_and_phase() -> None:
    printed = apart("benchmarks.turns", "64", "doctor=false", learners=False)
    assert "cluster.share=RESIDENT" in printed and "cluster.share=TIME" in printed
    for phase in ("generate", "score", "train", "publish", "generate again", "the whole step"):
        assert printed.count(f"│ {phase} ") == 2, phase
