"""What tests of the learner's verbs compare: all that a rank holds, by name."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from learner.learner import LearnerRank
from tests.integration.learner.test_learner_faults import content


@pytest.fixture
def contents(tmp_path: Path) -> Callable[[LearnerRank], dict[str, torch.Tensor]]:
    """Master weights, moments, snapshots and published weights of a rank, by name."""
    numbers: Iterator[int] = iter(range(100))
    return lambda rank: content(rank, tmp_path / f"content {next(numbers)}")
