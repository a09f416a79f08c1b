"""Learners of one rank, for the tests of this folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from learner.config import LearnerConfig
from learner.learner import LearnerRank
from tests.small_learner import Start, group_of_its_own, rank_of, tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny(root / "tied", tied=True, seed=1),
        "untied": tiny(root / "untied", tied=False, seed=2),
        "teacher": tiny(root / "teacher", tied=True, seed=3, width=40),
        "untied teacher": tiny(root / "untied_teacher", tied=False, seed=4, width=24),
    }


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Makes learners of one rank; they share a process group, which is given up at the end."""
    made = list[LearnerRank]()

    def make(
        config: LearnerConfig, student: Path, teacher: Path | Sequence[Path] | None = None, **more: Any
    ) -> LearnerRank:
        rank = rank_of(config, student, teacher, **more)
        rank.setup(0, 1, *rank.address())
        made.append(rank)
        return rank

    with group_of_its_own():
        yield make
        for rank in made:
            rank.close()
