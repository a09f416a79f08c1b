"""Parked tensors come back bit for bit with all their views, and their memory is the system's meanwhile."""

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weight_sync.parking import discard, park, tensors_in, trim

SIZES = st.integers(0, 5000)


@given(sizes=st.lists(SIZES, min_size=1, max_size=5), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40)
def test_tensors_come_back_as_they_were(sizes: list[int], dtype: torch.dtype) -> None:
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    views = [tensor[size // 3 :] for tensor, size in zip(tensors, sizes, strict=True)]
    before = [tensor.clone() for tensor in tensors]
    parked = park([*tensors, *views, *tensors])
    parked.unpark(again=True)
    parked.park_again()
    parked.unpark()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    for tensor, view in zip(tensors, views, strict=True):
        tensor += 1
        assert torch.equal(view, tensor[len(tensor) // 3 :]), "a view is one of the same memory"


_PRESENT, _SWAPPED = 1 << 63, 1 << 62  # bits of an entry of /proc/self/pagemap


def resident(tensor: torch.Tensor) -> int:
    """How many bytes of its own memory the system holds, whatever else this process takes and frees meanwhile."""
    first, last = (at // mmap.PAGESIZE for at in (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    return int((entries & np.uint64(_PRESENT | _SWAPPED) != 0).sum()) * mmap.PAGESIZE


def test_their_memory_is_given_back_meanwhile() -> None:
    size = 64 << 20
    whole = torch.ones(size, dtype=torch.uint8)
    array = whole.numpy()  # an owner of the same memory that torch knows nothing of
    assert resident(whole) > size - 2 * 4096
    parked = park([whole])
    assert parked.nbytes > size - 2 * 4096
    assert resident(whole) <= 2 * 4096
    parked.unpark()
    assert bool((whole == 1).all()) and array.sum(dtype=np.int64) == size
    assert resident(whole) > size - 2 * 4096


def test_what_is_discarded_is_zero_when_it_is_used_again() -> None:
    size = 16 << 20
    whole = torch.ones(size, dtype=torch.uint8)
    assert resident(whole) > size - 2 * 4096
    discard([whole])
    trim()
    assert resident(whole) <= 2 * 4096
    assert int(whole[4096:-4096].sum(dtype=torch.int64)) == 0


def test_all_that_a_model_and_its_optimizer_hold_is_found_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    found = [tensor.data_ptr() for tensor in tensors_in([model, optimizer])]
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values()]
    assert {tensor.data_ptr() for tensor in held} <= set(found)


@pytest.mark.gpu
def test_memory_of_a_gpu_is_given_back_meanwhile() -> None:
    tensor = torch.randn(1 << 24, device="cuda")
    before, held = tensor.cpu(), torch.cuda.memory_allocated()
    parked = park([tensor])
    assert torch.cuda.memory_allocated() <= held - parked.nbytes
    parked.unpark()
    assert torch.equal(tensor.cpu(), before)
