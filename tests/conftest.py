"""Shared by all tests: the shapes and types of `opd` are enforced, and torch repeats itself exactly."""

import os
import random
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture import providers

from tests.command import as_from_a_terminal
from tests.typed_calls import enforce

# Ray reads these when it is imported, which vLLM does on the way.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; tests/hub_stand_in.py stands for it

as_from_a_terminal()

enforce("opd", "weight_sync")

from opd.types import Prompt, Scored, Scores, StopReason, TokenScores, Trajectory  # noqa: E402 (after the hook)
from tests.fault_matrix import (  # noqa: E402, F401 (hooks and a fixture, which pytest finds here)
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
    witness,
)

# Hypothesis also draws constants of those modules of ours that happen to be loaded, which the other tests of a process
# decide: the same commit would see other examples from run to run. A rename there must be seen here.
assert callable(providers.is_local_module_file)
providers.is_local_module_file = lambda _: False
settings.register_profile("opd", deadline=None, derandomize=True, database=None)
settings.load_profile("opd")
torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_num_threads(1)


WHOLE_RUN_S = 600  # four times what the longest of them takes on two processors


def pytest_itemcollected(item: pytest.Item) -> None:
    """What starts whole runs has more time than other tests, unless it says itself how much."""
    if "integration" in item.path.parts and item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(WHOLE_RUN_S))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Every test starts from the same state of every generator."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Make:
    """Small valid values; a test names only what it is about."""

    @staticmethod
    def prompt(ids: Sequence[int] = (1, 2), **fields: Any) -> Prompt:
        """A prompt that the teacher reads as the student does."""
        given = np.asarray(ids, dtype=np.int32)
        return Prompt(**({"id": "p", "student_ids": given, "teacher_ids": given} | fields))

    @staticmethod
    def trajectory(context: Sequence[int], tokens: Sequence[int], **fields: Any) -> Trajectory:
        """`tokens` written after `context` by version 0, every one with logprob -1."""
        n = len(tokens)
        default = {
            "prompt": Make.prompt(context),
            "sample": 0,
            "token_ids": np.asarray(tokens, dtype=np.int32),
            "behavior": TokenScores(logprobs=np.full(n, -1.0, dtype=np.float32)),
            "loss_mask": np.ones(n, dtype=bool),
            "versions": np.zeros(n, dtype=np.int32),
            "stop": StopReason.END,
        }
        return Trajectory(**(default | fields))

    @staticmethod
    def scored(
        context: Sequence[int], tokens: Sequence[int], scores: Scores | None = None, **fields: Any
    ) -> Scored[Any]:
        """A trajectory about which somebody said `scores` (default: nobody said anything)."""
        return Scored(trajectory=Make.trajectory(context, tokens, **fields), scores=scores or Scores())


@pytest.fixture(scope="session")
def make() -> type[Make]:
    """The maker of small valid values."""
    return Make
