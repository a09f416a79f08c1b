"""What an advice says to write is a name that exists, of the part that was meant, with a value that may be meant."""

import re
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli.compare.comparison import _SHARED, _SHORT
from launch.cli.flags import read_flags
from launch.cli.main import _OWN
from launch.config.composition.advice import advice
from launch.config.composition.aliases import ALIASES, ELSEWHERE, METHODS, REASONS
from launch.config.composition.compose import compose
from launch.config.composition.keys import check_names, keys
from launch.config.shipped_files import groups
from opd.errors import ConfigurationError
from tests.command import opd

ABOVE = ("", "trainer.", "actor_rollout_ref.actor.", "teacher.", "teacher_model.", "evaluation.", "data.", "student.")
KNOWN = keys(compose([]))
EVERY = {key.name for key in KNOWN}


def refused(*overrides: str) -> str:
    """The sentence that these overrides end with; "" if all names exist."""
    try:
        check_names(compose(overrides), overrides)
    except ConfigurationError as error:
        return str(error)
    return ""


def refused_flags(*flags: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_flags(flags)
    return str(caught.value)


def to_write(said: str) -> list[str]:
    """Overrides that a sentence says to write."""
    found = re.search(r"\bwrite (\S+=\S*(?: \S+=\S*)?)", said)
    return shlex.split(found[1].replace("NAME", "none").replace("VALUE", "...")) if found else []


NAMES = sorted([*ALIASES, *ELSEWHERE, "stpes", "seed_", "learner_lr", "system_column", "made_up"])


@settings(max_examples=40)
@given(name=st.sampled_from(NAMES), above=st.sampled_from(ABOVE))
def test_a_name_that_is_to_be_written_exists_and_is_of_the_part_that_was_meant(name: str, above: str) -> None:
    said = advice(f"{above}{name}=V", KNOWN)
    written = [override.partition("=")[0] for override in to_write(said)]
    assert all(key in EVERY or key in groups() or advice(key, KNOWN).startswith("it belongs to") for key in written)
    for role in ("teacher", "evaluation"):
        if above.startswith(role):
            assert all(key.startswith((role, "max_tokens")) for key in written), said


@settings(max_examples=20)
@given(name=st.sampled_from(NAMES), dashes=st.booleans())
def test_a_flag_leads_where_its_name_leads(name: str, dashes: bool) -> None:
    said = refused_flags(f"--{name.replace('_', '-') if dashes else name}", "V")
    assert said.endswith(f"KEY=VALUE; {advice(f'{name}=V', KNOWN)}")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher.temperature=2"], "teacher has path, "),
        (["evaluation.dataset=x.jsonl"], "write evaluation=dataset evaluation.prompts.path=x.jsonl"),
        (["teachers.code.path=x", "teachers.code.model_path=y"], "write teachers.code.path=y"),
        (["prompts=dataset", "prompts.system_column=s"], "the nearest is prompts.answer_column (column of the"),
        (["data.train_files=t.parquet"], "write prompts=dataset prompts.path=..."),
        (["data=train.jsonl"], "would do nothing"),
        (["hydra.run.dir=out"], "output_dir="),
        (["tracker=null"], "write tracker=none"),
        (["evaluation=false"], "write evaluation=none"),
        (["~evaluation"], "write evaluation=none"),
        (["experiment=shop", "~learner.lr"], "leave it out for 0.001, or set the value that is meant: learner.lr=..."),
        (["~evaluation.every"], "set the value that is meant: evaluation.every=..."),
        (["~steps=100"], "set the value that is meant: steps=..."),
        (["learner=null"], "name one of default, gpu"),
        (["evaluation_sets=null"], "write evaluation_sets=[]"),
        (["tracker=wandb,tensorboard"], "write tracker=[wandb,tensorboard]"),
        (["student=Qwen/Qwen3-0.6B"], "student=hf student.path=Qwen/Qwen3-0.6B"),
        (["prompts=train.jsonl"], "prompts=dataset prompts.path=train.jsonl"),
        (["method=GKD"], "did you mean method=gkd?"),
        (["method=reverse_kl"], "did you mean method=full_reverse_kl?"),
        (["gkd"], "write method=gkd"),
        (["dry_run"], "write dry_run=true"),
        (["method"], "write method=NAME"),
        (["config.yml"], "conf=DIR experiment=NAME"),
        (["models/mine"], "student=hf student.path=..."),
    ],
)
def test_what_strangers_type_leads_to_what_they_mean(overrides: list[str], says: str) -> None:
    assert says in refused(*overrides)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--pretrain", "m"], "write student=hf student.path=m"),
        (["--trainer.optim.lr", "1e-6"], "write learner.lr=1e-6"),
        (["--dry-run"], "write dry_run=true"),
        (["--use_vllm", "true"], "leave it out"),
        (["--deepspeed", "zero2"], "write learner.zero_stage=..."),
    ],
)
def test_what_strangers_type_with_dashes_does_too(flags: list[str], says: str) -> None:
    assert says in refused_flags(*flags)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("compare --methods gkd,sft", "write methods=gkd,sft"),
        ("eval --checkpoint runs/a", "write checkpoint=runs/a"),
        ("submit --address http://h:8265 train", "write address=http://h:8265"),
        ("submit address=http://h:8265 -- train", "there is no option --: what stands behind it"),
        ("serve-teacher --port=8300", "write port=8300"),
        ("export --push o/n", "write push=o/n"),
    ],
)
def test_arguments_of_a_command_are_written_without_dashes(command: str, says: str) -> None:
    assert says in opd(*command.split()).stderr


def test_a_command_s_own_arguments_are_listed_once() -> None:
    assert {*_OWN["compare"]} == {*_SHARED, *_SHORT}


def test_what_is_known_of_others_is_consistent() -> None:
    assert REASONS.keys() <= ALIASES.keys() and not ELSEWHERE.keys() & ALIASES.keys()
    assert set(METHODS.values()) <= set(groups()["method"]) and not METHODS.keys() & set(groups()["method"])
