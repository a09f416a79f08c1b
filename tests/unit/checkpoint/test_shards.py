"""What a learner keeps on disk: any cut into pieces reads back, and names and bytes survive a power cut."""

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import (
    FORMAT,
    KEYS,
    MASTER,
    RANDOM,
    Facts,
    Shards,
    ShardWriter,
    piece_name,
    shard_name,
)
from learner.checkpoints.optimizer_shards import Fragment, host_copies, partition
from opd.errors import DataError, OpdError
from tests.processes import open_files

FACTS = Facts(step=3, updates=2, skipped=1, rank=0, ranks=1, zero_stage=2, model="m", device="cpu")


def write(folder: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """One file for each rank."""
    folder.mkdir(exist_ok=True)
    for rank, tensors in enumerate(shards):
        facts = replace(FACTS, rank=rank, ranks=len(shards))
        checkpoint.write_shard(folder / shard_name(rank), tensors, facts)
    return folder


@given(data=st.data(), length=st.integers(1, 40), ranks=st.integers(1, 3), seed=st.integers(0, 9))
def test_any_part_is_read_out_of_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, length: int, ranks: int, seed: int
) -> None:
    """Whoever wrote which, in whatever order, also where pieces overlap; and a hole is found if it is asked for."""
    values = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    bounds = st.tuples(st.integers(0, length - 1), st.integers(1, 12)).map(lambda b: (b[0], min(length, sum(b))))
    pieces = data.draw(st.lists(bounds, max_size=8))
    if data.draw(st.booleans()):  # whole, by cuts
        cuts = sorted({0, length, *(first for first, _ in pieces)})
        pieces = [*pieces, *pairwise(cuts)]
    shards: list[dict[str, torch.Tensor]] = [{RANDOM: torch.zeros(1, dtype=torch.uint8)} for _ in range(ranks)]
    longest: dict[int, int] = {}
    for first, last in pieces:  # a rank has one piece that begins at an element
        if last > longest.get(first, 0):
            longest[first] = last
    for first, last in longest.items():
        owner = data.draw(st.integers(0, ranks - 1))
        shards[owner][piece_name("exp_avg", first, "a/b.weight")] = values[first:last].clone()
    read = Shards(write(tmp_path_factory.mktemp("shards"), *shards))
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    held = {i for first, last in longest.items() for i in range(first, last)}
    if held.issuperset(range(start, stop)):
        assert torch.equal(read.read("exp_avg", "a/b.weight", start, stop), values[start:stop])
    else:
        missing = min(set(range(start, stop)) - held)
        with pytest.raises(DataError, match=rf"exp_avg of a/b\.weight only up to element {missing} of {stop}; take"):
            read.read("exp_avg", "a/b.weight", start, stop)


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5), ranks=st.integers(1, 6))
def test_ranks_that_all_hold_everything_write_each_element_once_and_equally_many(
    lengths: Sequence[int], ranks: int
) -> None:
    """As host copies that no graph hangs on."""
    held = [
        Fragment(
            parameter=str(i),
            start=100 * i,
            state={key: torch.arange(float(n)).requires_grad_(key == MASTER) + k for k, key in enumerate(KEYS)},
        )
        for i, n in enumerate(lengths)
    ]
    shares = [host_copies(held, 0, rank, ranks) for rank in range(ranks)]
    assert all(len(piece) and not piece.requires_grad for share in shares for piece in share.values())
    for fragment in held:
        for key, values in fragment.state.items():
            written = torch.zeros(len(fragment)), torch.zeros(len(fragment))
            lengths_of = []
            for share in shares:
                own = [(n.split("/"), piece) for n, piece in share.items() if n.startswith(f"{key}/")]
                mine = [(int(n[1]) - fragment.start, piece) for n, piece in own if n[2] == fragment.parameter]
                lengths_of.append(sum(len(piece) for _, piece in mine))
                for first, piece in mine:
                    written[0][first : first + len(piece)] += piece
                    written[1][first : first + len(piece)] += 1
            assert torch.equal(written[0], values) and bool((written[1] == 1).all())
            assert max(lengths_of) - min(lengths_of) <= 1


