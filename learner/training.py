"""What a rank does: losses over micro-batches, updates, weights for the engines, checkpoints, exports."""

import hashlib
import math
import resource
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from transformers.utils.hub import cached_file

from learner import checkpoint, engine
from learner.config import LearnerConfig, learning_rate
from learner.model import Student, load_head, load_student, sentinel_ids
from learner.publishing import Publisher
from opd.devices import resolve_device, resolve_dtype
from opd.errors import DataError
from opd.logits import Evaluate, StudentLogits, flat_loss, read
from opd.method import Objective
from opd.ports import Outlet, Sentinel, Share
from opd.routing import by_teacher
from opd.tally import Tally
from opd.types import Batch, Fetch, Scores, StepReport, TokenLoss

MakeOutlet = Callable[[], Outlet]

_STATE = "state"  # DeepSpeed's files within a checkpoint
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Training:
    """The student under DeepSpeed, on one of `config.ranks` ranks. Making one joins the others."""

    def __init__(self, config: LearnerConfig, rank: int, host: str, port: int, seed: int, steps: int) -> None:
        self._config, self._rank, self._steps, self._updates = config, rank, steps, 0
        self._device = resolve_device(config.device, "learner")
        self._dtype = resolve_dtype(config.dtype, self._device)
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        torch.manual_seed(seed)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # Arrays out of an object store are read-only, and we only read them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        # DeepSpeed's own calls; one line per bucket and step otherwise.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        engine.join(rank, config.ranks, host, port, self._device, config.deadline_s)

    def load_models(
        self, student_path: str, teacher_head_paths: Sequence[str], fetch: Fetch, outlet: MakeOutlet
    ) -> None:
        """Load the student and the output matrices of its teachers."""
        self._student_path, self._fetch = student_path, fetch
        self._student = load_student(student_path, self._dtype, self._config.gradient_checkpointing)
        vocabulary = self._student.vocabulary
        self._heads = [load_head(path, self._dtype, vocabulary).to(self._device) for path in teacher_head_paths]
        self._sentinel_ids = sentinel_ids(vocabulary)
        self._engine = engine.share(self._student, self._config, self._device)
        named = list(self._student.named())
        self._publisher = Publisher(
            [name for name, _ in named],
            [engine.full_shape(p) for _, p in named],
            [p.dtype for _, p in named],
            chunk_bytes=self._config.publish_chunk_bytes,
            rank=self._rank,
            ranks=self._config.ranks,
            outlet=outlet(),
        )
        self._ordered = [named[i][1] for i in self._publisher.order]

    def step(self, batches: Sequence[Batch[Scores]], objective: Objective) -> StepReport:
        """See `LearnerRank.step`."""
        sums = _Sums(batches)
        for i, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            total = self._loss(self._engine, batch, objective, sums)
            # DeepSpeed averages gradients over ranks, and the denominator is global already.
            self._engine.backward(total * (self._config.ranks / batch.denominator), scale_wrt_gas=False)
        loss, metrics = sums.means(self._device)
        self._check_finite("loss", loss)
        lr = learning_rate(self._config, self._updates, self._steps)
        norm = engine.apply(self._engine, self._config, lr)
        self._check_finite("gradient norm", norm)
        self._updates += 1
        return StepReport(
            loss=loss,
            grad_norm=norm,
            lr=lr,
            tokens=sums.tokens,
            trained_tokens=sums.trained_tokens,
            metrics=metrics,
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch[Scores]], objective: Objective) -> dict[str, float]:
        """See `LearnerRank.evaluate`."""
        sums = _Sums(batches)
        for batch in batches:
            self._loss(self._student, batch, objective, sums)
        loss, metrics = sums.means(self._device)
        return {**metrics, "loss": loss}

    @torch.no_grad()
    def share(self, version: int) -> Share:
        """See `LearnerRank.share`."""
        chunks = self._publisher.chunks(self._whole)
        logprobs = self._student.logprobs(torch.from_numpy(self._sentinel_ids).long().to(self._device))
        return Share(
            version=version,
            manifest=self._publisher.manifest,
            chunks=chunks,
            sentinel=Sentinel(
                ids=self._sentinel_ids, logprobs=logprobs.cpu().numpy(), tolerance=self._config.tolerance
            ),
        )

    def save(self, directory: Path, step: int) -> None:
        """See `LearnerRank.save`. All ranks must see the same file system."""
        temporary = checkpoint.partial(directory)
        if self._rank == 0:
            checkpoint.start(directory)
        engine.barrier()
        self._engine.save_checkpoint(str(temporary), tag=_STATE, save_latest=False)
        np.save(temporary / f"random_{self._rank}.npy", _random_state(self._device), allow_pickle=False)
        engine.barrier()
        files = checkpoint.digests(temporary, self._rank, self._config.ranks, self._sum_integers)
        if self._rank == 0:
            checkpoint.write_manifest(temporary, self._facts(step), files)
            checkpoint.commit(directory)
        engine.barrier()

    def load(self, directory: Path) -> int:
        """See `LearnerRank.load`."""
        saved, claimed = checkpoint.read_manifest(directory)
        checkpoint.check_facts(directory, saved, self._facts(0))
        found = checkpoint.digests(directory, self._rank, self._config.ranks, self._sum_integers)
        checkpoint.check_files(directory, claimed, found)
        self._engine.load_checkpoint(str(directory), tag=_STATE)
        _set_random_state(np.load(directory / f"random_{self._rank}.npy", allow_pickle=False), self._device)
        self._updates = saved.updates
        return saved.step

    def export(self, directory: Path) -> None:
        """See `LearnerRank.export`."""
        state = self._state()
        if self._rank == 0:
            checkpoint.start(directory)
            temporary = checkpoint.partial(directory)
            self._student.causal.save_pretrained(temporary, state_dict=state)
            for name in _TOKENIZER_FILES:
                source = cached_file(self._student_path, name, _raise_exceptions_for_missing_entries=False)
                if source is not None:
                    shutil.copyfile(source, temporary / name)
            checkpoint.commit(directory)
        engine.barrier()

    def peak_memory_bytes(self) -> int:
        """The most memory the device (on CPU: the process) has held."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """See `LearnerRank.close`."""
        engine.leave(self._engine)

    def _loss(
        self, model: DeepSpeedEngine | Student, batch: Batch[Scores], objective: Objective, sums: "_Sums"
    ) -> Tensor:
        """The weighted sum of the objective over a micro-batch, noted in `sums`."""
        here = batch.to(self._device, self._fetch)

        def prepare(first: int, last: int) -> Evaluate:
            rows = read(here.rows(first, last), self._heads)

            def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
                block = rows.rows(start - first, stop - first)
                return by_teacher(objective(student, block), block)

            return evaluate

        def use(hidden: Tensor, matrix: Tensor) -> Tensor:
            chunk, k = self._config.head_chunk, self._config.overlap_k
            total, metrics = flat_loss(hidden, matrix, here.weights, prepare, chunk=chunk, overlap_k=k)
            sums.add(total.detach() / batch.denominator, metrics)
            return total

        return model(here.input_ids, here.position_ids, here.cu_seqlens, here.predict_at, use)

    def _whole(self, first: int, last: int) -> AbstractContextManager[list[Tensor]]:
        """The parameters `first` .. `last - 1` of the manifest, complete; all ranks must enter."""
        return engine.whole(self._ordered[first:last], self._config.zero_stage)

    @torch.no_grad()
    def _state(self) -> dict[str, Tensor]:
        """Name -> value in host memory on rank 0, for an export; nothing elsewhere. All ranks must call."""
        state: dict[str, Tensor] = {}
        for first, last in self._publisher.runs:
            with self._whole(first, last) as tensors:
                if self._rank == 0:
                    names = self._publisher.manifest.names[first:last]
                    state |= {n: t.to("cpu", copy=True) for n, t in zip(names, tensors, strict=True)}
        return state

    def _facts(self, step: int) -> checkpoint.Facts:
        model = hashlib.sha256(repr(self._publisher.manifest).encode()).hexdigest()[:16]
        return checkpoint.Facts(
            step=step,
            updates=self._updates,
            ranks=self._config.ranks,
            zero_stage=self._config.zero_stage,
            dtype=self._config.dtype.name,
            model=model,
        )

    def _sum_integers(self, values: np.ndarray) -> np.ndarray:
        return engine.sum_integers(values, self._device)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DataError(
                f"update {self._updates} needs a finite {what}, but it is {value}; the weights are those of "
                "before: look at this step's scores, lower learner.lr, or resume from a checkpoint"
            )


class _Sums:
    """Sums over a step's micro-batches, on the device until they are asked for, then over all ranks."""

    def __init__(self, batches: Sequence[Batch[Scores]]) -> None:
        trained = [int(np.count_nonzero(batch.weights)) for batch in batches]
        self.trained_tokens = sum(trained)
        # A batch without weights is there only because ranks must go along with each other.
        self.tokens = sum(len(batch.input_ids) for batch, n in zip(batches, trained, strict=True) if n)
        self._loss: list[Tensor] = []
        self._metrics: list[Tally] = []

    def add(self, loss: Tensor, metrics: Tally) -> None:
        """A micro-batch's share of the loss, and the tally of its metrics."""
        self._loss.append(loss)
        self._metrics.append(metrics)

    def means(self, device: torch.device) -> tuple[float, dict[str, float]]:
        """The loss and mean metrics of all ranks, which all must ask for; counts become global too."""
        own = reduce(Tally.plus, self._metrics)
        tokens = torch.tensor([self.tokens, self.trained_tokens], dtype=torch.float64, device=device)
        loss = torch.stack(self._loss).sum()[None]
        sums = engine.sum_over_ranks(torch.cat([loss, tokens, own.totals, own.counts]))
        value, self.tokens, self.trained_tokens = float(sums[0]), int(sums[1]), int(sums[2])
        totals, counts = sums[3:].chunk(2)
        greatest = engine.max_over_ranks(own.greatest)
        return value, Tally(names=own.names, totals=totals, counts=counts, greatest=greatest).means()


def _random_state(device: torch.device) -> np.ndarray:
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return own.numpy()


def _set_random_state(state: np.ndarray, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(state), device)
    else:
        torch.set_rng_state(torch.from_numpy(state))
