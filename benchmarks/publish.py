"""P7, P9: cost of publishing a version: against one memcpy, against the number of receivers, and in rollout time.

    python benchmarks/publish.py [rounds] [megabytes] [completions]
    python benchmarks/publish.py parts [rounds] [megabytes]       what P7 consists of, without Ray and vLLM

P7. A version of float32 tensors of 4 MiB in chunks of 32 MiB is laid out (copied and hashed), announced, fetched and
verified; nothing is loaded. The memcpy is of the same bytes between two buffers that were touched before. Receivers
are processes of this machine that all verify every byte; the time ends when the last has acknowledged. Where there are
fewer cores than receivers, the CPU time of the publisher plus that of a (median) receiver says what it would be with a
core each. Targets of the project: 1.5 of a memcpy for one receiver with the digest, and 1.2 from 1 to 16 receivers.

P9. A real engine (vLLM, the shop's student) writes completions (256, about a step's worth) while a version arrives
(in-flight swap, halfway), after which all goes on; or the version waits until all have been written (drain and swap,
two halves); or none comes. The stall is the time in which the engine's thread loads, over the whole; target 0.01.

All arms of a table take turns in this process; medians, and smallest to largest in brackets.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from actors.config import StudentConfig, environment
from learner.config import STREAMED
from learner.config import environment as learner_environment
from opd.settings.devices import Device, Dtype

os.environ |= environment(Device.CPU)  # before anything imports vLLM

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from launch.config.settings import ClusterConfig
from launch.services.ray_session.cluster import connected, fetch, store
from learner.publishing import Publisher, StagedSender
from opd.ports import GenerateRequest, PublishedWeights, Sampling, Sentinel, WeightSender, WeightShard
from weight_sync.manifest import digest
from weight_sync.receiver import assemble, collect
from weight_sync.shared_memory import SharedMemorySender, read

TENSOR, CHUNK = 4 << 20, 32 << 20
RECEIVERS = (1, 2, 4, 16)
STUDENT = Path(__file__).resolve().parents[1] / "assets" / "shop" / "student"
SENTINEL = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)


class Source:
    """Tensors, and the versions of them that are published through a sender."""

    def __init__(self, named: dict[str, torch.Tensor], sender: WeightSender) -> None:
        shapes, kinds = [tuple(t.shape) for t in named.values()], [t.dtype for t in named.values()]
        self._publisher = Publisher(list(named), shapes, kinds, chunk_bytes=CHUNK, rank=0, ranks=1, sender=sender)
        self._ordered = [named[name] for name in self._publisher.manifest.names]
        self._version = 0

    def publish(self, sentinel: Sentinel = SENTINEL) -> PublishedWeights:
        self._version += 1
        chunks = self._publisher.chunks(lambda first, last: nullcontext(self._ordered[first:last]))
        manifest = self._publisher.manifest
        return assemble([WeightShard(version=self._version, manifest=manifest, chunks=chunks, sentinel=sentinel)])


Arms = dict[Any, Callable[[], Any]]
Times = dict[Any, list[float]]


def interleaved(arms: Arms, rounds: int) -> tuple[Times, Times]:
    """Seconds, and CPU seconds of this process, of every arm in every round; after one that is not counted."""
    for work in arms.values():
        work()
    seconds: Times = {name: [] for name in arms}
    cpu: Times = {name: [] for name in arms}
    for _ in range(rounds):
        for name, work in arms.items():
            start, before = perf_counter(), process_time()
            work()
            seconds[name].append(perf_counter() - start)
            cpu[name].append(process_time() - before)
    return seconds, cpu


def ratio(above: Sequence[float], below: Sequence[float], target: str = "") -> str:
    """The median of the rounds' ratios, with their spread."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f}){target}"


