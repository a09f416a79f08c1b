"""The command line: what leads where, what a typo costs, and that text stays the text that was written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch.artifacts.terminal import console
from launch.cli.main import main
from launch.config.composition.aliases import ALIASES, REASONS
from launch.config.composition.compose import compose
from launch.config.composition.keys import check_names, keys
from launch.config.shipped_files import groups, option_files
from opd.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[3]


def refused(*overrides: str) -> str:
    """The sentence that such a command line gets."""
    with pytest.raises(ConfigurationError) as caught:
        check_names(compose(overrides), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def every_key() -> set[str]:
    """The settings of all runs that a choice of options can make."""
    chosen = [[f"{group}={option}"] for group in ("method", "prompts") for option in groups()[group]]
    return {key.name for options in chosen for key in keys(compose(options))}


EVERY_KEY = every_key()


def test_every_alias_leads_to_a_setting_or_a_group_that_exists() -> None:
    for alias, target in ALIASES.items():
        exists = target[:-1] in groups() if target.endswith("=") else target in EVERY_KEY
        assert exists or (target.partition(".")[0] in groups() and _some_option_has(target)), (alias, target)
    assert REASONS.keys() <= ALIASES.keys()


def _some_option_has(target: str) -> bool:
    group = target.partition(".")[0]
    return any(target in {k.name for k in keys(compose([f"{group}={o}"]))} for o in groups()[group])


@pytest.mark.parametrize(
    ("override", "led"),
    [
        ("lr=1e-3", "write learner.lr=1e-3"),
        ("learner.learning_rate=1e-3", "write learner.lr=1e-3"),
        ("learner.lrr=1", "write learner.lr=1"),
        ("batch_size=32", "write prompts.prompts_per_step=..."),
        ("epochs=3", "write steps=..."),
        ("stepz=3", "did you mean 'steps'? write steps=3"),
        ("report_to=wandb", "opd train --help tracker"),
        ("prompts.path=train.jsonl", "it belongs to prompts=dataset"),
        ("method.scorer.k=3", "method=topk_jensen_shannon|method=local_support_matching"),
        ("teachers.code.pth=x", "write teachers.code.path=x"),
        ("learner.lora.rank=8", "write learner.lora.r=8"),
        ("learner.foo=1", "learner has ranks"),
        ("foo=1", "opd train --help WORD"),
        (" steps=3", "begins with no key"),
        ("=3", "begins with no key"),
        ("steps", "write steps=VALUE"),
        ("steps=1,2", "a list is written steps=[1,2]"),
        ("learner.lr=a=b", "quote its value: \"learner.lr='a=b'\""),
        ("method=topk_reverse", "did you mean method=topk_reverse_kl?"),
    ],
)
def test_a_wrong_override_leads_to_the_right_one(override: str, led: str) -> None:
    said = refused(override)
    assert override in said, "the one override that is wrong is named"
    assert re.search("|".join(re.escape(one) for one in led.split("|")), said), said


def test_only_the_wrong_one_of_many_overrides_is_named() -> None:
    said = refused("experiment=shop", "steps=5", "learner.lr=a=b", "seed=1")
    assert "learner.lr" in said and "experiment" not in said and "seed" not in said


# Half of the texts are made of the grammar's own signs, which are rare among all characters.
SIGNS = "\\[]{}():=, 'x1~$\""
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20) | st.text(SIGNS, max_size=8)


@settings(max_examples=60)
@given(TEXTS)
def test_what_is_written_for_a_text_is_what_it_holds(text: str) -> None:
    """Whatever Hydra's grammar makes of it: numbers, commas, spaces, quotes, equals signs."""
    structured = re.match(r"\s*[\[{'\"]", text) or "${" in text or text.strip().lower() in ("null", "???")
    if structured or text != text.strip() or re.match(r"\w+\(", text) or "~/" in text:
        return  # the grammar's own words for a list, a quoted text, nothing, an interpolation, a function
    assert compose([f"run_name={text}"]).run_name == text


