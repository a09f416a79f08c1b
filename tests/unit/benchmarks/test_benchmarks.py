"""Every benchmark runs at a tiny size and prints its table; how fast it is, is not asked.

Those that need Ray or vLLM are in tests/integration/runs/test_benchmarks.py.
"""

from importlib import util

import pytest

from tests.benchmark import apart, here

SCHEDULES = ["lock-step", "on-policy, streamed", "ahead 1", "ahead 2", "ahead 4", "ahead 8"]


def lines(printed: str, *, of: str) -> list[str]:
    """The lines of a table in which `of` stands."""
    return [line for line in printed.splitlines() if of in line]


def test_the_peer_of_the_start_up_trains_or_says_that_it_is_not_installed() -> None:
    printed = here("benchmarks.peer_trl", "1")
    trained = util.find_spec("trl") is not None
    assert ("training starts" in printed and "step 1 " in printed) if trained else "TRL's arm is left out" in printed


def test_transport_compares_a_frame_with_json_at_three_depths() -> None:
    printed = here("benchmarks.transport", "1")
    assert "of the floor" in printed
    assert len(lines(printed, of="frame │")) == 3
    assert len(lines(printed, of="base64 in JSON │")) == len(lines(printed, of="lists in JSON │")) == 3


def test_the_scorer_is_compared_with_the_bare_forward_pass_and_its_memory_is_shown() -> None:
    printed = here("benchmarks.scorer", "1", "64", "1", "256")
    assert "P2: width 64, 1 layers, vocabulary 256, 896 tokens" in printed
    assert all(len(lines(printed, of=f"│ {arm} │")) == 1 for arm in ("bare", " k=1", "k=64"))
    assert len(lines(printed, of="MiB above the answers")) == 5


def test_packing_shows_how_full_batches_are_and_that_the_loss_stays() -> None:
    printed = here("benchmarks.packing")
    assert printed.splitlines()[0].split()[:4] == ["trajectories", "longest", "budget", "ranks"]
    assert sum(line.strip()[:1].isdigit() for line in printed.splitlines()) == 6
    assert "loss packed" in printed and "(target 1e-06)" in printed


def test_the_losses_memory_is_compared_in_a_fresh_process_per_arm() -> None:
    printed = apart("benchmarks.loss", "memory", "64", "8192", "8", "ours")
    assert "peak memory: 64 tokens, vocabulary 8192, width 8" in printed
    (row,) = lines(printed, of="│ ours")
    assert "failed" not in row


def test_the_losses_time_is_compared_with_the_naive_ones() -> None:
    printed = apart("benchmarks.loss", "time", "16", "64", "8", "1", "naive", "ours", "bare")
    assert "time: 16 tokens, vocabulary 64, width 8, 1 rounds" in printed
    assert all(len(lines(printed, of=f"│ {arm} ")) == 1 for arm in ("naive", "ours", "bare"))
    assert "share of diagnostics in `ours`" in printed


def test_the_loss_with_several_teachers_shows_its_memory_and_its_time() -> None:
    printed = apart("benchmarks.teachers_loss", "64", "8", "1", "8192", "2")
    memory, time = printed.split("CPU ms at 64 tokens, vocabulary 8,192")
    assert len(lines(memory, of="T=2 / T=1")) == 2  # ours and the naive one
    assert len(lines(time, of="  T=")) == 2 and "per further teacher" in time


def test_publishing_through_shared_memory_is_shown_in_parts() -> None:
    printed = apart("benchmarks.publish", "parts", "1", "8")
    assert "P7: 0.01 GB through shared memory, in parts" in printed
    assert lines(printed, of="memcpy") and lines(printed, of="read back and verified")


def test_schedules_are_compared_in_virtual_time() -> None:
    printed = here("benchmarks.scale", "overlap", "3", "1", "1")
    assert printed.count("3 H200: 1 rollout x 16 slots, 1 teacher, 1 learner") == 3
    assert all(len(lines(printed, of=f"│ {name} ")) >= 3 for name in SCHEDULES)


def test_the_cost_of_the_loop_is_shown_from_8_to_1024_actors() -> None:
    printed = here("benchmarks.scale", "loop", "8")
    assert all(len(lines(printed, of=f"│ {actors} ")) == 1 for actors in (8, 32, 128, 512, 1024))
    assert "log-log slope of cost in actors" in printed


def test_clusters_run_with_failures_and_without_and_repeat_themselves() -> None:
    printed = here("benchmarks.scale", "cluster", "24", "steps=6")
    assert lines(printed, of="24 | ahead 8 |") and lines(printed, of="24 | lock-step |")
    assert "one in 10 % of steps, run again: bit-equal" in printed and "NOT EQUAL" not in printed
    assert len(lines(printed, of="│ 24 ")) == 10


def test_a_step_breakdown_of_nothing_but_warm_up_is_refused_before_a_run_starts() -> None:
    with pytest.raises(SystemExit, match="give 3 or more"):
        here("benchmarks.step_breakdown", "2")


def test_the_memory_of_a_long_sequence_is_shown_for_each_kind_of_attention() -> None:
    printed = here("benchmarks.long_context", "window", "64")
    assert float(printed) >= 0


def test_the_memory_of_ranks_that_start_is_shown_for_a_stage_and_a_dtype() -> None:
    printed = here("benchmarks.learner_start", "1", "64", "1", "3:BFLOAT16")
    (row,) = lines(printed, of="3:BFLOAT16")
    assert len(row.split()) == 8 and "bfloat16, 1 ranks" in printed