def against_memcpy(tensors: dict[str, torch.Tensor], rounds: int) -> Table:
    """One receiver in this process."""
    shared, stored = Source(tensors, SharedMemorySender()), Source(tensors, StagedSender(store))
    flat = torch.cat([t.reshape(-1) for t in tensors.values()]).numpy()
    other = flat.copy()
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "model.safetensors"

    def by_file() -> None:
        save_file(tensors, file)
        load_file(file)

    arms: Arms = {
        "memcpy": lambda: np.copyto(other, flat),
        "shared memory": lambda: collect(shared.publish(), read, "a benchmark"),
        "object store": lambda: collect(stored.publish(), fetch, "a benchmark"),
        "safetensors file, no digest": by_file,
    }
    seconds, cpu = interleaved(arms, rounds)
    folder.cleanup()
    gigabytes = flat.nbytes / 1e9
    table = Table(title=f"P7: {gigabytes:.2f} GB in chunks of {CHUNK >> 20} MiB, one receiver")
    for column in ("arm", "seconds per GB", "of a memcpy", "CPU time of a memcpy's"):
        table.add_column(column)
    for name, values in seconds.items():
        target = " (target 1.5)" if name in ("shared memory", "object store") else ""
        wall = ratio(values, seconds["memcpy"], target)
        table.add_row(name, f"{median(values) / gigabytes:.3f}", wall, ratio(cpu[name], cpu["memcpy"]))
    return table