def test_a_rank_that_holds_its_own_part_writes_all_of_it_as_a_copy() -> None:
    state = {key: torch.arange(5.0) for key in KEYS}
    for stage in (1, 2, 3):
        share = host_copies([Fragment(parameter="p", start=7, state=state)], stage, 1, 2)
        assert {name: p.tolist() for name, p in share.items()} == {f"{k}/7/p": [0, 1, 2, 3, 4] for k in KEYS}
        assert not {p.data_ptr() for p in share.values()} & {p.data_ptr() for p in state.values()}


@given(elements=st.integers(1, 50), ranks=st.integers(1, 9))
def test_a_parameter_in_equal_padded_parts_lies_on_all_ranks_once(elements: int, ranks: int) -> None:
    each = -(-elements // ranks)
    parts = [partition(elements, each, rank) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(elements))
    assert all(part.start == rank * each for rank, part in enumerate(parts))


def test_a_file_is_safetensors_with_aligned_data_and_its_facts(tmp_path: Path) -> None:
    tensors = {"master/0/p": torch.randn(3), RANDOM: torch.arange(5, dtype=torch.uint8), "exp_avg/12/p": torch.randn(2)}
    for device in ("c", "cp", "cpu", "cpu0", "cpu00", "cpu000", "cpu0000", "cpu00000"):  # headers of all lengths
        facts = replace(FACTS, device=device)
        digest = checkpoint.write_shard(tmp_path / "f", tensors, facts)
        assert digest == checkpoint.digest(tmp_path / "f") and len(digest) == 32
        content = (tmp_path / "f").read_bytes()
        header = int.from_bytes(content[:8], "little")
        assert header % 8 == 0 and len(content) == 8 + header + 12 + 5 + 8
        with safe_open(str(tmp_path / "f"), framework="pt") as file:
            said = file.metadata()
            assert (said["format"], json.loads(said["facts"])) == (FORMAT, {**vars_of(facts)})
            assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())


def vars_of(facts: Facts) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in Facts.__dataclass_fields__}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "is rank 0 of 2 at step 3, but rank 1 of 2 at step 3 belongs there"),
        ({"ranks": 3}, "is rank 1 of 3 at step 3, but rank 1 of 2"),
        ({"step": 4}, "is rank 1 of 2 at step 4, but"),
        ({"model": "other"}, "is rank 1 of 2 at step 3, but"),
        ({"rank": 2}, "it says rank 2 of 2"),
        ({"rank": -1}, "it says rank -1 of 2"),
        ({"rank": True}, "its rank is true"),
        ({"updates": "2"}, "its updates is"),
    ],
    ids=str,
)
def test_files_that_do_not_belong_together_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path, {}, {})
    assert [facts.rank for facts in Shards(tmp_path).facts] == [0, 1]
    facts = vars_of(replace(FACTS, rank=1, ranks=2)) | changes
    save_file({}, tmp_path / shard_name(1), metadata={"format": FORMAT, "facts": json.dumps(facts)})
    with pytest.raises(DataError, match=says):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "fine"),
    [
        ("master/123456789012345678/p", torch.float32, True),
        ("master/1234567890123456789/p", torch.float32, False),
        ("master/-1/p", torch.float32, False),
        ("master/x/p", torch.float32, False),
        ("master/0/p", torch.uint8, False),
        ("exp_avg/0/p", torch.int32, False),
        ("foreign/x/p", torch.uint8, True),
    ],
    ids=str,
)
def test_a_piece_begins_at_a_number_and_is_float32(name: str, kind: torch.dtype, fine: bool, tmp_path: Path) -> None:
    facts = json.dumps(vars_of(FACTS))
    save_file({name: torch.zeros(2, dtype=kind)}, tmp_path / shard_name(0), metadata={"format": FORMAT, "facts": facts})
    if fine:
        Shards(tmp_path)
        return
    with pytest.raises(DataError, match=rf"has a piece '{name}'; it is foreign"):
        Shards(tmp_path)


