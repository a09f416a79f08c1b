"""Runs with stages: what a command asks for, which student each stage starts from, and what a resumed run repeats."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.artifacts.run_directory import RunDirectory, append_json
from launch.artifacts.run_lock import LOCK
from launch.artifacts.summary import Outcome
from launch.cli import staged_run
from launch.cli.stages import Stage, stages_of, without_stages
from launch.config.composition.compose import compose
from launch.config.run_config import run_config
from opd.errors import ConfigurationError, DataError
from tests.command import ROOT, opd
from tests.unit.monitors.test_report import step_line, summary

TWO = ["experiment=shop", "doctor=false", "tracker=none"]
ASKED = ["stages.sft.method=sft", "stages.sft.steps=2", "stages.opd.steps=3", "stages.opd.learner.lr=5e-4"]
SHOP = str(ROOT / "assets" / "shop" / "student")


def asked(*overrides: str) -> tuple[Stage, ...]:
    given = ["experiment=shop", *overrides]
    return stages_of(compose(without_stages(given)), given)


@pytest.fixture
def listed(tmp_path: Path) -> str:
    """A folder of options with an experiment of two stages."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /prompts: shop\nstages:\n"
    text += "  cold: [method=sft, steps=2]\n  opd: [steps=3, learner.lr=5e-4]\n"
    (tmp_path / "conf" / "experiment" / "two.yaml").write_text(text)
    return f"conf={tmp_path / 'conf'}"


# ---- the command


def test_a_run_without_stages_has_none() -> None:
    assert asked() == asked("stages=null") == ()


def test_names_on_the_command_line_are_stages_in_their_order() -> None:
    assert asked(*ASKED) == (
        Stage(number=1, name="sft", overrides=("method=sft", "steps=2")),
        Stage(number=2, name="opd", overrides=("steps=3", "learner.lr=5e-4")),
    )
    assert asked(*ASKED)[1].folder == "2-opd"


def test_a_command_replaces_settings_of_a_listed_stage(listed: str) -> None:
    given = [listed, "experiment=two", "stages.opd.steps=9", "+stages.opd.seed=4"]
    stages = stages_of(compose(without_stages(given)), given)
    assert [(s.name, s.overrides) for s in stages] == [
        ("cold", ("method=sft", "steps=2")),
        ("opd", ("learner.lr=5e-4", "steps=9", "seed=4")),
    ]


