"""Every shipped method trains through the one loop on real parts; one session serves them all."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster import connected
from launch.config import groups, run_config
from launch.plan import make_plan
from launch.session import Session, open_session
from opd.loop import StepRecord, train

SMALL = ["experiment=shop", "prompts.prompts_per_step=8", "prompts.group_size=2", "max_tokens=77"]


@pytest.fixture(scope="module")
def session() -> Iterator[tuple[Session, asyncio.Runner]]:
    """All actors, with a teacher that can also write."""
    plan = make_plan(run_config([*SMALL, "method=sft"]))
    with connected(plan.config.cluster), asyncio.Runner() as runner:
        opened = runner.run(open_session(plan))
        yield opened, runner
        opened.close()


@pytest.mark.ray
@pytest.mark.parametrize("name", groups()["method"])
def test_a_method_trains(name: str, session: tuple[Session, asyncio.Runner]) -> None:
    opened, runner = session
    config = run_config([*SMALL, f"method={name}"])
    records: list[StepRecord] = []

    async def remember(record: StepRecord) -> None:
        records.append(record)

    runner.run(
        train(
            config.method,
            config.prompts,
            opened.plan.sources,
            opened.engines,
            opened.learner,
            [remember],
            start=0,
            steps=2,
        )
    )
    assert [r.step for r in records] == [1, 2]
    for record in records:
        assert math.isfinite(record.report.loss) and math.isfinite(record.report.grad_norm)
        assert record.published.gap < 1e-4
        assert record.ledger["issued"] == record.ledger["trained"] + record.ledger["dropped"]
    versions = {int(v) for item in records[-1].scored for v in item.trajectory.versions}
    assert versions == ({0} if config.method.rollout.needs_writer else {1})
    if name not in ("grpo", "sft"):
        assert records[0].report.grad_norm > 0
        assert records[0].report.metrics["ratio"] == pytest.approx(1, abs=1e-3)


@pytest.mark.ray
def test_the_published_example_of_a_new_method_trains(
    session: tuple[Session, asyncio.Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file and one YAML, exactly as docs/adding_a_method.md prints them."""
    import re

    import yaml

    page = (Path(__file__).resolve().parents[2] / "docs" / "adding_a_method.md").read_text()
    blocks = dict(re.findall(r"```\w+ file=(\S+)\n(.*?)```", page, flags=re.DOTALL))
    assert set(blocks) == {"my_methods/squared.py", "conf/method/squared.yaml"}
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "squared.py").write_text(blocks["my_methods/squared.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    described = yaml.safe_load(blocks["conf/method/squared.yaml"])
    overrides = [f"method.name={described['name']}"]
    overrides += [
        f"method.{part}._target_={described[part]['_target_']}" for part in ("rollout", "scorer", "objective")
    ]
    config = run_config([*SMALL, *overrides, "allow_targets=[my_methods.]"])
    assert type(config.method.objective).__name__ == "SquaredLogRatio"
    opened, _ = session
    from opd.types import TokenScores

    assert config.method.objective.consumes is TokenScores
    with pytest.raises(Exception, match=r"only parts below opd\."):
        run_config([*SMALL, *overrides])
    assert opened.learner.layout.ranks == 1