@pytest.mark.parametrize(
    "text",
    [
        "1e3",
        "007",
        "1_000",
        "lr=1e-3",
        "#1",
        "ü",
        "a,b",
        "in/my data/step=40",
        "it's",
        "true",
        r"\[",
        r"a\,b",
        r"C:\(x) y",
    ],
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    node = compose(["prompts=dataset", f"run_name={text}", f"prompts.path={text}", f"teachers.code.path={text}"])
    assert [node.run_name, node.prompts.path, node.teachers.code.path] == [text] * 3


def test_a_home_directory_is_meant_where_a_shell_would_mean_it() -> None:
    assert compose(["teacher.path=~/models/T"]).teacher.path == str(Path.home() / "models" / "T")


def test_quotes_lists_and_numbers_keep_hydra_s_meaning() -> None:
    node = compose(
        ["run_name='a b'", "notes=[one,two]", "steps=7", "learner.lora.target_modules=[q_proj]", "resume=null"]
    )
    assert (node.run_name, list(node.notes), node.steps, node.resume) == ("a b", ["one", "two"], 7, None)


def test_every_key_says_its_type_and_the_shipped_options_are_all_known() -> None:
    for options in (["method=gkd"], ["method=minillm"], ["prompts=dataset"], ["prompts=shop_and_peak"]):
        for key in keys(compose(options)):
            assert key.kind or key.name.startswith("data"), key
    for group, files in option_files().items():
        for option in files:
            if group != "experiment":
                check_names(compose([f"{group}={option}"]))


@pytest.mark.parametrize(
    "group", ["method", "prompts", "student", "teacher", "learner", "evaluation", "evaluation_sets", "cluster"]
)
def test_every_setting_of_every_shipped_option_has_a_line_about_it(group: str) -> None:
    for option in groups()[group]:
        silent = [key.name for key in keys(compose([f"{group}={option}"])) if not key.text]
        assert not silent, f"{group}={option}: write a comment above these fields: {silent}"


TYPOS = (
    ["train", "stepz=3"],
    ["train", "learner.lrr=1"],
    ["eval", "lr=1"],
    ["doctor", "method=nope"],
    ["certify", "methodd=x"],
    ["serve-teacher", "teacher.pth=x"],
    ["trian"],
    ["train", "--help"],
    ["train", "--help", "lr"],
    ["train", "--cfg", "job"],
    ["train", "--info"],
    ["train", "-m", "steps=1,2", "learner.lrr=1"],
    ["train", "--lr", "1e-3"],
    ["--version"],
)
ANSWERED = {"--help", "--cfg", "--info", "--version"}


def test_a_typo_and_a_question_are_answered_before_anything_heavy_is_imported() -> None:
    program = (
        "import sys\nfrom launch.cli.main import main\n"
        f"for arguments in {TYPOS!r}:\n"
        "    try: main(arguments)\n"
        f"    except SystemExit as end: assert end.code == (0 if set(arguments) & {ANSWERED!r} else 2)\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'ray', 'vllm', 'deepspeed', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error:") == 9 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--help"], "method"),
        (["train", "--help", "learner"], "learner.weight_decay"),
        (["train", "--help", "lr"], "learner.final_lr_fraction"),
        (["train", "--help=learner.lora"], "learner.lora.lora_alpha"),
        (["train", "method=topk_reverse_kl", "--help", "method.scorer"], "method.scorer.k"),
        (["train", "--help", "method"], "topk_reverse_kl"),
        (["certify", "--help"], "opd certify"),
        (["help", "export"], "opd export"),
        (["train", "--cfg", "job", "steps=3"], "steps: 3"),
        (["train", "--cfg", "job", "--package", "learner", "learner.lr=2e-3"], "lr: 0.002"),
        (["train", "--cfg", "job"], "max_tokens: ${max_tokens}"),
        (["train", "--cfg", "job", "--resolve", "-p", "method"], "max_tokens: 77"),
        (["train", "--info", "defaults", "method=gkd", "seed=1"], "method/gkd.yaml"),
        (["train", "--info", "defaults-tree", "experiment=two_teachers"], "experiment: two_teachers"),
        (["train", "--info", "searchpath"], "/conf"),
        (["train", "-i"], "evaluation/shop.yaml"),
    ],
)
def test_help_leads_to_groups_options_and_settings(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ended(arguments, capsys)
    assert code == 0 and says in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--multirun", "steps=2"], "no override has several"),
        (["train", "steps=1,2"], "opd train -m"),
        (["compare", "-m", "seed=0,1"], "-m is for opd train"),
        (["train", "--cfg", "hydra"], "--cfg job shows the run's configuration"),
        (["train", "--cfg", "job", "-m", "seed=0,1"], "-m and --cfg were given; write one of them"),
        (["train", "--cfg", "job", "--package", "learnr"], "is not in the configuration"),
        (["train", "--cfg", "job", "-p", "steps"], "is 100, and no part of the configuration"),
        (["train", "--resolve"], "write --cfg job beside it"),
        (["train", "--info", "plugins"], "--info defaults|defaults-tree|searchpath|config|all"),
        (["train", "--info", "lr"], "is no view of the configuration"),
        (["train", "--run"], "a command runs by itself"),
        (["train", "--config-dir", "mine"], "write conf=mine"),
        (["train", "--config-name=shop"], "write experiment=shop"),
        (["train", "--experiment", "shop"], "write experiment=shop"),
        (["train", "--learning_rate", "1e-3"], "write learner.lr=1e-3"),
        (["train", "--model-name-or-path=m"], "write student=hf student.path=m"),
        (["train", "--cfg", "jobs"], "--cfg job"),
        (["trian"], "did you mean 'train'"),
    ],
)
def test_flags_of_other_programs_lead_to_overrides(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ended(arguments, capsys)
    assert code == 2 and says in " ".join(err.split())


def test_markup_in_names_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ended(["train", "[/b]=1"], capsys)
    assert code == 2 and "[/b]=1" in err
    console().print("[red]x :smile: [/b]")
    assert "[red]x :smile: [/b]" in capsys.readouterr().out


def test_there_is_one_maker_of_consoles() -> None:
    elsewhere = [
        path.name for path in (ROOT / "launch").rglob("*.py") if re.search(r"(?<!\w)Console\(", path.read_text())
    ]
    assert elsewhere == ["terminal.py"]


def test_the_configuration_that_is_shown_composes_again(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ended(["train", "--cfg", "job", "learner.lr=2e-3"], capsys)
    assert OmegaConf.create(out).learner.lr == 2e-3
