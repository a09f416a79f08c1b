"""A hub on the loopback, an empty cache, and the library set to both as its environment variables would."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import hf.hub.client
from launch.plan import hub as planned
from tests.hub_stand_in import HubStandIn, hub_stand_in


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """The stand-in; a test ends with nothing that a client must never do."""
    with hub_stand_in() as server:
        use(monkeypatch, server.url, tmp_path / "home")
        yield server
        close_session()
    assert not server.wrong


def use(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Set the library to the hub at `url` with the cache in `home`, without a token, with short waits."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    values |= {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
    values |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_DOWNLOAD_TIMEOUT": 1, "HF_STORED_TOKENS_PATH": str(home / "tokens")}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hf.hub.client, "ATTEMPT_S", 1.0)
    monkeypatch.setattr(hf.hub.client, "DEADLINE_S", 3.0)
    monkeypatch.setattr(hf.hub.client, "PAUSE_S", 0.05)
    planned.forget()
    close_session()
