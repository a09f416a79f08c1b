"""Secrets planted in every place that takes one: refused without being repeated, or found nowhere afterwards."""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.artifacts.checkpoint_state import described
from launch.artifacts.redaction import HIDDEN, check_arguments, masked, redacted, remember, without_secret
from launch.artifacts.run_directory import RunDirectory, append_events, append_json, write_json
from launch.cli.submit import SubmitOptions, submit
from launch.config.composition.compose import compose
from launch.config.composition.keys import keys
from launch.config.run_config import run_config
from opd.errors import _HEAD, _TAIL, ConfigurationError
from opd.settings.secret import Secret
from opd.settings.validation import SHOWN, settings, shown
from tests.command import ROOT, opd

WORD = "hunter2-planted"
SHOP = "experiment=shop"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", SHOP, f"teacher.url=https://user:{WORD}@host:1/", "dry_run=true"),
        ("train", SHOP, f"teachers.other.url=http://{WORD}@host"),
        ("train", SHOP, f"student.path=https://user:{WORD}@host/model"),
        ("train", SHOP, f"notes=['see s3://key:{WORD}@bucket']"),
        ("train", SHOP, f"prompts.api_key={WORD}"),
        ("train", SHOP, f"+prompts.headers={{Authorization: 'Bearer {WORD}'}}"),
        ("train", SHOP, f"hf_token={WORD}"),
        ("train", SHOP, f"tracker.password='{WORD}'"),
        ("train", f"https://user:{WORD}@host"),
        ("eval", SHOP, f"checkpoint=https://user:{WORD}@host/x"),
        ("doctor", SHOP, f"output=ftp://u:{WORD}@host"),
        ("serve-teacher", f"teacher.url=http://u:{WORD}@h"),
        ("submit", f"address=http://u:{WORD}@h:8265", "train", "steps=1"),
        ("submit", "address=http://h:8265", "train", f"prompts.client_secret={WORD}"),
        ("certify", f"method.token={WORD}"),
        ("export", f"run=https://u:{WORD}@host", "output=x"),
        ("train", SHOP, "--show", f"my_credentials={WORD}"),
        ("nonsense", f"secret={WORD}"),
    ],
)
def test_a_command_line_takes_no_secret_and_does_not_repeat_it(arguments: tuple[str, ...]) -> None:
    done = opd(*arguments)
    assert done.returncode == 2 and WORD not in done.stdout + done.stderr
    assert "command line" in done.stderr and done.stderr.count("\n") == 1


def test_what_stands_in_the_environment_is_refused_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whatever name, wherever: what it is called in the environment says what it is."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "SERVICE_CREDENTIALS", "SSH_KEY"):
        monkeypatch.setenv(name, f"{name}-{WORD}")
        for argument in (f"notes=[{name}-{WORD}]", f"student.path=/x/{name}-{WORD}"):
            with pytest.raises(ConfigurationError, match=rf"in it \(the value of \${name}\)") as caught:
                check_arguments([argument])
            assert WORD not in str(caught.value)
    monkeypatch.setenv("SOME_TOKEN_PATH", "/a/path/and/no/secret")
    check_arguments(["prompts.path=/a/path/and/no/secret", "max_tokens=many", "learner.tokens_per_microbatch=300"])
    monkeypatch.setenv("MAX_TOKENS", "100000")
    monkeypatch.setenv("SSH_KEY_FOLDER", str(ROOT))
    check_arguments(["max_tokens=100000", f"student.path={ROOT}/student"])
    monkeypatch.setenv("DB_PASSWORD", "100000")
    with pytest.raises(ConfigurationError, match=r"the value of \$DB_PASSWORD"):
        check_arguments(["max_tokens=100000"])
    check_arguments(["prompts.api_key=${oc.env:MY_KEY}", "password=", "token=null", "student.path=user@host:x"])


def test_no_setting_of_ours_is_taken_for_a_secret() -> None:
    """Commands that are shown to be copied repeat every setting: a number of tokens is no token."""
    options = [["experiment=two_teachers"], [SHOP, "learner=lora"], [SHOP, "cluster=multi_node"], ["prompts=dataset"]]
    written = {f"{key.name}={value}" for chosen in options for key in keys(compose(chosen)) for value in (key.value, 7)}
    assert len(written) > 200 and {"max_tokens=7", "learner.tokens_per_microbatch=7"} <= written
    check_arguments(sorted(written))
    assert {without_secret(one) for one in written} == written


@pytest.mark.parametrize("key", ["hf_token", "+prompts.api_key", "a.password", "teacher.bearer"])
def test_a_command_that_is_shown_has_no_secret(key: str) -> None:
    assert {without_secret(f"{key}={value}") for value in (WORD, "12345678")} == {f"{key}={HIDDEN}"}
    assert without_secret(f"student.path=http://u:{WORD}@h/x") == f"student.path=http://{HIDDEN}@h/x"


@pytest.mark.parametrize("setting", ["student.path", "prompts.path", "teacher.model", "tracker.entity"])
def test_a_login_in_a_file_of_the_user_is_refused(tmp_path: Path, setting: str) -> None:
    group, name = setting.split(".")
    (tmp_path / "experiment").mkdir()
    text = {group: {name: f"https://user:{WORD}@host/x"}}
    own = tmp_path / "experiment" / "mine.yaml"
    own.write_text(f"# @package _global_\ndefaults: [shop, _self_]\n{yaml.safe_dump(text)}")
    done = opd("train", f"conf={tmp_path}", "experiment=mine", "dry_run=true")
    assert done.returncode == 2 and WORD not in done.stdout + done.stderr
    assert f"{setting} has a login in its URL" in done.stderr or "there is no setting" in done.stderr


