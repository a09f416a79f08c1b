"""Names on the hub in a run's settings: every place, the plan, and the same commits for whatever goes on from a run."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hf.folder import has_config
from launch.config.run_config import RunConfig, run_config
from launch.plan.hub import forget, localized, record, recorded_in, remarks
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError, OpdError
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.mixed import MixedPrompts
from tests.command import ROOT, opd
from tests.hub_stand_in import HubStandIn, folder_files

ROWS = "".join(json.dumps({"prompt": "<bos> Mon buys 4 ?", "about": {"answers": str(i)}}) + "\n" for i in range(20))
DATA = ["prompts=dataset", "prompts.path=org/sums:train", "prompts.answer_column=about.answers", "prompts.task=shop"]
DATA += ["evaluation=dataset", "evaluation.prompts.path=org/sums:default:test@main", "prompts.prompts_per_step=4"]
MODELS = ["experiment=shop", "student.path=shop/student", "teacher.path=shop/teacher@main"]


@pytest.fixture
def shop(hub: HubStandIn) -> HubStandIn:
    """The embedded pair and a data set with nested answers."""
    for role in ("student", "teacher"):
        hub.add("model", f"shop/{role}", folder_files(ROOT / "assets" / "shop" / role) | {"x.bin": b"x"})
    held_out = ROWS.replace("buys", "finds")
    hub.add("dataset", "org/sums", {"train.jsonl": ROWS.encode(), "test.jsonl": held_out.encode(), "README.md": b"#"})
    return hub


def sha(hub: HubStandIn, kind: str, repo: str) -> str:
    return hub.repositories[kind, repo].branches["main"]


def planned(tmp_path: Path, *more: str) -> RunConfig:
    return run_config([*MODELS, *DATA, f"output_dir={tmp_path}", *more])


def test_every_place_is_a_folder_and_keeps_its_exact_name(shop: HubStandIn, tmp_path: Path) -> None:
    config = planned(tmp_path, "teachers.second.path=shop/teacher")
    found, inputs = localized(config)
    pinned = {one.setting: one.pinned for one in inputs}
    teacher, sums = sha(shop, "model", "shop/teacher"), sha(shop, "dataset", "org/sums")
    assert pinned == {
        "student.path": f"shop/student@{sha(shop, 'model', 'shop/student')}",
        "teacher.path": f"shop/teacher@{teacher}",
        "teachers.second.path": f"shop/teacher@{teacher}",
        "prompts.path": f"org/sums:default:train@{sums}",
        "evaluation.prompts.path": f"org/sums:default:test@{sums}",
    }
    assert has_config(found.student.path) and all(has_config(t.path) for t in found.teachers.values())
    settings = yaml.safe_load(found.text)
    assert settings["evaluation"]["prompts"]["path"] == pinned["evaluation.prompts.path"]
    assert settings["teachers"]["second"]["path"] == pinned["teachers.second.path"]
    again = run_config(found.overrides)
    assert again.student.path == pinned["student.path"] and localized(again)[0].student.path == found.student.path
    assert localized(found) == (found, ()), "folders are left alone"


def test_a_plan_reads_the_rows_and_names_them_after_the_data_set(shop: HubStandIn, tmp_path: Path) -> None:
    plan = make_plan(planned(tmp_path, "dry_run=true"))
    prompts = plan.config.prompts(0, plan.sources)
    assert prompts[0].id.startswith(f"org/sums:default:train@{sha(shop, 'dataset', 'org/sums')}/")
    assert {p.answer for p in prompts} < {str(i) for i in range(20)}
    assert [one.headers for one in plan.hub[:2]] == [True, True]
    assert sum(n for path, n in shop.sent.items() if "elsewhere" in path) < 20_000, "headers alone"


def test_a_run_that_goes_on_takes_the_commits_that_it_began_with(shop: HubStandIn, tmp_path: Path) -> None:
    config, inputs = localized(planned(tmp_path, "run_name=a"))
    (tmp_path / "a").mkdir()
    record(tmp_path / "a", inputs)
    before = sha(shop, "model", "shop/student")
    files = shop.repositories["model", "shop/student"].commits[before]
    after = shop.add("model", "shop/student", files | {"generation_config.json": b'{"eos_token_id": [2]}'})
    assert before != after
    forget()
    again = [*MODELS, *DATA, f"output_dir={tmp_path}"]
    for more in (["run_name=a"], ["run_name=b", f"resume={tmp_path}/a/checkpoints/step_4"]):
        assert localized(run_config([*again, *more]))[0].student.path == config.student.path
    assert localized(run_config([*again, "run_name=c"]))[0].student.path != config.student.path
    with pytest.raises(
        ConfigurationError, match=rf"student.path=shop/student@{after} is commit {after}, but .*@{before}; write"
    ):
        localized(run_config([*again, "run_name=a", f"student.path=shop/student@{after}"]))
    (tmp_path / "a" / "hub.json").write_text("[1]")
    with pytest.raises(OpdError, match=r"hub\.json is damaged"):
        recorded_in(tmp_path / "a")


def test_a_mixture_of_data_sets_and_folders(shop: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(ROWS)
    paths = {"hub": "org/sums:train", "own": str(tmp_path / "own.jsonl")}
    sources = {name: DatasetPrompts(path=path, prompts_per_step=2) for name, path in paths.items()}
    plain = planned(tmp_path)
    text = yaml.safe_load(plain.text)
    text["prompts"] = {"sources": {name: {"path": path} for name, path in paths.items()}}
    found, inputs = localized(replace(plain, prompts=MixedPrompts(sources=sources), text=yaml.safe_dump(text)))
    assert "prompts.sources.hub.path" in {one.setting for one in inputs}
    assert isinstance(found.prompts, MixedPrompts)
    files = found.prompts.files("prompts")
    assert files["prompts.sources.own.path"] == paths["own"] and Path(files["prompts.sources.hub.path"]).is_dir()
    assert "org/sums:default:train@" in yaml.safe_load(found.text)["prompts"]["sources"]["hub"]["path"]


def test_a_remote_teacher_needs_no_weights_here(shop: HubStandIn, tmp_path: Path) -> None:
    remote = ["teacher.backend=HTTP", "teacher.url=http://127.0.0.1:9", "method=topk_reverse_kl"]
    found, _ = localized(planned(tmp_path, *remote))
    assert has_config(found.teacher.path) and not list(Path(found.teacher.path).glob("*.safetensors"))


def test_other_nodes_do_not_see_a_folder_of_this_one(shop: HubStandIn, tmp_path: Path) -> None:
    config, inputs = localized(planned(tmp_path))
    assert not remarks(config, inputs)
    joined = replace(config, cluster=replace(config.cluster, address="auto"))
    (note,) = remarks(joined, inputs)
    assert "only on a shared file system" in note and config.student.path in note and "HF_HOME" in note


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("student.path=shop/studnet", "student.path 'shop/studnet' is no path here, and the hub"),
        ("teacher.path=shop/teacher@v2", "teacher.path: the model 'shop/teacher' has no revision 'v2' (have: main)"),
        (
            "prompts.path=org/sums",
            "prompts.path: the configuration 'default' of the data set 'org/sums' has several splits",
        ),
        (
            "evaluation.prompts.path=org/sums:dev",
            "evaluation.prompts.path: the data set 'org/sums' has no configuration",
        ),
        # a mistyped file, of which the hub is not asked
        ("prompts.path=data/trian.jsonl", "prompts.path 'data/trian.jsonl' does not exist"),
        ("evaluation.prompts.path=data/test.csv.gz", "evaluation.prompts.path 'data/test.csv.gz' does not exist"),
    ],
)
def test_a_command_says_which_setting_is_wrong(shop: HubStandIn, tmp_path: Path, override: str, sentence: str) -> None:
    settings: Sequence[str] = [*MODELS, *DATA, f"output_dir={tmp_path}", override]
    done = opd("train", *settings, "dry_run=true")
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 1 + done.stderr.count("fetching")


def test_a_dry_run_prints_every_commit(shop: HubStandIn, tmp_path: Path) -> None:
    done = opd("train", *MODELS, *DATA, f"output_dir={tmp_path}", "dry_run=true")
    assert done.returncode == 0, done.stderr
    for kind, repo, shown in (
        ("model", "shop/student", "shop/student"),
        ("dataset", "org/sums", "org/sums:default:test"),
    ):
        assert f"{shown}@{sha(shop, kind, repo)}" in done.stdout
    assert "headers alone" in done.stdout and not list(tmp_path.glob("*/config.yaml"))
