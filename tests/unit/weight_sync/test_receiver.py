"""A version arrives whole or not at all, whatever happens to its chunks on the way."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import publishing
from learner.publishing import Publisher, StagedSender
from opd.errors import DataError
from opd.loop.staleness import unknown_weights
from opd.ports import Manifest, PublishedWeights, Sentinel, WeightChunk, WeightShard
from tests.fault_matrix import Witness
from weight_sync.manifest import cut, digest, sizes, unpack
from weight_sync.receiver import _READERS, WeightReceiver, assemble, collect, digest_of

SENTINEL = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
SHAPES = [(3, 4), (5,), (), (2, 2, 3), (7,), (1, 9), (6,)]
KINDS = [torch.float32, torch.bfloat16, torch.float32, torch.uint8, torch.bfloat16, torch.float64, torch.float32]


def model(seed: int) -> dict[str, torch.Tensor]:
    """Parameters of many shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randint(0, 200, shape, generator=generator) for shape in SHAPES]
    return {f"p{i}": v.to(kind) for i, (v, kind) in enumerate(zip(values, KINDS, strict=True))}


def shares(version: int, seed: int, chunk_bytes: int = 40, ranks: int = 2, device: str = "cpu") -> list[WeightShard]:
    """What `ranks` ranks that all hold `model(seed)` publish; a handle is the bytes."""
    named = {name: value.to(device) for name, value in model(seed).items()}
    made = []
    for rank in range(ranks):
        publisher = Publisher(
            list(named),
            [tuple(t.shape) for t in named.values()],
            [t.dtype for t in named.values()],
            chunk_bytes=chunk_bytes,
            rank=rank,
            ranks=ranks,
            sender=StagedSender(np.copy),
        )
        ordered = [named[n] for n in publisher.manifest.names]
        chunks = publisher.chunks(lambda first, last, ordered=ordered: nullcontext(ordered[first:last]))
        made.append(WeightShard(version=version, manifest=publisher.manifest, chunks=chunks, sentinel=SENTINEL))
    return made


def weights(version: int, seed: int, **how: Any) -> PublishedWeights:
    return assemble(shares(version, seed, **how))


def value(handle: Any) -> np.ndarray:
    return handle


@given(chunk_bytes=st.integers(1, 300), ranks=st.integers(1, 4))
def test_any_cut_on_any_number_of_ranks_gives_the_same_parameters(chunk_bytes: int, ranks: int) -> None:
    parts = shares(3, 1, chunk_bytes=chunk_bytes, ranks=ranks)
    whole = assemble(parts[::-1])
    delivered = dict(collect(whole, value, "a test").tensors())
    assert delivered.keys() == model(1).keys()
    for name, tensor in model(1).items():
        assert delivered[name].dtype == tensor.dtype
        assert torch.equal(delivered[name], tensor)
    largest = max(sizes(whole.manifest))
    assert all(c.nbytes <= max(chunk_bytes, largest) for c in whole.chunks)
    counts = [len(part.chunks) for part in parts]
    assert max(counts) - min(counts) <= 1, "ownership is not round robin"
    assert [c.owner for c in whole.chunks] == [i % ranks for i in range(len(whole.chunks))]
    assert whole.digest == weights(4, 1, chunk_bytes=chunk_bytes).digest, "the digest depends on ranks or version"


