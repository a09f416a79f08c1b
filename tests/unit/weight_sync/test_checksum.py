"""The checksum of bytes on a device: its definition in plain Python, and what it cannot overlook."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd import splitmix64
from weight_sync import checksum as module
from weight_sync.checksum import checksum

MASK = (1 << 64) - 1


def plain(data: bytes) -> str:
    """The definition, one word at a time."""
    padded = data + bytes(-len(data) % 8)
    total = 0
    for place in range(len(padded) // 8):
        word = int.from_bytes(padded[8 * place : 8 * place + 8], "little")
        word ^= (place + 1) * 0x9E3779B97F4A7C15 & MASK
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
        word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
        total += word ^ word >> 31
    return f"sum64:{total & MASK:016x}"


@given(st.integers(0, MASK) | st.sampled_from([0, (1 << 63) - 1, 1 << 63, MASK]))
def test_a_number_of_64_bits_has_the_same_bits_as_an_int64(number: int) -> None:
    """Where torch takes larger ones, too, that is not promised."""
    signed = splitmix64.signed(number)
    assert -(1 << 63) <= signed < 1 << 63 and signed % (1 << 64) == number


def tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@given(st.binary(max_size=200))
def test_it_is_what_its_docstring_says(data: bytes) -> None:
    assert checksum(tensor(data)) == plain(data)


def test_it_does_not_depend_on_how_the_work_is_cut_or_where_the_bytes_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(torch.randint(0, 256, (1003,), generator=torch.Generator().manual_seed(0)).tolist())
    monkeypatch.setattr(module, "_PIECE", 7)
    assert checksum(tensor(data)) == plain(data)
    for start in range(9):
        assert checksum(tensor(data)[start:]) == plain(data[start:]), "a view that is not aligned"


@given(st.binary(min_size=1, max_size=64), st.integers(0, 10**6))
def test_every_flipped_bit_is_seen(data: bytes, flip: int) -> None:
    changed = bytearray(data)
    changed[flip // 8 % len(data)] ^= 1 << flip % 8
    assert checksum(tensor(data)) != checksum(tensor(bytes(changed)))


@given(st.lists(st.integers(0, MASK), min_size=2, max_size=8, unique=True), st.data())
def test_words_that_change_places_are_seen(words: list[int], data: st.DataObject) -> None:
    i, j = data.draw(st.permutations(range(len(words))))[:2]
    swapped = list(words)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    one, other = (b"".join(w.to_bytes(8, "little") for w in each) for each in (words, swapped))
    assert checksum(tensor(one)) != checksum(tensor(other))


@pytest.mark.gpu
def test_a_gpu_says_the_same() -> None:
    data = torch.randint(0, 256, (20_000_003,), dtype=torch.uint8)
    assert checksum(data.cuda()) == checksum(data)


def test_bytes_that_lie_as_words_do_are_not_copied_and_others_are() -> None:
    """Where a storage begins in the middle of a word, neither its offset nor its address says enough."""
    data = np.arange(200, dtype=np.uint8)
    aligned = data[-data.ctypes.data % 8 :]
    for start in range(0, 40, 8):
        piece = torch.from_numpy(aligned)[start : start + 64]
        assert module._words(piece).data_ptr() == piece.data_ptr()
    for shift in range(1, 8):  # the storage itself is shifted, and the view by what is left to a word, or not at all
        for offset in (0, 8 - shift, 8):
            piece = torch.from_numpy(aligned[shift:])[offset : offset + 64]
            assert checksum(piece) == plain(bytes(piece.tolist()))
            assert module._words(piece).data_ptr() != piece.data_ptr()