def test_a_wrong_value_behind_a_secret_s_name_is_not_repeated() -> None:
    @dataclass(frozen=True, kw_only=True)
    @settings
    class Client:
        api_key: Secret
        timeout_s: float = 1.0
        password: int = 0

    assert Client(api_key="abc").api_key.reveal() == "abc"  # type: ignore[arg-type]
    for wrong in ({"api_key": [WORD]}, {"api_key": "x", "password": WORD}):
        with pytest.raises(ConfigurationError, match="<redacted>") as caught:
            Client(**wrong)  # type: ignore[arg-type]
        assert WORD not in str(caught.value)
    state = described(Client(api_key=Secret(WORD)), "client")
    assert state["client.api_key"] == HIDDEN and WORD not in json.dumps(state)


def test_no_file_of_a_run_has_a_known_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"env-{WORD}")
    remember({"prompts": {"api_key": f"yaml-{WORD}", "more": [{"auth_token": f"deep-{WORD}"}]}})
    directory = RunDirectory.create(tmp_path, "first")
    said = f"env-{WORD} yaml-{WORD} deep-{WORD} http://u:{WORD}@h"
    directory.write_config(f"notes: ['{said}']\na: {{secret_word: 'short {WORD}'}}\nb: 'see short {WORD}'\n")
    append_json(directory.metrics, {"text": said})
    write_json(directory.summary, {"error": said})
    append_events(directory.path / "trace.json", [{"name": said}])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4 and not [path for path in written if WORD in path.read_text()]
    json.loads(directory.summary.read_text())


secrets_of = st.text(st.characters(blacklist_categories=["Cs"]), min_size=8, max_size=40)


@given(secrets_of, st.sampled_from(["api_key", "hf_token", "password", "client_secret"]), st.integers(0, 3))
def test_a_secret_is_replaced_wherever_its_tree_has_it(secret: str, key: str, depth: int) -> None:
    tree: Any = {"a": {key: secret}, "b": [f"x {secret} y", {"c": secret}]}
    for _ in range(depth):
        tree = {"in": [tree], "beside": secret}
    assert secret not in _texts(redacted(tree))


def _texts(node: Any) -> str:
    if isinstance(node, dict):
        return "\0".join(_texts(value) for value in node.values())
    return "\0".join(map(_texts, node)) if isinstance(node, list) else str(node)


@given(secret=st.text("ABCDEFGH0123456789-_", min_size=12, max_size=200), share=st.floats(0, 1))
def test_a_secret_that_a_sentence_cuts_leaves_no_piece(secret: str, share: float) -> None:
    """Wherever the cut goes through it: a value that is shown, both ends of a message too long to be said."""
    inside = round(share * len(secret))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_PASSWORD", secret)
        said = [
            shown("x" * max(0, SHOWN - 1 - inside) + secret + "y" * SHOWN),
            str(ConfigurationError("x" * (_HEAD - inside) + secret + "y" * 2000)),
            str(ConfigurationError("x" * 2000 + secret + "y" * (_TAIL - inside))),
        ]
        assert all("..." in text or "left out" in text for text in said)
        pieces = {secret[i : i + 6] for i in range(len(secret) - 5)}
        for text in said:
            assert not {piece for piece in pieces if piece in masked(text)}, masked(text)


def test_what_nobody_expected_is_masked_on_the_screen() -> None:
    """A stack trace and a warning, in a program of their own."""
    program = (
        "import logging, os\nfrom launch.cli.errors import keep_secrets\nkeep_secrets()\n"
        "logging.getLogger('x').warning('w %s', os.environ['HF_TOKEN'])\n"
        "raise ValueError(os.environ['HF_TOKEN'] + ' http://u:' + os.environ['WORD'] + '@h')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={"PATH": "/bin", "PYTHONPATH": str(ROOT), "HF_TOKEN": f"env-{WORD}", "WORD": WORD},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" in done.stderr and f"w {HIDDEN}" in done.stderr
    assert WORD not in done.stderr


def test_a_job_s_command_has_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"cluster-{WORD}")
    options = SubmitOptions(address="http://127.0.0.1:1", working_dir=str(tmp_path))
    for argument in (f"notes=[cluster-{WORD}]", f"prompts.token={WORD}", f"teacher.url=http://u:{WORD}@h"):
        with pytest.raises(ConfigurationError) as caught:
            submit(["train", "output_dir=/shared", argument], options, None)  # type: ignore[arg-type]
        assert WORD not in str(caught.value)


def test_other_text_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("SHORT_KEY", "abc")
    for text in ("the token of abc", "http://host:80/a@b", "a\nb", ""):
        assert masked(text) == text
    assert run_config([SHOP]).text == masked(run_config([SHOP]).text)
    assert logging.lastResort is not None


def test_the_value_of_another_setting_is_no_secret() -> None:
    shown = {"rollout": {"max_tokens": "${max_tokens}"}, "hf_token": "${oc.env:HF_TOKEN,geheimnis}", "api_key": "${x}"}
    hidden = {"rollout": {"max_tokens": "${max_tokens}"}, "hf_token": "<redacted>", "api_key": "<redacted>"}
    assert redacted(shown) == hidden