class ReplicaFault(StagedSender):
    """An outlet in whose memory a byte changes after it was written."""

    def put(self, turn: int, number: int, nbytes: int, fill: Any) -> Any:
        def spoilt(room: np.ndarray) -> None:
            fill(room)
            room[nbytes // 2] ^= 1

        return super().put(turn, number, nbytes, spoilt)


@pytest.mark.parametrize("nbytes", [1, 1000, 3 << 20])
def test_the_digest_is_of_the_weights_and_not_of_what_the_copy_made_of_them(nbytes: int) -> None:
    """A tensor of several pieces arrives as it is; a copy that went wrong is found by whoever receives it."""
    tensor = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for kind in (StagedSender, ReplicaFault):
        publisher = Publisher(
            ["p"], [(nbytes,)], [torch.uint8], chunk_bytes=1 << 30, rank=0, ranks=1, sender=kind(np.copy)
        )
        chunks = publisher.chunks(lambda *_: nullcontext([tensor]))
        assert chunks[0].digest == digest(tensor.numpy())
        whole = assemble([WeightShard(version=1, manifest=publisher.manifest, chunks=chunks, sentinel=SENTINEL)])
        if kind is ReplicaFault:
            with pytest.raises(DataError, match=r"chunk 0 is .* damaged"):
                collect(whole, value, "a test")
        else:
            assert torch.equal(dict(collect(whole, value, "a test").tensors())["p"], tensor)


@pytest.mark.gpu
def test_weights_on_a_gpu_are_published_as_those_on_a_cpu() -> None:
    there, here = weights(1, 1, device="cuda"), weights(1, 1)
    assert there.digest == here.digest
    assert all(np.array_equal(a.handle, b.handle) for a, b in zip(there.chunks, here.chunks, strict=True))


@given(most=st.integers(1, 200), counts=st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_runs_cover_the_model_and_no_neighbors_would_fit_together(most: int, counts: list[int]) -> None:
    manifest = Manifest(
        names=tuple(map(str, range(len(counts)))),
        dtypes=("uint8",) * len(counts),
        shapes=tuple((n,) for n in counts),
        nbytes=sum(counts),
    )
    runs = cut(manifest, most)
    assert [i for first, last in runs for i in range(first, last)] == list(range(len(counts)))
    assert all(sum(counts[first:last]) <= most or last == first + 1 for first, last in runs)
    assert all(sum(counts[f:last]) + counts[last] > most for f, last in runs[:-1])


@dataclass(frozen=True)
class Message:
    """What may reach a receiver; `flip` is the bit to turn in a chunk, -1 for none."""

    kind: str
    version: int
    number: int = 0
    flip: int = -1


PUBLISHED = {version: weights(version, seed=version) for version in (1, 2, 3)}
CHUNKS = len(PUBLISHED[1].chunks)
messages = st.builds(
    Message,
    kind=st.sampled_from(["begin", "chunk", "chunk", "chunk", "chunk", "commit", "abort"]),
    version=st.sampled_from(sorted(PUBLISHED)),
    number=st.integers(-1, CHUNKS),
    flip=st.one_of(st.just(-1), st.integers(0, 10**6)),
)


def deliver(receiver: WeightReceiver, message: Message) -> dict[str, torch.Tensor] | None:
    """Hand a message over; what was committed, if it was a commit."""
    announced = PUBLISHED[message.version]
    if message.kind == "begin":
        receiver.begin(announced)
    elif message.kind == "abort":
        receiver.abort(message.version)
    elif message.kind == "commit":
        return dict(receiver.commit(message.version, announced.digest).tensors())
    else:
        data = announced.chunks[message.number % CHUNKS].handle.copy()
        if message.flip >= 0:
            bit = message.flip % (8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
        receiver.chunk(message.version, message.number, data)
    return None


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@given(history=st.lists(messages, max_size=60))
def test_no_history_commits_wrong_bytes_and_after_any_the_right_ones_commit(history: Sequence[Message]) -> None:
    """Loss, repetition, any order, damage and interleaved versions; then one version comes undamaged."""
    receiver = WeightReceiver("a test")
    for message in history:
        with suppress(DataError):
            committed = deliver(receiver, message)
            assert committed is None or same(committed, model(message.version))
    receiver.begin(PUBLISHED[2])
    for number in reversed(range(CHUNKS)):
        deliver(receiver, Message("chunk", 2, number))
    committed = deliver(receiver, Message("commit", 2))
    assert committed is not None and same(committed, model(2))


@pytest.mark.faults("chunk lost", "chunk repeated or reordered", "chunk damaged")
@given(order=st.permutations(range(CHUNKS)), data=st.data())
def test_order_and_repetition_are_nothing_and_loss_and_damage_are_everything(
    witness: Witness, order: list[int], data: Any
) -> None:
    repeated = data.draw(st.lists(st.sampled_from(order)))
    damaged, lost = data.draw(st.sampled_from(order)), data.draw(st.sampled_from(order))
    receiver = WeightReceiver("a test")
    receiver.begin(PUBLISHED[1])
    with pytest.raises(DataError, match=f"chunk {damaged} is .* damaged"):
        deliver(receiver, Message("chunk", 1, damaged, flip=data.draw(st.integers(0, 10**6))))
    for number in [n for n in [*order, *repeated, *order] if n != lost]:
        deliver(receiver, Message("chunk", 1, number))
    receiver.begin(PUBLISHED[1])  # said again: nothing is forgotten
    with pytest.raises(DataError, match=f"1 of its {CHUNKS} chunks did not come, the first is chunk {lost};"):
        deliver(receiver, Message("commit", 1))
    deliver(receiver, Message("chunk", 1, lost))
    with pytest.raises(DataError, match="damaged"):  # nor does damage undo what has come
        deliver(receiver, Message("chunk", 1, lost, flip=3))
    committed = deliver(receiver, Message("commit", 1))
    assert committed is not None and same(committed, model(1))
    with pytest.raises(DataError, match="not begun"):
        deliver(receiver, Message("commit", 1))
    witness("chunk lost")
    witness("chunk damaged", 2)
    witness("chunk repeated or reordered", len(repeated) + len(order))


@pytest.mark.faults("chunk damaged")
def test_every_single_bit_of_every_chunk_counts(witness: Witness) -> None:
    receiver = WeightReceiver("a test")
    receiver.begin(PUBLISHED[1])
    flips = [(n, bit) for n, chunk in enumerate(PUBLISHED[1].chunks) for bit in range(8 * chunk.nbytes)]
    assert len(flips) > 1000
    for number, bit in flips:
        with pytest.raises(DataError, match="damaged"):
            deliver(receiver, Message("chunk", 1, number, flip=bit))
    witness("chunk damaged", len(flips))


def test_what_does_not_belong_is_refused_by_name() -> None:
    receiver = WeightReceiver("the student engine")
    subject = "the student engine refuses weights version 2 and keeps its own: "
    with pytest.raises(DataError, match=rf"^{subject}it was not begun \(none is\)"):
        deliver(receiver, Message("chunk", 2, 0))
    receiver.begin(PUBLISHED[1])
    with pytest.raises(DataError, match=rf"^{subject}it was not begun \(version 1 is\)"):
        deliver(receiver, Message("chunk", 2, 0))
    receiver.begin(PUBLISHED[2])
    for number in (-1, CHUNKS):
        with pytest.raises(DataError, match=f"chunk {number} came, but it announced {CHUNKS}"):
            receiver.chunk(2, number, np.zeros(4, np.uint8))
    with pytest.raises(DataError, match=r"chunk 0 should have \d+ bytes, but 3 came"):
        receiver.chunk(2, 0, np.zeros(3, np.uint8))
    for number in range(CHUNKS):
        deliver(receiver, Message("chunk", 2, number))
    with pytest.raises(DataError, match=f"{PUBLISHED[1].digest} is to be committed"):
        receiver.commit(2, PUBLISHED[1].digest)


def changed(base: PublishedWeights, number: int, **fields: Any) -> PublishedWeights:
    """`base` with another chunk `number`, under the digest that fits."""
    chunks = [replace(c, **fields) if i == number else c for i, c in enumerate(base.chunks)]
    return renamed(replace(base, chunks=tuple(chunks)))


def renamed(value: PublishedWeights) -> PublishedWeights:
    return replace(value, digest=digest_of(value.manifest, value.chunks))


def test_an_announcement_that_does_not_add_up_is_refused() -> None:
    base = PUBLISHED[1]
    second = base.chunks[1]
    wrong: list[tuple[PublishedWeights, str]] = [
        (changed(base, 1, first=second.first - 1), "overlaps the one before"),
        (changed(base, 1, first=second.first + 1, last=second.last + 1), "leaves out parameters"),
        (changed(base, 1, last=second.first), "leaves out parameters or has none"),
        (changed(base, 1, nbytes=second.nbytes + 1), "its manifest gives chunk 1"),
        (renamed(replace(base, chunks=base.chunks[:-1])), r"its chunks end at parameter \d of 7"),
        (renamed(replace(base, manifest=replace(base.manifest, nbytes=3))), "lists 7 tensors of"),
        (renamed(replace(base, manifest=replace(base.manifest, names=("a",)))), "lists 1 names, 7 dtypes"),
        (renamed(replace(base, manifest=replace(base.manifest, dtypes=("load",) * 7))), "the dtype 'load'"),
        (replace(base, digest="0" * 16), "it calls itself 0000"),
        (replace(base, manifest=replace(base.manifest, names=tuple("gfedcba"))), "it calls itself"),
        (changed(base, 1, digest="0" * 16), "chunk 1 is .* damaged"),
    ]
    for announced, why in wrong:
        with pytest.raises(DataError, match=why):
            collect(announced, value, "a test")


def test_shares_of_different_versions_or_with_a_rank_missing_are_no_version() -> None:
    one, two = shares(1, 1)
    with pytest.raises(DataError, match="rank 1 publishes version 2 and rank 0 version 1"):
        assemble([one, replace(two, version=2)])
    with pytest.raises(DataError, match="the learner cannot publish version 1: chunk 1 has parameters"):
        assemble([one])


def test_whoever_fetches_in_vain_is_told() -> None:
    def gone(handle: Any) -> np.ndarray:
        raise DataError("the learner has ended")

    with pytest.raises(DataError, match="the learner has ended"):
        collect(PUBLISHED[1], gone, "a test")


def test_trajectories_are_known_by_version_and_digest(make: Any) -> None:
    published = {4: "aa", 5: "bb"}

    def why(digests: dict[int, str], versions: Sequence[int]) -> str:
        written = make.trajectory([1], [2] * len(versions), versions=np.asarray(versions, np.int32), digests=digests)
        return unknown_weights(written, published)

    assert why({4: "aa"}, [4, 4]) == why({4: "aa", 5: "bb"}, [4, 5]) == ""
    assert why({}, [0]) == "", "a teacher's or a data set's text claims no published weights"
    assert "version 6 wrote it, which was never published" in why({6: "aa"}, [6])
    assert "with weights bb, but aa was published" in why({4: "bb"}, [4])
    assert "weights of a checkpoint, but aa" in why({4: ""}, [4]), "an actor that came back with its disk's weights"
    assert "version 5" in why({4: "aa"}, [4, 5]), "an engine must name every version that wrote"
    assert "weights aa+bb" in why({4: "aa+bb"}, [4]), "two contents under one number"


def test_a_chunk_is_the_bytes_it_names() -> None:
    chunk: WeightChunk = PUBLISHED[1].chunks[0]
    assert len(chunk.handle) == chunk.nbytes


@pytest.mark.parametrize("odd", [1, 2, 3, 5])
def test_parameters_of_several_dtypes_come_back_wherever_they_begin(odd: int) -> None:
    """After an odd number of 16-bit words a 32-bit one begins in the middle of one; the others are views, no copies."""
    parameters = {
        "a": torch.randn(odd).bfloat16(), "b": torch.randn(3, 2), "c": torch.randn(odd).half(), "d": torch.randn(2)
    }  # fmt: skip
    flat = torch.cat([p.reshape(-1).view(torch.uint8) for p in parameters.values()])
    manifest = Manifest(
        names=tuple(parameters),
        dtypes=tuple(str(p.dtype).removeprefix("torch.") for p in parameters.values()),
        shapes=tuple(tuple(p.shape) for p in parameters.values()),
        nbytes=len(flat),
    )
    found = dict(unpack(manifest, 0, 4, flat))
    assert all(torch.equal(found[name], p) for name, p in parameters.items())
    inside = range(flat.data_ptr(), flat.data_ptr() + len(flat))
    shared = {name for name, tensor in found.items() if tensor.data_ptr() in inside}
    starts = {"a": 0, "b": 2 * odd, "c": 2 * odd + 24, "d": 4 * odd + 24}
    assert shared == {name for name, start in starts.items() if start % parameters[name].itemsize == 0}


def test_no_more_readers_than_are_good_for_a_machine_take_chunks_at_once() -> None:
    """Each holds a chunk; hundreds at once would hold the model twice."""
    now = most = 0
    lock = threading.Lock()

    def slow(handle: Any) -> np.ndarray:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.002)
        with lock:
            now -= 1
        return handle

    sent = weights(3, seed=3, chunk_bytes=4)
    assert len(sent.chunks) > _READERS
    collect(sent, slow, "a test")
    assert 1 < most <= _READERS


@pytest.mark.parametrize("copy", [publishing._copy, publishing._copy_from_gpu, publishing._copy_where_it_is])
def test_every_copy_lays_the_same_bytes_and_names_them(
    copy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one from a GPU waits for its last byte before it digests; none keeps a graph or needs a plain layout."""
    waited = list[bool]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    tensors = [torch.randn(3, 5).T.requires_grad_(), torch.randn(0), torch.randn(4).bfloat16(), torch.randn(())]
    room = torch.zeros(15 * 4 + 4 * 2 + 4, dtype=torch.uint8)
    said = copy(tensors, room)
    expected = b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    assert room.numpy().tobytes() == expected
    assert said == digest(room if copy is publishing._copy_where_it_is else room.numpy())
    assert bool(waited) == (copy is publishing._copy_from_gpu)


def test_publications_are_counted_from_one_and_chunks_from_zero() -> None:
    asked = list[tuple[int, int, int]]()

    class Counting(StagedSender):
        def put(self, turn: int, number: int, nbytes: int, fill: Any) -> Any:
            asked.append((turn, number, nbytes))
            return super().put(turn, number, nbytes, fill)

    publisher = Publisher(
        ["a", "b", "c"], [(3,)] * 3, [torch.float32] * 3, chunk_bytes=12, rank=1, ranks=2, sender=Counting(np.copy)
    )
    for _ in range(2):
        publisher.chunks(lambda first, last: nullcontext([torch.zeros(3)] * (last - first)))
    assert asked == [(1, 1, 12), (2, 1, 12)], "of three chunks rank 1 of 2 owns the middle one"


def test_one_buffer_is_used_for_all_that_fits_into_it() -> None:
    """Fresh memory costs as much as the copy."""
    places = list[tuple[int, int]]()
    staged = StagedSender(lambda array: places.append((array.ctypes.data, len(array))))
    for nbytes in (64, 64, 10, 64, 0):
        staged.put(1, 0, nbytes, lambda room: room.fill(1))
    assert [n for _, n in places] == [64, 64, 10, 64, 0] and len({place for place, n in places if n}) == 1


def test_a_buffer_of_another_size_than_its_manifest_says_is_refused() -> None:
    manifest = Manifest(names=("a", "b"), dtypes=("float32",) * 2, shapes=((2,), (3,)), nbytes=20)
    for wrong in (8, 11, 13):
        with pytest.raises(
            DataError, match=rf"parameters 1 to 1 need the 12 bytes .* there are {wrong}; publish again"
        ):
            list(unpack(manifest, 1, 2, np.zeros(wrong, np.uint8)))