def parts(tensors: dict[str, torch.Tensor], rounds: int) -> Table:
    """Time of each part alone: the least possible work, and the actual work."""
    source = Source(tensors, SharedMemorySender())
    held = [source.publish(), source.publish()]
    flat = torch.cat([t.reshape(-1) for t in tensors.values()]).numpy()
    other, nbytes = flat.copy(), flat.nbytes
    cached = np.ascontiguousarray(flat[: STREAMED // flat.itemsize])

    def lay() -> None:
        held[:] = [held[1], source.publish()]

    arms: Arms = {
        "memcpy": lambda: np.copyto(other, flat),
        "digest of what lies in memory": lambda: digest(flat),
        "digest of what lies in a cache": lambda: [digest(cached) for _ in range(nbytes // cached.nbytes)],
        "laid out, with its digests": lay,
        "read back and verified": lambda: collect(held[1], read, "a benchmark"),
    }
    seconds, cpu = interleaved(arms, rounds)
    table = Table(title=f"P7: {nbytes / 1e9:.2f} GB through shared memory, in parts")
    for column in ("part", "of a memcpy", "CPU time of a memcpy's"):
        table.add_column(column)
    for name, values in seconds.items():
        table.add_row(name, ratio(values, seconds["memcpy"]), ratio(cpu[name], cpu["memcpy"]))
    return table


def receive(pipe: Connection) -> None:
    """Receive versions: verify and acknowledge each announcement, until there is none left."""
    while (announced := pipe.recv()) is not None:
        before = process_time()
        digest = collect(announced, read, "a benchmark").digest
        pipe.send((digest, process_time() - before))


@contextmanager
def receivers(count: int) -> Iterator[list[Connection]]:
    """Processes that wait for announcements."""
    context = get_context("fork")
    pairs = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=receive, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    try:
        yield [ours for ours, _ in pairs]
    finally:
        for (ours, _), process in zip(pairs, processes, strict=True):
            ours.send(None)
            process.join(10)


def to_many(tensors: dict[str, torch.Tensor], rounds: int) -> Table:
    """Publishing to more and more processes through shared memory."""
    source = Source(tensors, SharedMemorySender())
    paths: Times = {count: [] for count in RECEIVERS}
    with receivers(max(RECEIVERS)) as pipes:

        def deliver(count: int) -> None:
            before = process_time()
            announced = source.publish()
            for pipe in pipes[:count]:
                pipe.send(announced)
            sent = process_time() - before
            answers = [pipe.recv() for pipe in pipes[:count]]
            assert all(digest == announced.digest for digest, _ in answers)
            paths[count].append(sent + median(cpu for _, cpu in answers))

        seconds, _ = interleaved({count: partial(deliver, count) for count in RECEIVERS}, rounds)
    table = Table(title=f"P7: receivers on {os.cpu_count()} cores, shared memory")
    for column in ("receivers", "seconds", "of one receiver", "with a core each (CPU time, of one receiver)"):
        table.add_column(column)
    for count, values in seconds.items():
        target = " (target 1.2)" if count == RECEIVERS[-1] else ""
        path = ratio(paths[count][1:], paths[1][1:])
        table.add_row(str(count), f"{median(values):.3f}", ratio(values, seconds[1], target), path)
    return table


async def rollout_stall(rounds: int, completions: int) -> Table:
    """Delay of a rollout step by a version that arrives during it."""
    from transformers import AutoModelForCausalLM

    from actors.engine import VLLMEngine

    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    ids = torch.arange(3, 27)
    with torch.no_grad():
        log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    sentinel = Sentinel(ids=ids.numpy().astype(np.int32), logprobs=log_probs.numpy(), tolerance=1e-3)
    source = Source({n: p.detach() for n, p in model.named_parameters()}, SharedMemorySender())
    config = StudentConfig(path=str(STUDENT), max_model_len=128, dtype=Dtype.FLOAT32)
    engine = VLLMEngine(config, 0, read)
    await engine.ready()
    random = np.random.default_rng(0)
    contexts = [random.integers(3, 40, 12).astype(np.int32) for _ in range(completions)]
    sampling = Sampling(max_tokens=64)
    requests = [
        GenerateRequest(prompt_id=str(i), sample=0, context_ids=c, sampling=sampling) for i, c in enumerate(contexts)
    ]

    async def none() -> None:
        await engine.generate(requests)

    halfway = 0.0

    async def in_flight() -> None:
        # In the middle of the writing, as long as the round before took.
        writing = asyncio.create_task(engine.generate(requests))
        await asyncio.sleep(halfway)
        await engine.receive(source.publish(sentinel))
        await writing

    async def drained() -> None:
        await engine.generate(requests[: completions // 2])
        await engine.receive(source.publish(sentinel))
        await engine.generate(requests[completions // 2 :])

    arms = {"none arrives": none, "in-flight swap": in_flight, "drain and swap": drained}
    seconds: Times = {name: [] for name in arms}
    loads: Times = {name: [] for name in arms}
    for number in range(rounds + 1):  # the first is not counted
        for name, work in arms.items():
            before, start = (await engine.stats()).update_s, perf_counter()
            await work()
            if name == "none arrives":
                halfway = (perf_counter() - start) / 2
            if number:
                seconds[name].append(perf_counter() - start)
                loads[name].append((await engine.stats()).update_s - before)
    await engine.close()
    table = Table(title=f"P9: {len(requests)} completions of up to {sampling.max_tokens} tokens")
    for column in ("arm", "seconds", "of none", "loading, seconds", "stall: loading / all"):
        table.add_column(column)
    for name, values in seconds.items():
        target = " (target 0.01)" if name == "in-flight swap" else ""
        stall = ratio(loads[name], values, target)
        loading = f"{median(loads[name]):.3f}"
        table.add_row(name, f"{median(values):.2f}", ratio(values, seconds["none arrives"]), loading, stall)
    return table


def main(rounds: int = 9, megabytes: int = 256, completions: int = 256, *, in_parts: bool = False) -> None:
    wanted = learner_environment(Device.CPU)
    if any(os.environ.get(name) != value for name, value in wanted.items()):  # read once, when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    tensors = {f"p{i}": torch.rand(TENSOR // 4, generator=random) for i in range(max(1, (megabytes << 20) // TENSOR))}
    console = Console()
    if in_parts:
        console.print(parts(tensors, rounds))
        return
    console.print(to_many(tensors, rounds))  # first: its processes are forked before Ray and vLLM start threads
    with connected(ClusterConfig()):
        console.print(against_memcpy(tensors, rounds))
    console.print(asyncio.run(rollout_stall(rounds, completions)))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:] if word != "parts"), in_parts="parts" in sys.argv)
