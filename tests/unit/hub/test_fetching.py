"""Models and data sets from the stand-in: what is asked for, what a bad network does, and one sentence for each no."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf.folder import read_headers
from hf.hub.client import snapshot
from hf.hub.data import fetch_data
from hf.hub.ids import HubId, Kind, hub_id
from hf.hub.models import Fetched, Weights, fetch_model
from launch.artifacts.redaction import masked
from opd.errors import ConfigurationError, DataError, OpdError
from tests.hub_stand_in import Fault, Files, HubStandIn, folder_files
from tests.tiny_models import save, tiny_model
from tests.unit.hub.conftest import use

ENDINGS = (".jsonl", ".parquet")
ROWS = b'{"prompt": "1+1=", "answer": "2"}\n' * 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small model with what repositories have beside it."""
    files = folder_files(save(tiny_model(), tmp_path_factory.mktemp("model")))
    more = {
        "pytorch_model.bin": b"p" * 9000,
        "modeling.py": b"raise SystemExit",
        "README.md": b"# x",
        "onnx/m.onnx": b"o",
    }
    return files | more


def name(text: str, kind: Kind = Kind.MODEL) -> HubId:
    found = hub_id(kind, text)
    assert found is not None
    return found


def got(text: str, weights: Weights = Weights.WHOLE, counted: Callable[[int], None] = lambda _: None) -> Fetched:
    return fetch_model(snapshot(name(text), "student.path"), weights, lambda known, files: counted)


def refusal(ask: Callable[[], object]) -> str:
    began = time.monotonic()
    with pytest.raises(OpdError) as caught:
        ask()
    assert time.monotonic() - began < 150, "every wait has a deadline"
    sentence = str(caught.value)
    assert "\n" not in sentence and "signature" not in sentence and "Traceback" not in sentence
    return sentence


def test_a_model_is_fetched_whole_once_and_nothing_else(hub: HubStandIn, model: Files) -> None:
    commit = hub.add("model", "org/small", model)
    seen: list[int] = []
    first = got("org/small", counted=seen.append)
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {file.name for file in first.folder.iterdir()} == wanted
    assert all((first.folder / file).read_bytes() == model[file] for file in wanted)
    assert str(first.name) == f"org/small@{commit}" and first.asked == "org/small"
    assert sum(seen) == first.size == sum(len(model[file]) for file in wanted)
    hub.seen.clear()
    assert got(f"org/small@{commit}").folder == first.folder
    assert hub.seen == [f"GET /api/models/org/small/revision/{commit}"], "files that are here are not asked for again"


def test_a_moved_branch_is_another_folder_and_the_old_commit_stays(hub: HubStandIn, model: Files) -> None:
    before = got("org/small@main") if hub.add("model", "org/small", model) else None
    other = hub.add("model", "org/small", model | {"generation_config.json": b'{"eos_token_id": [2, 3]}'})
    after = got("org/small@main")
    assert before is not None and after.folder != before.folder and after.name.revision == other
    assert (after.folder / "generation_config.json").read_bytes() != (
        before.folder / "generation_config.json"
    ).read_bytes()


def test_headers_alone_have_every_name_and_shape_and_take_no_room(
    hub: HubStandIn, model: Files, tmp_path: Path
) -> None:
    hub.add("model", "org/small", model)
    thin = got("org/small", Weights.HEADERS)
    assert thin.headers
    (tmp_path / "whole").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "whole" / file).write_bytes(model[file])
    shapes = [{k: s.shape for k, s in read_headers(str(f), "x").items()} for f in (thin.folder, tmp_path / "whole")]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 5
    assert sum(n for path, n in hub.sent.items() if "elsewhere" in path) < 8192 < len(model["model.safetensors"])
    assert (thin.folder / "model.safetensors").stat().st_blocks * 512 < len(model["model.safetensors"])
    whole = got("org/small")
    assert not whole.headers and (whole.folder / "model.safetensors").read_bytes() == model["model.safetensors"]
    assert not got("org/small", Weights.HEADERS).headers, "what is here is looked at itself"
    assert not list(got("org/small", Weights.NONE).folder.glob("*.safetensors"))


