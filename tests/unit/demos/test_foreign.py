"""The foreign task: solutions are those of the shop, written with the units of every number first."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demos.tasks.foreign import ForeignTask, units_first
from demos.tasks.shop import ShopTask, grade
from launch.config.run_config import run_config
from opd.errors import ConfigurationError

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "foreign"


@given(st.integers(0, 10**9), st.floats(0, 0.9))
def test_a_solution_is_the_shop_s_with_its_digits_exchanged(seed: int, mistakes: float) -> None:
    task, problem = ForeignTask(), ShopTask().problem(random.Random(seed))
    own = ShopTask().solution(problem, random.Random(seed), mistakes)
    foreign = task.solution(problem, random.Random(seed), mistakes)
    assert units_first(foreign) == own and len(foreign.words) == len(own.words)
    assert foreign.words[-3:] == own.words[-3:] and sorted(foreign.words) == sorted(own.words)
    assert foreign.words[1:3] == own.words[2:0:-1]
    assert grade(foreign.text, problem.answer) == grade(own.text, problem.answer)


def test_what_is_not_learned_moves_with_its_digit() -> None:
    rng = random.Random(0)
    for _ in range(50):
        problem, seed = ShopTask().problem(rng), rng.random()
        own = ShopTask().solution(problem, random.Random(seed), 0.5)
        foreign = ForeignTask().solution(problem, random.Random(seed), 0.5)
        wrong = [word for word, learn in zip(own.words, own.loss_mask, strict=True) if not learn]
        assert sorted(wrong) == sorted(
            w for w, learn in zip(foreign.words, foreign.loss_mask, strict=True) if not learn
        )


def test_the_shipped_files_are_those_of_the_list_and_the_experiments_can_be_planned() -> None:
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert run_config(["experiment=foreign"]).teacher.path.endswith("foreign/teacher")
    assert run_config(["experiment=foreign", "teacher=larger"]).teacher.path.endswith("foreign/larger")
    with pytest.raises(ConfigurationError, match=r"with stages \(cold_start, opd\)"):
        run_config(["experiment=foreign_cold_start"])