@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        (["stages.odp.steps=9"], "there is no stage 'odp'; did you mean 'opd'"),
        (["steps=9"], r"steps=\.\.\. was given for all stages, but stage cold has steps=2 .*stages\.cold\.steps="),
        (["stages.opd.run_name=x"], "stage opd sets run_name, which is the whole run's"),
        (["stages.opd.student.path=x"], "student.path=x was given, but every stage after the first starts from"),
        (["stages.opd.lr=1"], r"stage opd: .* it is learner\.lr here"),
        (["stages.opd.steps=0"], "stage opd: steps needs"),
        (["resume=latest"], "resume=latest needs run_name"),
        (["resume=auto"], "resume=auto goes on with the run of that name"),
        (["resume=2", "run_name=x"], "resume=2 names a checkpoint"),
        (["resume=latest", "run_name=nix"], "there is no run .*nix"),
        (["experiment=compare", "stages.opd.steps=2"], "a comparison or has stages"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_starts(
    tmp_path: Path, listed: str, more: list[str], refusal: str
) -> None:
    chosen = [] if more[0].startswith("experiment=") else ["experiment=two"]
    done = opd("train", listed, *chosen, f"output_dir={tmp_path / 'runs'}", *more)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(refusal, done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()


def test_other_commands_do_not_pass_over_stages(listed: str) -> None:
    with pytest.raises(ConfigurationError, match=r"with stages \(cold, opd\), which opd train alone runs"):
        run_config([listed, "experiment=two"])
    assert run_config([listed, "experiment=two", "stages=null"]).steps == 100


# ---- its runs, by a stand-in that leaves what a run leaves


class Trained(list[Any]):
    """Configurations of what was trained; `fails` ends the next one after a step, with or without a checkpoint."""

    fails = ""

    def __call__(self, plan: Any, console: Any, *, whole: str) -> RunDirectory:
        config = plan.config
        self.append(config)
        path = Path(config.output_dir) / config.run_name
        directory = RunDirectory(path) if path.exists() else RunDirectory.create(Path(config.output_dir), path.name)
        directory.write_config(config.text)
        assert (path.parent / LOCK).exists(), "the whole run is locked"
        append_json(directory.metrics, step_line(1))
        if self.fails:
            if self.fails == "saved":
                (directory.checkpoints / "step_1").mkdir()
            self.fails = ""
            raise DataError("cut")
        (directory.export / "config.json").write_text("{}")
        summary(path.name, method=config.method.name, steps=config.steps).write(directory)
        return directory


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    made = Trained()
    monkeypatch.setattr(staged_run, "train_once", made)
    monkeypatch.setattr(staged_run, "make_plan", lambda config: SimpleNamespace(config=config, hub=()))
    monkeypatch.setattr(staged_run, "next_steps_text", lambda directory: str(directory.path))
    return made


def run(tmp_path: Path, *more: str, stages: Sequence[str] = ASKED) -> int:
    given = [*TWO, *stages, f"output_dir={tmp_path}", "run_name=x", *more]
    node = compose(without_stages(given))
    return staged_run.run_stages(stages_of(node, given), node, without_stages(given))


def test_every_stage_starts_from_the_student_of_the_one_before(tmp_path: Path, trained: Trained) -> None:
    assert run(tmp_path) == 0
    assert [(c.method.name, c.steps, c.run_name) for c in trained] == [
        ("sft", 2, "1-sft"),
        ("full_reverse_kl", 3, "2-opd"),
    ]
    assert [c.student.path for c in trained] == [SHOP, str(tmp_path / "x" / "1-sft" / "export")]
    assert trained[1].learner.lr == 5e-4 and trained[0].learner.lr == 1e-3
    assert {c.tracker.group for c in trained} == {"x"}
    with pytest.raises(ConfigurationError, match="has finished its 2 stages"):
        run(tmp_path, "resume=latest")


def test_a_resumed_run_repeats_no_finished_stage_and_goes_on_in_the_next(tmp_path: Path, trained: Trained) -> None:
    run(tmp_path, stages=ASKED[:2])  # as if it had been killed between the two
    trained.clear()
    trained.fails = "saved"
    with pytest.raises(DataError):
        run(tmp_path, "resume=latest")
    assert [(c.run_name, c.resume) for c in trained] == [("2-opd", "")]
    with pytest.raises(ConfigurationError, match="go on with resume=latest"):
        run(tmp_path)
    assert run(tmp_path, "resume=latest") == 0
    assert [(c.run_name, c.resume) for c in trained[1:]] == [("2-opd", "latest")]
    assert not list(tmp_path.glob("x/*.begun-*")) and not (tmp_path / "x" / LOCK).exists()


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, trained: Trained) -> None:
    trained.fails = "saved"
    with pytest.raises(DataError):
        run(tmp_path, "resume=auto")
    assert run(tmp_path, "resume=auto") == 0
    assert [(c.run_name, c.resume) for c in trained] == [("1-sft", ""), ("1-sft", "latest"), ("2-opd", "")]


def test_a_stage_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path, trained: Trained) -> None:
    trained.fails = "unsaved"
    with pytest.raises(DataError):
        run(tmp_path)
    (tmp_path / "x" / "2-opd" / "export").mkdir(parents=True)  # and one before it had written what it is
    assert run(tmp_path, "resume=latest") == 0
    assert [(c.run_name, c.resume) for c in trained] == [("1-sft", ""), ("1-sft", ""), ("2-opd", "")]
    assert len(list(tmp_path.glob("x/*.begun-*"))) == 2


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ("stages.sft.steps=4", "stage sft of .* is finished, with steps=2, but this command has steps=4"),
        ("stages.sft.seed=5", "with seed=0, but this command has seed=5"),
    ],
)
def test_other_settings_of_a_finished_stage_are_refused(
    tmp_path: Path, trained: Trained, changed: str, refusal: str
) -> None:
    run(tmp_path, stages=ASKED[:2])
    other = [changed if o.partition("=")[0] == changed.partition("=")[0] else o for o in ASKED]
    with pytest.raises(ConfigurationError, match=refusal):
        run(tmp_path, "resume=latest", stages=[*other, *([changed] if changed not in other else [])])
    assert run(tmp_path, "resume=latest", "checkpoint_minutes=3") == 0, "a setting that changes nothing"


def test_a_run_that_ended_otherwise_is_not_finished(tmp_path: Path, trained: Trained) -> None:
    run(tmp_path, stages=ASKED[:2])
    first = RunDirectory(tmp_path / "x" / "1-sft")
    (first.checkpoints / "step_1").mkdir()
    summary("1-sft", Outcome.STOPPED).write(first)
    trained.clear()
    assert run(tmp_path, "resume=latest") == 0
    assert [(c.run_name, c.resume) for c in trained] == [("1-sft", "latest"), ("2-opd", "")]


def test_a_finished_stage_without_its_export_is_said(tmp_path: Path, trained: Trained) -> None:
    run(tmp_path, stages=ASKED[:2])
    (tmp_path / "x" / "1-sft" / "export" / "config.json").unlink()
    with pytest.raises(DataError, match="has no export to start stage 2 of 2, opd from"):
        run(tmp_path, "resume=latest")


def test_settings_of_stages_are_kept_beside_them(tmp_path: Path, trained: Trained) -> None:
    run(tmp_path)
    kept = json.loads((tmp_path / "x" / staged_run.RECORD).read_text())
    assert list(kept) == ["1-sft", "2-opd"] and kept["2-opd"]["learner.lr"] == 5e-4


def test_the_plan_checks_every_stage_and_starts_nothing(tmp_path: Path) -> None:
    """The second stage's model is planned as the first one's, since its own does not exist yet."""
    given = [*TWO, *ASKED, f"output_dir={tmp_path}", "run_name=x", "dry_run=true"]
    done = opd("train", *given)
    assert done.returncode == 0, done.stderr
    assert "plan: sft, 2 steps" in done.stdout and "plan: full_reverse_kl, 3 steps" in done.stdout
    assert "stage 2 of 2: opd" in done.stdout and list(tmp_path.iterdir()) == []
    refused = opd("train", *given, "stages.opd.max_tokens=500")
    assert refused.returncode == 2 and "stage opd: " in refused.stderr and "max_model_len" in refused.stderr


def test_a_stage_alone_is_the_command_in_its_directory(tmp_path: Path, trained: Trained) -> None:
    run(tmp_path)
    again = run_config(trained[1].overrides)
    assert again.student.path == str(tmp_path / "x" / "1-sft" / "export") and again.method.name == "full_reverse_kl"
