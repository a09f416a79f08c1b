"""The limit model: the worked example, numbers by hand, and what must hold for any lengths."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.monitors import accounting
from launch.plan.checks.models import parameter_count
from launch.run.step_roofline import StepLimit, model_shape
from opd.errors import ConfigurationError
from opd.observability import roofline
from opd.observability.roofline import Decoding, Floors, Hardware, Lengths, ModelShape, UpdateCost

STUDENT = ModelShape(
    params=7_570_000_000, layers=36, width=4096, vocabulary=151_936, heads=32, kv_heads=8, head_dim=128
)
TEACHER = ModelShape(
    params=31_980_000_000, layers=64, width=5120, vocabulary=151_936, heads=64, kv_heads=8, head_dim=128
)
H200 = Hardware(flops=989e12, memory=4.8e12, link=50e9)
TINY = ModelShape(params=100, layers=2, width=3, vocabulary=5, heads=2, kv_heads=1, head_dim=2)
SLOW = Hardware(flops=10.0, memory=100.0, link=5.0)


def lengths(prompt: list[int], response: list[int], group: int = 1) -> Lengths:
    return Lengths(prompt=np.array(prompt, dtype=int), response=np.array(response, dtype=int), group=group)


def alike(n: int, prompt: int, response: int) -> Lengths:
    return lengths([prompt] * n, [response] * n)


@pytest.mark.parametrize(
    ("batch", "slots", "prefill", "compute", "memory", "teach", "learn"),
    [
        (alike(256, 512, 4096), 256, 1.9, 18, 95, 82, 77),
        (alike(256, 512, 16384), 128, 1.9, 86, 1225, 357, 346),
        (alike(1024, 512, 1024), 512, 7.5, 17, 39, 103, 95),
    ],
)
def test_the_worked_example_of_the_notes(
    batch: Lengths, slots: int, prefill: float, compute: float, memory: float, teach: float, learn: float
) -> None:
    """8B student, 32B teacher, an H200 each: the printed table, computed independently of this code."""
    floor = roofline.rollout(STUDENT, batch, H200, Decoding(slots=slots))
    assert floor.prefill == pytest.approx(prefill, rel=0.03)
    assert floor.compute == pytest.approx(compute, rel=0.03)
    assert floor.memory == pytest.approx(memory, rel=0.03)
    assert roofline.teacher(TEACHER, batch, H200) == pytest.approx(teach, rel=0.03)
    assert roofline.learner(STUDENT, batch, H200, UpdateCost(recompute=True)) == pytest.approx(learn, rel=0.03)
    assert roofline.push(roofline.dense_bytes(STUDENT), H200) == pytest.approx(0.30, rel=0.03)


def test_a_rollout_by_hand() -> None:
    """Two samples of a prompt of 2 tokens; responses 1 and 3; body 85, head 15, q = 4, k = 2."""
    floor = roofline.rollout(
        TINY, lengths([2, 2], [1, 3], group=2), SLOW, Decoding(slots=2, weight_bytes=1.0, cache_bytes=1.0)
    )
    assert floor.prefill == pytest.approx((2 * 85 * 2 + 2 * 2 * 4 * 4 + 2 * 15) / 10)
    attended = (9 - 4) + (25 - 4)
    assert floor.compute == pytest.approx((2 * 85 * 4 + 2 * 2 * 4 * attended + 2 * 15 * 4) / 10)
    assert floor.memory == pytest.approx((3 * 100 + 2 * 2 * attended) / 100)
    assert floor.seconds == floor.prefill + max(floor.compute, floor.memory)


def test_teacher_learner_and_push_by_hand() -> None:
    one = lengths([2], [3])
    forward = 2 * 85 * 5 + 2 * 2 * 4 * 25 + 2 * 15 * 3
    assert roofline.teacher(TINY, one, SLOW, actors=2) == pytest.approx(forward / 20)
    assert roofline.teacher(TINY, one, SLOW, sends_hidden=True) == pytest.approx((forward - 90) / 10)
    assert roofline.learner(TINY, one, SLOW, UpdateCost()) == pytest.approx(3 * forward / 10 + 30 * 100 / 100)
    again = UpdateCost(recompute=True, teacher_head=7)
    assert roofline.learner(TINY, one, SLOW, again) == pytest.approx((4 * forward + 2 * 7 * 3) / 10 + 30)
    assert roofline.zero_bytes(TINY, UpdateCost(ranks=4, stage=2)) == 2 * 100 * 2 * 3 / 4
    assert roofline.zero_bytes(TINY, UpdateCost(ranks=4, stage=3, microbatches=5)) == 15 * 100 * 2 * 3 / 4
    assert roofline.push(50.0, SLOW, receivers=5, chunks=2) == pytest.approx(10 * 3)
    assert roofline.dense_bytes(TINY) == 200


def test_slow_links_bound_a_learner_that_computes_fast() -> None:
    many = UpdateCost(ranks=2, stage=3, microbatches=100)
    seconds = roofline.learner(TINY, lengths([2], [3]), SLOW, many)
    assert seconds == pytest.approx(300 * 100 * 2 / 2 / 5 + 30 * 100 / 200)


def test_the_run_counts_operations_with_the_same_constants() -> None:
    """Without attention a floor is what `launch.monitors.accounting` counts: 2N a token read, 6N a token learned."""
    costs = accounting.Costs(student_params=1000, teacher_params=1000, teacher_writes=False, teacher_reads=True)
    tokens = accounting.StepTokens(prompt=0, completion=50, generated=50, student=0, scored=50, learned=50, trained=50)
    flat = replace(TINY, params=1000)
    batch = lengths([0], [50])
    attention = flat.forward_flops(np.zeros(1), np.array([50.0]), 50.0) - 2 * 1000 * 50
    floor = roofline.teacher(flat, batch, SLOW) + roofline.learner(flat, batch, SLOW, UpdateCost()) - 30 * 1000 / 100
    assert accounting.step_flops(tokens, costs) == pytest.approx(10 * floor - 4 * attention)


TOKENS = st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 40000)), min_size=1, max_size=20)


def seconds(batch: Lengths, engines: int = 1) -> np.ndarray:
    floor = roofline.rollout(STUDENT, batch, H200, Decoding(slots=4), engines)
    return np.array(
        [
            floor.prefill, floor.compute, floor.memory, floor.seconds,
            roofline.teacher(TEACHER, batch, H200, engines),
            roofline.learner(STUDENT, batch, H200, UpdateCost(ranks=engines)),
        ]
    )  # fmt: skip


@given(TOKENS, st.integers(0, 19), st.integers(1, 500))
def test_longer_is_never_cheaper(tokens: list[tuple[int, int]], which: int, more: int) -> None:
    prompt, response = (list(side) for side in zip(*tokens, strict=True))
    before = seconds(lengths(prompt, response))
    response[which % len(tokens)] += more
    longer = seconds(lengths(prompt, response))
    assert (longer >= before).all() and longer[1] > before[1] and longer[-1] > before[-1]
    prompt[which % len(tokens)] += more
    assert (seconds(lengths(prompt, response)) >= longer).all()


@given(TOKENS, TOKENS)
def test_work_adds_up_and_waiting_for_the_longest_does_not_grow(
    some: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    def of(tokens: list[tuple[int, int]]) -> np.ndarray:
        prompt, response = (list(side) for side in zip(*tokens, strict=True))
        return seconds(lengths(prompt, response))

    both, apart = of([*some, *others]), of(some) + of(others)
    optimizer = 30 * STUDENT.params / H200.memory
    assert both[[0, 1, 4]] == pytest.approx(apart[[0, 1, 4]])
    assert both[5] + optimizer == pytest.approx(apart[5])
    assert both[2] <= apart[2] * (1 + 1e-12)


@given(TOKENS, st.integers(2, 64))
def test_more_engines_help_at_most_in_proportion(tokens: list[tuple[int, int]], engines: int) -> None:
    prompt, response = (list(side) for side in zip(*tokens, strict=True))
    batch = lengths(prompt, response)
    one, many = seconds(batch), seconds(batch, engines)
    assert (many[:5] <= one[:5] * (1 + 1e-12)).all(), "a learner's ranks also have to talk"
    assert (many[:5] * engines >= one[:5] * (1 - 1e-12)).all()
    longest = max(response) * STUDENT.params * 2 / H200.memory
    assert many[2] >= longest * (1 - 1e-12), "the longest response is read by one engine, however many there are"


@given(st.integers(1, 30), st.integers(1, 200), st.integers(1, 200))
def test_limiting_cases(n: int, prompt: int, response: int) -> None:
    batch = alike(n, prompt, response)
    shared = Lengths(prompt=batch.prompt, response=batch.response, group=n)
    alone = roofline.rollout(TINY, batch, SLOW, Decoding(slots=n))
    together = roofline.rollout(TINY, shared, SLOW, Decoding(slots=n))
    assert together.prefill * n == pytest.approx(alone.prefill)
    assert roofline.decode_steps(batch, n) == response, "as many slots as sequences: the longest sets the steps"
    assert roofline.decode_steps(batch, 1) == n * response, "one slot: one after another"
    nothing = roofline.rollout(TINY, alike(n, prompt, 0), SLOW, Decoding(slots=n))
    assert nothing.compute == nothing.memory == 0


ROLES = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5)


@given(ROLES, st.integers(0, 60))
def test_the_best_split_is_best(work: list[float], more: int) -> None:
    devices = len(work) + more
    split = roofline.best_split(work, devices)
    slowest = max(w / n for w, n in zip(work, split, strict=True))
    assert sum(split) == devices and min(split) >= 1
    assert slowest >= roofline.balanced(work, devices) * (1 - 1e-12)
    for giver in range(len(work)):  # moving any one device does not help
        for taker in range(len(work)):
            moved = list(split)
            moved[giver] -= 1
            moved[taker] += 1
            if moved[giver] >= 1:
                assert max(w / n for w, n in zip(work, moved, strict=True)) >= slowest * (1 - 1e-12)


def test_overlapping_saves_at_most_the_number_of_roles() -> None:
    even = Floors(rollout=2.0, teacher=2.0, learner=2.0, push=2.0)
    assert even.lock_step / even.overlapped == 4
    uneven = Floors(rollout=5.0, teacher=1.0, learner=0.0, push=0.0)
    assert uneven.lock_step == 6 and uneven.overlapped == 5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: replace(TINY, layers=0),
        lambda: replace(TINY, params=14),
        lambda: Hardware(flops=1.0, memory=0.0, link=1.0),
        lambda: lengths([1], [1, 2]),
        lambda: lengths([], []),
        lambda: lengths([1, 1], [1, -1]),
        lambda: lengths([1], [1], group=0),
        lambda: roofline.best_split([1.0, 2.0], 1),
    ],
)
def test_bad_input_is_one_sentence(wrong: object) -> None:
    with pytest.raises(ConfigurationError, match=r"need.* but got"):
        wrong()  # type: ignore[operator]


def test_the_limit_of_a_run_has_every_role_do_its_own_part(make: Any) -> None:
    """Two teachers, each reading what names it; the ensemble's members read all."""
    mine, other = make.prompt([1, 2], teacher="default"), make.prompt([1, 2, 3], teacher="other")
    written = [make.trajectory([], [5] * n, prompt=p) for p, n in ((mine, 4), (other, 7), (other, 1))]
    run = StepLimit(
        hardware=SLOW, writer=TINY, engines=2, student=TINY, teachers={"default": TINY, "other": TINY},
        replicas={"default": 1, "other": 3}, members=(), sends_hidden=False, group=1,
        decoding=Decoding(slots=8), training=UpdateCost(),
    )  # fmt: skip
    every = lengths([2, 3, 3], [4, 7, 1])
    apart = roofline.teacher(TINY, lengths([2], [4]), SLOW), roofline.teacher(TINY, lengths([3, 3], [7, 1]), SLOW, 3)
    assert run.floors(written, 60) == Floors(
        rollout=roofline.rollout(TINY, every, SLOW, Decoding(slots=8), 2).seconds,
        teacher=max(apart),
        learner=roofline.learner(TINY, every, SLOW, UpdateCost()),
        push=roofline.push(60.0, SLOW, 2),
    )
    assert replace(run, members=("default",)).floors(written, 60).teacher == roofline.teacher(TINY, every, SLOW)


def test_shapes_are_read_from_the_embedded_checkpoints() -> None:
    shape = model_shape("assets/shop/student")
    assert shape is not None and (shape.layers, shape.width, shape.heads, shape.kv_heads) == (3, 96, 3, 1)
    assert shape.head_params < shape.params == parameter_count("assets/shop/student")
    assert model_shape("assets/shop") is None