def test_shards_are_those_of_the_index(hub: HubStandIn, model: Files) -> None:
    weights = {"model-1-of-2.safetensors": b"a" * 5000, "model-2-of-2.safetensors": b"b" * 6000}
    index = json.dumps({"weight_map": {"x": "model-1-of-2.safetensors", "y": "model-2-of-2.safetensors"}}).encode()
    rest = {k: v for k, v in model.items() if k != "model.safetensors"}
    stray = {"consolidated.safetensors": b"c" * 5000}
    hub.add("model", "org/large", rest | weights | stray | {"model.safetensors.index.json": index})
    assert {file.name for file in got("org/large").folder.glob("*.safetensors")} == set(weights)
    hub.add("model", "org/torn", rest | {"model.safetensors.index.json": index})
    assert "names 'model-1-of-2.safetensors', which is not there" in refusal(lambda: got("org/torn"))


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: HubStandIn, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # the library's is 10 MB
    hub.add("model", "org/small", model)
    weights = model["model.safetensors"]
    hub.faults += [Fault("/elsewhere/", break_after=20_000), Fault("/elsewhere/", break_after=10_000)]
    seen: list[int] = []
    folder = got("org/small", counted=seen.append).folder
    assert (folder / "model.safetensors").read_bytes() == weights
    assert hub.ranges == ["bytes=20000-", "bytes=30000-"]
    assert hub.sent[next(path for path in hub.sent if "elsewhere" in path)] == len(weights), "no byte came twice"


def test_a_hub_that_drips_is_given_up(hub: HubStandIn, model: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("model", "org/small", model)
    monkeypatch.setattr("hf.hub.client.GRACE_S", 0.5)
    monkeypatch.setattr("hf.hub.client.SLOWEST", 1e9)
    hub.faults.append(Fault("/elsewhere/", drip_s=0.2))
    assert "fewer than 1e+06 kB arrive in a second" in refusal(lambda: got("org/small"))


def test_a_busy_hub_is_asked_again_and_a_dead_one_is_given_up(hub: HubStandIn, model: Files) -> None:
    hub.add("model", "org/small", model)
    hub.faults += [Fault("/api/models", status=503, times=2), Fault("config.json", "HEAD", status=500)]
    assert (got("org/small").folder / "config.json").is_file()
    hub.faults.append(Fault("/api/models", status=503, times=10**6))
    sentence = refusal(lambda: snapshot(name("org/other"), "student.path"))
    assert "it answers 503" in sentence and "check the connection" in sentence
    hub.faults[:] = [Fault("/api/models", hold=True, times=10**6)]
    assert "Timeout" in refusal(lambda: snapshot(name("org/other"), "student.path"))


def test_a_hub_that_stops_in_the_middle_ends_with_a_sentence_and_a_way_on(
    hub: HubStandIn, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("model", "org/small", model)
    hub.faults.append(Fault("/elsewhere/", hold=True, times=10**6))
    assert "the same command goes on with what has not arrived" in refusal(lambda: got("org/small"))
    hub.faults.clear()
    hub.seen.clear()
    assert got("org/small").folder.is_dir()
    assert not [line for line in hub.seen if "tokenizer" in line], "what had arrived is not fetched again"


def test_offline_the_cache_answers_or_one_sentence(
    hub: HubStandIn, model: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("model", "org/small", model)
    hub.add("model", "org/thin", model)
    whole = got("org/small")
    got("org/thin", Weights.HEADERS)
    for url in (hub.url, "http://127.0.0.1:9"):
        use(monkeypatch, url, tmp_path / "home")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", url == hub.url)
        hub.seen.clear()
        again = got("org/small")
        assert again.offline and again.folder == whole.folder and again.name == whole.name and not hub.seen
        assert got(f"org/small@{whole.name.revision}").folder == whole.folder
        assert "without 'model.safetensors'; connect once" in refusal(lambda: got("org/thin"))
        unknown = refusal(lambda: got("org/never"))
        assert ("HF_HUB_OFFLINE is set" in unknown and "`hf download org/never`" in unknown) or "HTTPS_PROXY" in unknown


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "org/nothing",
            r"shows no model 'org/nothing' without a token; correct the name or the path.*`hf auth login`.*HF_TOKEN",
        ),
        ("org/private", r"shows no model 'org/private' without a token.*`hf auth login`, or set HF_TOKEN"),
        (
            "org/gated",
            r"is gated, and no token is set; accept its conditions on its page .*/org/gated\), then log in with",
        ),
        ("org/small@nowhere", r"has no revision 'nowhere' \(have: main\); name one of these, or a whole commit hash"),
        ("org/pickled", r"has only 'pytorch_model.bin', of a kind that is never opened"),
        ("org/empty", r"needs safetensors, but the repository has none"),
        ("org/adapter", r"the repository is a LoRA adapter; merge it"),
    ],
)
def test_every_no_is_one_sentence_with_what_helps(hub: HubStandIn, model: Files, text: str, sentence: str) -> None:
    hub.add("model", "org/small", model)
    hub.add("model", "org/private", model, private=True)
    hub.add("model", "org/gated", model, gated=True)
    hub.add("model", "org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"p"})
    hub.add("model", "org/empty", {"config.json": b"{}"})
    hub.add("model", "org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"})
    with pytest.raises((ConfigurationError, DataError), match=sentence):
        got(text)


