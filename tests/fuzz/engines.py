"""`python -m tests.fuzz.engines [family=NAME]...`: engines of many families, given new weights by the learner's code.

For each family: a student in a folder, a real vLLM engine on it (float32, CPU), and three publications: the folder's
own weights, all of them changed, and the first again. After each the engine's log-probabilities of a text (80 ids of
the whole vocabulary, its padding included, longer than windows) are compared with the learner's. Prints one line of
JSON per family with the three greatest gaps in nats, or with the error.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from actors.config import StudentConfig, environment
from opd.settings.devices import Device, Dtype

os.environ |= environment(Device.CPU)  # before anything imports vLLM

import asyncio

import numpy as np
import torch
from transformers.utils import logging
from vllm.model_executor.models import registry

from actors.engine import VLLMEngine
from learner.engine import complete
from learner.model import Student, load_student
from learner.published import described, published
from learner.publishing import Publisher, StagedSender
from opd.errors import OpdError
from opd.ports import PublishedWeights, Sentinel, WeightShard
from tests.fuzz.families import make
from tests.fuzz.outcomes import ROWS
from weight_sync.receiver import assemble

TOKENS, LONGEST = 80, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A family's folder, and the publications of the student in it and of a changed one."""

    family: str
    folder: Path
    own: PublishedWeights
    changed: PublishedWeights


def prepared(family: str, folder: Path) -> Prepared:
    """`family` made, loaded as the learner does, and changed: every number by half of what its tensor scatters."""
    make(family, folder)
    student = load_student(str(folder), torch.float32, gradient_checkpointing=False)
    own, generator = version(student, 1), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, p in student.named():
            p.add_(p.std().nan_to_num(0).clamp(min=0.02) * 0.5 * torch.randn(p.shape, generator=generator))
    return Prepared(family=family, folder=folder, own=own, changed=version(student, 2))


def version(student: Student, number: int) -> PublishedWeights:
    """What a learner that holds `student` publishes; its sentinel refuses nothing."""
    parts = published(student)
    publisher = Publisher(
        *described(parts),
        chunk_bytes=20_000,
        rank=0,
        ranks=1,
        sender=StagedSender(lambda array: partial(np.copy, array.copy())),
    )
    ordered = [parts[i] for i in publisher.order]
    ids = np.random.default_rng(5).integers(0, student.vocabulary, TOKENS).astype(np.int32)
    logprobs = student.logprobs(torch.from_numpy(ids).long()).numpy()
    return assemble(
        [
            WeightShard(
                version=number,
                manifest=publisher.manifest,
                chunks=publisher.chunks(lambda first, last: complete(ordered[first:last], 0)),
                sentinel=Sentinel(ids=ids, logprobs=logprobs, tolerance=1e9),
            )
        ]
    )


def gaps(one: Prepared) -> list[float]:
    """The greatest gap between engine and learner after each publication, in nats."""
    config = StudentConfig(
        path=str(one.folder),
        max_model_len=LONGEST,
        dtype=Dtype.FLOAT32,
        kv_cache_bytes=16 << 20,
        max_num_seqs=4,
        deadline_s=60,
    )
    engine, loop = VLLMEngine(config, 11, lambda handle: handle()), asyncio.new_event_loop()
    try:
        loop.run_until_complete(engine.ready())
        versions = (one.own, one.changed, replace(one.own, version=3))
        return [loop.run_until_complete(engine.receive(each)).gap for each in versions]
    finally:
        loop.run_until_complete(engine.close())
        loop.close()


def main(arguments: Sequence[str]) -> int:
    """Try the families that are named, or all that are expected to work as students."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    lazy: Any = registry._LazyRegisteredModel
    # vLLM would ask a process of its own, which takes seconds, about each model's class.
    lazy.inspect_model_cls = lambda self: registry._ModelInfo.from_model_cls(self.load_model_cls())
    families = [a.removeprefix("family=") for a in arguments] or [f for f, row in ROWS.items() if not row.student]
    failed = False
    with TemporaryDirectory() as folder:
        # All students first: for some families vLLM changes transformers' own classes in this process.
        every = [prepared(family, Path(folder) / str(i)) for i, family in enumerate(families)]
        for one in every:
            try:
                outcome: dict[str, Any] = {"family": one.family, "gaps": gaps(one)}
            except OpdError as error:
                outcome, failed = {"family": one.family, "error": str(error)}, True
            print(json.dumps(outcome), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
