"""What a run keeps in Ray's object store, against the room for it."""

from dataclasses import replace

import pytest

from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.devices import resolved
from launch.plan.memory.shapes import read_shape
from launch.plan.memory.store import capacity, hidden_bytes, published_bytes, store_notes


@pytest.fixture(scope="module")
def shop() -> RunConfig:
    return resolved(run_config(["experiment=shop", "method=full_reverse_kl", "learner.transport=OBJECT_STORE"]))


def test_hidden_states_and_two_versions_wait_in_the_store(shop: RunConfig) -> None:
    """The teacher is 128 wide and computes in float32; a step has 64 texts of 77 tokens at most."""
    assert hidden_bytes(shop) == 64 * 77 * 128 * 4
    assert published_bytes(shop) == 2 * 4 * read_shape(shop.student.path).parameters
    assert hidden_bytes(resolved(run_config(["experiment=shop", "method=topk_reverse_kl"]))) == 0
    shared = replace(shop, learner=run_config(["experiment=shop"]).learner)
    assert published_bytes(shared) == 0, "shared memory is no part of the store"


def test_what_does_not_fit_is_a_remark(shop: RunConfig) -> None:
    held = hidden_bytes(shop) + published_bytes(shop)
    assert not store_notes(shop, held)
    (note,) = store_notes(shop, held - 1)
    assert "hidden states of 1 steps and " in note and "--shm-size" in note and "top-k" in note
    ahead = replace(shop, max_staleness=1)
    assert "hidden states of 2 steps" in store_notes(ahead, held)[0]
    assert not store_notes(replace(shop, cluster=replace(shop.cluster, address="auto")), 0)
    assert capacity() >= 0
