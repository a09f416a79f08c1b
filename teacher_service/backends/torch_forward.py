"""A teacher as a plain forward pass: exact, any ids, any k; whole distributions only where requested."""

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf.digest import file_digest
from hf.tokenizer_check import check_checkpoint
from opd.errors import ConfigurationError, OpdError
from opd.heavy_imports import uncollected
from opd.ports import PublishedWeights, ScoreAnswer, ScoreRequest
from opd.settings.devices import resolve_device, resolve_dtype
from opd.types import Fetch
from teacher_service.call_deadline import in_time
from teacher_service.config import START_S, TeacherConfig
from teacher_service.scoring import Bounds, Store, TeacherStats, completion_rows, length, scores_from_hidden
from weight_sync.parking import Parked, park, trim
from weight_sync.receiver import collect

if TYPE_CHECKING:
    from hf.packed_model import PackedModel


class TorchTeacher:
    """Scores completions with a Hugging Face model in this process (`opd.ports.LogprobTeacher`).

    `store` puts an array where the learner can fetch it and returns its handle; hidden states go that way.
    Calls may overlap; their forwards run one after the other.
    """

    def __init__(self, config: TeacherConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._lock = threading.Lock()
        self._model: "PackedModel | None" = None
        self._parked: Parked | None = None  # the weights while it sleeps; if they never change, also later
        self._asleep = False
        self._requests = self._scored = self._read = 0
        self._busy_s = 0.0

    async def ready(self) -> None:
        """Return when the model is loaded. Raises `ConfigurationError` if it cannot be used."""
        await in_time(self._config, asyncio.to_thread(self._loaded), "loading its model", at_least=START_S)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        """Scores per request, in order: float32 logprobs under the full softmax at temperature 1.

        What is said of a request does not depend on which others it came with (up to float rounding). Raises
        `DataError` for a request that cannot be read, and for a model that answers with NaN or infinity.
        """
        return await in_time(
            self._config, asyncio.to_thread(self._scores, requests), f"scoring {len(requests)} completions"
        )

    async def follow(self, weights: PublishedWeights, get: Fetch) -> None:
        """Take the student's published weights in (`TeacherConfig.mixup`); what is scored from now on sees them.

        Raises:
            DataError: they are damaged, or of another architecture; the teacher keeps its own.
        """
        await in_time(
            self._config, asyncio.to_thread(self._follow, weights, get), f"following version {weights.version}"
        )

    def _follow(self, weights: PublishedWeights, get: Fetch) -> None:
        model = self._loaded()
        delivered = collect(weights, get, "the teacher")
        with self._lock, torch.inference_mode():
            model.mix_in(delivered.tensors(), self._config.mixup)

    async def save(self, path: str) -> str:
        """Write the weights of now (of a teacher that follows the student) as safetensors; returns xxh3_128, hex.

        Raises:
            OpdError: the disk is full or cannot be written.
        """
        return await in_time(self._config, asyncio.to_thread(self._save, Path(path)), "saving its weights")

    def _save(self, path: Path) -> str:
        model = self._loaded()
        with self._lock:
            state = model.state()
        try:
            save_file(state, path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return file_digest(path)
        except (OSError, SafetensorError) as error:
            raise OpdError(
                f"cannot write {path}: {error}; the checkpoints before it are intact, make room or choose another "
                "output_dir and resume"
            ) from error

    async def restore(self, path: str) -> None:
        """Take back the weights that `save` wrote.

        Raises:
            DataError: they are of another architecture; the teacher keeps its own.
        """
        await in_time(self._config, asyncio.to_thread(self._restore, Path(path)), "loading its weights")

    def _restore(self, path: Path) -> None:
        model, state = self._loaded(), load_file(path)
        with self._lock, torch.inference_mode():
            model.mix_in(state.items(), 1.0)

    async def sleep(self) -> None:
        """Move the weights from the GPU to host memory, on a CPU to a file. Until `wake` nothing is scored."""
        await in_time(self._config, asyncio.to_thread(self._sleep), "falling asleep")

    async def wake(self) -> None:
        """Move back what `sleep` moved; does nothing if it is awake."""
        await in_time(self._config, asyncio.to_thread(self._wake), "waking up")

    def _sleep(self) -> None:
        if self._asleep:
            return
        model = self._loaded()
        with self._lock:  # a forward pass whose caller has left ends first
            if self._parked is None:
                self._parked = park(model.tensors())
            else:
                self._parked.park_again()
            self._asleep = True
        trim()

    def _wake(self) -> None:
        with self._lock:
            if self._asleep and self._parked is not None:
                constant = not self._config.mixup
                self._parked.unpark(again=constant)
                self._parked = self._parked if constant else None
                self._asleep = False

    async def stats(self) -> TeacherStats:
        """Counts of this teacher's work so far."""
        return TeacherStats(requests=self._requests, scored=self._scored, read=self._read, busy_s=self._busy_s)

    def _loaded(self) -> "PackedModel":
        with self._lock:
            if self._asleep:
                raise ConfigurationError("the teacher's weights are not where it computes: it sleeps; wake it before")
            if self._model is None:
                self._model = _load(self._config)
            return self._model

    @torch.inference_mode()
    def _scores(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        model = self._loaded()
        _bounds(model, self._config).check(requests)
        answers: list[ScoreAnswer | None] = [None] * len(requests)
        with self._lock:
            start = perf_counter()
            for members in microbatches([length(r) for r in requests], self._config.max_batch_tokens):
                chosen = [requests[i] for i in members]
                for i, answer in zip(members, self._microbatch(model, chosen), strict=True):
                    answers[i] = answer
                self._read += sum(length(r) for r in chosen)
            self._busy_s += perf_counter() - start
            self._requests += len(requests)
            self._scored += sum(len(r.token_ids) for r in requests)
        return [answer for answer in answers if answer is not None]

    def _microbatch(self, model: "PackedModel", requests: Sequence[ScoreRequest]) -> Iterator[ScoreAnswer]:
        sequences, rows = completion_rows(requests)
        everywhere = model.hidden([torch.from_numpy(s) for s in sequences])
        hidden = everywhere[torch.from_numpy(rows).to(everywhere.device)]
        return scores_from_hidden(requests, hidden, model.logits, self._config.head_chunk, self._store)


def microbatches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Positions in groups whose padded size (members times the longest) stays within `budget`, longest first.

    Neighbors in length go together, since attention pads to the longest of a group.
    """
    group: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and lengths[group[0]] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def _load(config: TeacherConfig) -> "PackedModel":
    check_checkpoint(config.path, "teacher")
    with uncollected():
        from hf.packed_model import load_packed  # seconds of transformers, which the driver can spare

    device = resolve_device(config.device, "teacher")
    dtype = resolve_dtype(config.dtype, device)
    if 0 < config.mixup < 1 and dtype is not torch.float32:
        raise ConfigurationError(
            f"a moving average needs float32 (a small share of a change vanishes in {dtype}), but the teacher with "
            f"teacher.mixup={config.mixup} computes in that; set teacher.dtype=FLOAT32"
        )
    return load_packed(config.path, dtype, device)


def _bounds(model: "PackedModel", config: TeacherConfig) -> Bounds:
    return Bounds(
        vocabulary=model.vocabulary,
        longest=min(config.max_batch_tokens, model.positions or config.max_batch_tokens),
        max_k=config.max_k,
        limits="one forward (the smaller of the model's positions and teacher.max_batch_tokens); shorten it or raise "
        "the limit",
    )
