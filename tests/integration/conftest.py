"""Learners of one rank, for the tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.config import LearnerConfig, environment
from learner.learner import LearnerRank
from opd.settings.devices import Device
from tests.small_learner import Start, rank_of, tiny


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
    before, made = dict(os.environ), list[LearnerRank]()
    os.environ.update(environment(Device.CPU))
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    untouched = {name: value for name, value in vars(groups).items() if name.startswith("_") and name.isupper()}

    def make(config: LearnerConfig, student: Path, teacher: Path | None = None, **more: Any) -> LearnerRank:
        rank = rank_of(config, student, teacher, **more)
        rank.setup(0, 1, *rank.address())
        made.append(rank)
        return rank

    yield make
    for rank in made:
        rank.close()
    comm.cdb = None  # DeepSpeed keeps what it knew of the group; the next module makes another
    vars(groups).update(untouched)
    os.environ.clear()
    os.environ.update(before)