def test_a_token_opens_what_is_private_and_is_never_said(
    hub: HubStandIn, model: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("model", "org/private", model, private=True, gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    folder = got("org/private").folder
    assert folder.is_dir() and masked(f"x {hub.token}") == "x <redacted>"
    assert not [f for f in (tmp_path / "home").rglob("*") if f.is_file() and hub.token.encode() in f.read_bytes()]
    assert "with the token that is set" in refusal(lambda: got("org/nothing"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 4)
    sentence = refusal(lambda: got("org/private@main"))
    assert "does not accept the token" in sentence and "hf auth login" in sentence and "wrong" not in sentence


def test_a_full_disk_is_told_before_anything_is_fetched(
    hub: HubStandIn, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("model", "org/small", model)
    known = snapshot(name("org/small"), "student.path")
    huge = type(known)(name=known.name, key=known.key, commit=known.commit, files=dict.fromkeys(known.files, 10**18))
    assert "GB free; make room, or set HF_HOME" in refusal(
        lambda: fetch_model(huge, Weights.WHOLE, lambda *_: lambda _: None)
    )


def test_a_cache_that_cannot_be_written_is_a_sentence(
    hub: HubStandIn, model: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("model", "org/small", model)
    (tmp_path / "file").write_text("no folder")
    use(monkeypatch, hub.url, tmp_path / "file")
    assert "set HF_HOME to another folder" in refusal(lambda: got("org/small"))


def data(text: str) -> Fetched:
    return fetch_data(snapshot(name(text, Kind.DATA), "prompts.path"), ENDINGS, lambda *_: lambda _: None)


def test_a_data_set_is_a_folder_of_its_split_in_order(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {f"data/train-0000{i}-of-00002.jsonl": ROWS + str(i).encode() for i in range(2)}
    commit = hub.add("dataset", "org/sums", shards | {"data/test-00000-of-00001.jsonl": ROWS, "README.md": b"# sums"})
    train = data("org/sums:train")
    assert str(train.name) == f"org/sums:default:train@{commit}"
    assert [f.read_bytes()[-1:] for f in sorted(train.folder.iterdir())] == [b"0", b"1"]
    assert not [line for line in hub.seen if "test-" in line], "only the split's files are fetched"
    assert data(f"org/sums:default:train@{commit}").folder == train.folder
    assert "no split 'dev'" in refusal(lambda: data("org/sums:default:dev"))
    assert "shows no data set 'org/none'" in refusal(lambda: data("org/none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert data("org/sums:train").folder == train.folder
    assert "without 'data/test-00000-of-00001.jsonl'" in refusal(lambda: data("org/sums:test"))


def test_half_a_data_set_is_never_taken_for_the_whole(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {f"data/train-0000{i}-of-00002.jsonl": ROWS + str(i).encode() for i in range(2)}
    hub.add("dataset", "org/sums", shards)
    train = data("org/sums")
    os.unlink((sorted(train.folder.iterdir())[1]).resolve())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "without 'data/train-00001-of-00002.jsonl'" in refusal(lambda: data("org/sums"))
    shutil.rmtree(train.folder.parents[3])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert len(list(data("org/sums").folder.iterdir())) == 2