def test_a_generator_goes_on_where_the_same_rank_was_on_such_a_device(tmp_path: Path) -> None:
    states = [torch.full((3,), rank, dtype=torch.uint8) for rank in range(2)]
    shards = Shards(write(tmp_path, *({RANDOM: state} for state in states)))
    for rank, state in enumerate(states):
        found = shards.random_state(rank, "cpu")
        assert found is not None and torch.equal(found, state)
    assert shards.random_state(2, "cpu") is None and shards.random_state(0, "cuda") is None
    with pytest.raises(DataError, match="lacks the state of its generator; it is foreign"):
        Shards(write(tmp_path / "without", {})).random_state(0, "cpu")


def test_what_was_written_is_waited_for_within_a_deadline_and_the_thread_then_ends(tmp_path: Path) -> None:
    writer, fifo = ShardWriter(), tmp_path / "slow"
    with pytest.raises(OpdError, match="no checkpoint was begun"):
        writer.finish(1.0)
    os.mkfifo(fifo)
    writer.begin(fifo, {}, FACTS)  # stands until somebody reads
    with pytest.raises(OpdError, match=r"was not on the disk within 0 s; choose a faster disk"):
        writer.finish(0.05)
    with fifo.open("rb") as reader:
        assert len(reader.read()) > 8
        with pytest.raises(OpdError, match="cannot write"):  # nothing can be flushed there
            writer.finish(60.0)
    writer.begin(tmp_path / "fast", {}, FACTS)
    assert writer.finish(60.0) == ("fast", checkpoint.digest(tmp_path / "fast"))
    writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


class Disk:
    """Remembers what the disk was told to keep, and what stood at the names below `root` then."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.flushed, self._root, self._fsync = list[tuple[str, int, list[str]]](), root, os.fsync
        patch.setattr(os, "fsync", self._flush)

    def _flush(self, descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        names = sorted(str(p.relative_to(self._root)) for p in self._root.rglob("*"))
        self.flushed.append((place.name, os.fstat(descriptor).st_size if place.is_file() else -1, names))
        self._fsync(descriptor)


def test_a_file_is_flushed_once_all_of_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", 16)
    disk = Disk(monkeypatch, tmp_path)
    digest = checkpoint.write_shard(tmp_path / "f", {"master/0/p": torch.randn(10)}, FACTS)
    assert [(name, size) for name, size, _ in disk.flushed] == [("f", (tmp_path / "f").stat().st_size)]
    assert checkpoint.digest(tmp_path / "f") == digest


@pytest.mark.parametrize("before", [[], ["step_1"], [".step_1.partial"], [".step_1.old"], ["step_1", ".step_1.old"]])
def test_a_directory_appears_at_once_with_names_that_are_on_the_disk(
    before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever interrupted runs have left; and no file stays open."""
    root = tmp_path / "run" / "checkpoints"
    for name in before:
        (root / name / "old").mkdir(parents=True)
    final = root / "step_1"
    checkpoint.start(final)
    assert list(checkpoint.partial(final).iterdir()) == []
    (checkpoint.partial(final) / "learner" / "deep").mkdir(parents=True)
    (checkpoint.partial(final) / "learner" / "new").write_text("x")
    assert final.exists() == ("step_1" in before)
    disk = Disk(monkeypatch, root)
    checkpoint.commit(final)
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*")) == [
        "step_1", "step_1/learner", "step_1/learner/deep", "step_1/learner/new"
    ]  # fmt: skip
    *inside, last = disk.flushed
    assert sorted(name for name, _, _ in inside) == [".step_1.partial", "deep", "learner"]
    assert all((("step_1" in names) == ("step_1" in before)) for _, _, names in inside), "renamed before it was flushed"
    assert last[0] == "checkpoints" and "step_1/learner/new" in last[2]
    assert (".step_1.old" in last[2]) == ("step_1" in before), "the older one goes once the new one is sure to stay"
    assert not [place for place in open_files() if place.startswith(str(tmp_path))]
