"""Training on one rank: losses over micro-batches, updates, weights for the engines, checkpoints, exports."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from learner import engine
from learner.checkpoints import checkpoint, optimizer_shards
from learner.checkpoints.exporting import export
from learner.config import LearnerConfig, LossKernel, StudentText, learning_rate
from learner.diagnosis import InfiniteRatio, from_first_rank
from learner.liger import check_kernel, with_kernel
from learner.model import Student, batch_readings, load_head, sentinel_ids, target_logprobs
from learner.published import described, published
from learner.publishing import Publisher
from learner.snapshots import Snapshots, matching
from learner.starting import starting_student
from opd.errors import DataError, OpdError
from opd.loss.chunked import Evaluate, StudentLogits, flat_loss, read
from opd.loss.metric_sums import MetricSums
from opd.loss.metrics import diagnosed
from opd.loss.packing import halves
from opd.loss.per_teacher import by_teacher
from opd.ports import LossFunction, Rank, Reading, Sentinel, WeightSender, WeightShard
from opd.scorers.validation import check_support
from opd.settings.devices import on_gpu, resolve_device, resolve_dtype
from opd.types import Batch, Fetch, Scores, StepReport, TokenLoss
from weight_sync.parking import trim

MakeSender = Callable[[], WeightSender]


class Training(Rank):
    """The student under DeepSpeed, on one of `config.ranks` ranks. Making one joins the others.

    Its public methods are the verbs of `opd.ports.Rank`, which says what they promise.
    """

    def __init__(self, config: LearnerConfig, rank: int, host: str, port: int, seed: int, steps: int) -> None:
        config = config.decided(on_gpu=on_gpu(config.device))
        self._config, self._rank, self._steps, self._seed = config, rank, steps, seed
        self._updates = self._skipped = 0  # applied; skipped in a row
        self._update_incomplete = False  # an update was begun and not finished: the weights are of no step
        self._writer, self._snapshots = checkpoint.ShardWriter(), Snapshots()
        self._reload: Callable[[], None] | None = None  # what brings back what is offloaded
        self._device = resolve_device(config.device, "learner")
        self._dtype = resolve_dtype(config.dtype, self._device)
        check_kernel(config.loss_kernel, self._device)
        engine.configure_torch(config, self._device, seed)
        engine.join(rank, config.ranks, host, port, self._device, config.deadline_s)

    def load_models(
        self,
        student_path: str,
        teacher_head_paths: Sequence[str],
        fetch: Fetch,
        sender: MakeSender,
        text: StudentText,
    ) -> None:
        """Load the student and the output matrices of its teachers."""
        self._student_path, self._fetch, self._text = student_path, fetch, text
        self._student = starting_student(student_path, self._config, self._dtype, self._device, self._seed)
        vocabulary = self._student.vocabulary
        self._heads = [load_head(path, self._dtype, vocabulary).to(self._device) for path in teacher_head_paths]
        self._sentinel_ids = np.array(text.sentinel or sentinel_ids(vocabulary), dtype=np.int32)
        self._engine = engine.initialize(self._student, self._config, self._device)
        self._named = list(self._student.named())
        parts = published(self._student)
        self._publisher = Publisher(
            *described(parts),
            chunk_bytes=self._config.publish_chunk_bytes,
            rank=self._rank,
            ranks=self._config.ranks,
            sender=sender(),
            lora_scale=self._config.lora.scale,
        )
        self._ordered = [parts[i] for i in self._publisher.order]
        self._origin = self._read_sentinel()
        if self._config.stage == 3:  # what the trial and DeepSpeed had of other ranks' parts
            trim()

    def step(self, batches: Sequence[Batch[Scores]], objective: LossFunction) -> StepReport:
        sums = _Sums(batches)
        for i, batch in enumerate(batches):
            self._learn(batch, objective, sums, last=i == len(batches) - 1)
        loss, metrics = sums.means(self._device)
        lr = learning_rate(self._config, self._updates, self._steps)
        self._update_incomplete = True
        norm = engine.apply(self._engine, self._config, lr)
        self._update_incomplete = False
        skipped = not (math.isfinite(loss) and math.isfinite(norm))  # of all ranks, so all agree
        if skipped:
            self._skip(loss, norm, batches)
        else:
            self._updates, self._skipped = self._updates + 1, 0
        return StepReport(
            loss=loss,
            grad_norm=norm,
            lr=lr,
            tokens=sums.tokens,
            trained_tokens=sums.trained_tokens,
            metrics=metrics,
            skipped=skipped,
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch[Scores]], objective: LossFunction) -> dict[str, float]:
        sums = _Sums(batches)
        for batch in batches:
            sums.add(self._forward(self._student, batch, objective))
        loss, metrics = sums.means(self._device)
        return {**metrics, "loss": loss}

    @torch.no_grad()
    def score(self, batches: Sequence[Batch[Scores]]) -> list[np.ndarray]:
        chunk = self._config.head_chunk
        return [target_logprobs(self._student, batch, self._device, chunk).cpu().numpy() for batch in batches]

    def snapshot(self, name: str, *, optimizer: bool = False, keep_older: bool = False) -> None:
        if not (keep_older and name in self._snapshots.places):
            self._snapshots.take(name, self._held(), self._updates if optimizer else None)

    @torch.no_grad()
    def read(self, batches: Sequence[Batch[Scores]], readings: Sequence[Reading]) -> list[np.ndarray]:
        def one(batch: Batch[Scores]) -> np.ndarray:
            self._check(batch)
            here = batch.to(self._device, self._fetch)
            return batch_readings(self._student, here, self._heads, readings, self._config.head_chunk).cpu().numpy()

        return [one(batch) for batch in batches]

    def restore(self, name: str) -> None:
        held = self._held()
        updates = self._snapshots.restore(name, held)
        if updates is not None:
            self._updates = updates
            optimizer_shards.set_updates(self._engine, updates)
        optimizer_shards.refresh(self._named, self._config.stage, held)

    def extrapolate(self, name: str, factor: float, *, only: str = "") -> None:
        held = self._held()
        self._snapshots.extrapolate(name, factor, held, matching([parameter for parameter, _ in self._named], only))
        optimizer_shards.refresh(self._named, self._config.stage, held)

    def offload(self) -> None:
        if self._reload is None:
            self._reload = engine.offload(self._engine, self._config, self._heads, self._device)

    def reload(self) -> None:
        if self._reload is not None:
            self._reload()
            self._reload = None

    is_offloaded = property(lambda self: self._reload is not None)

    def _held(self) -> list[optimizer_shards.Fragment]:
        """Live views of everything trained that is on this rank."""
        return optimizer_shards.fragments(self._engine, self._named, self._config.stage)

    @torch.no_grad()
    def share(self, version: int) -> WeightShard:
        chunks = self._publisher.chunks(self._whole)
        return WeightShard(
            version=version,
            manifest=self._publisher.manifest,
            chunks=chunks,
            sentinel=Sentinel(
                ids=self._sentinel_ids,
                logprobs=self._read_sentinel(),
                tolerance=self._config.sentinel_tolerance,
                origin=self._origin,
            ),
        )

    def _read_sentinel(self) -> np.ndarray:
        """The log-probabilities of its tokens 1.. ; all ranks must call."""
        return self._student.logprobs(torch.from_numpy(self._sentinel_ids).long().to(self._device)).cpu().numpy()

    def save(self, directory: Path, step: int) -> None:
        if self._update_incomplete:
            raise OpdError(f"the weights of step {step} cannot be saved, because the update after it broke off in them")
        stage, rank, ranks = self._config.stage, self._rank, self._config.ranks
        pieces = optimizer_shards.host_copies(self._held(), stage, rank, ranks)
        pieces |= self._snapshots.pieces(stage, rank, ranks)
        pieces[checkpoint.RANDOM] = _generator(self._device).get_state()
        self._writer.begin(directory / checkpoint.shard_name(self._rank), pieces, self._facts(step))

    def written(self) -> tuple[str, str]:
        return self._writer.finish(self._config.deadline_s)

    def load(self, directory: Path) -> int:
        shards, own = checkpoint.Shards(directory), self._facts(0)
        saved = shards.facts[0]
        checkpoint.check_model(directory, saved, own.model)
        optimizer_shards.fill(self._engine, self._named, self._config.stage, shards, saved.updates)
        self._snapshots.load(shards, saved.snapshots, self._held())
        state = shards.random_state(self._rank, self._device.type)
        if state is not None:
            _generator(self._device).set_state(state)
        self._updates, self._skipped = saved.updates, saved.skipped
        engine.barrier()  # no rank goes on while another still reads
        return saved.step

    def export(self, directory: Path) -> None:
        export(self._student, self._config, self._student_path, self._rank, directory, self._text.ends)

    def close(self) -> None:
        """Leave the other ranks and free the model."""
        self._writer.close()
        engine.leave(self._engine)

    def _learn(self, batch: Batch[Scores], objective: LossFunction, sums: "_Sums", *, last: bool) -> None:
        """Forward and backward of a micro-batch, in two halves if memory does not suffice for it as a whole."""
        self._engine.set_gradient_accumulation_boundary(last)
        seen = self._try(batch, objective)
        if not self._anywhere(seen is None):
            assert seen is not None
            self._backward(seen, sums, last=last)
            return
        short, seen = seen is None, None  # the failed pass is given up before the next begins
        torch.cuda.empty_cache()  # does nothing on a CPU
        parts = halves(batch)
        if parts is None and not short:  # another rank must halve: go along with it
            parts = (batch, replace(batch, weights=np.zeros_like(batch.weights)))
        if parts is None:
            raise self._too_large(batch)
        for part, end in zip(parts, (False, last), strict=True):
            self._engine.set_gradient_accumulation_boundary(end)
            seen = self._try(part, objective)
            if self._anywhere(seen is None) or seen is None:
                raise self._too_large(part)
            self._backward(seen, sums, last=end)

    def _try(self, batch: Batch[Scores], objective: LossFunction) -> "_Seen | None":
        """The forward pass, or None if memory does not suffice."""
        try:
            return self._forward(self._engine, batch, objective)
        except torch.OutOfMemoryError as error:
            if self._config.stage == 3 and self._config.ranks > 1:  # the others wait for this rank's parameters
                raise self._too_large(batch) from error
            return None

    def _anywhere(self, here: bool) -> bool:
        """Whether `here` is true on any rank; a collective call."""
        if self._config.ranks == 1:
            return here
        return bool(engine.max_over_ranks(torch.tensor([float(here)], dtype=torch.float64, device=self._device))[0])

    def _backward(self, seen: "_Seen", sums: "_Sums", *, last: bool) -> None:
        sums.add(seen)
        # DeepSpeed averages gradients over ranks, and the denominator is global already.
        scale = self._config.ranks / seen.denominator
        if last and not math.isfinite(sums.means(self._device)[0]):
            scale = math.nan  # whatever the gradient is: the optimizer's own check now drops the step
        try:
            self._engine.backward(seen.total * scale, scale_wrt_gas=False)
        except torch.OutOfMemoryError as error:  # some gradients are in, some are not: no second try
            raise OpdError(
                "the learner ran out of memory in a backward pass; lower learner.tokens_per_microbatch, or set "
                "learner.gradient_checkpointing=true, and resume"
            ) from error

    def _too_large(self, batch: Batch[Scores]) -> OpdError:
        return OpdError(
            f"the learner ran out of memory on a micro-batch of {len(batch.input_ids)} tokens that cannot be halved "
            "(again); lower learner.tokens_per_microbatch, or set learner.gradient_checkpointing=true, and resume"
        )

    def _skip(self, loss: float, norm: float, batches: Sequence[Batch[Scores]]) -> None:
        self._skipped += 1
        if self._skipped > self._config.max_skipped_steps:
            if ratio := self._infinite_ratio(batches):
                raise DataError(
                    f"update {self._updates} needs finite importance ratios, but {ratio}; {self._skipped - 1} updates "
                    "before it were skipped, and the weights are those of before: check the engine that wrote, lower "
                    "max_staleness, bound ratios with max_ratio, or resume from a checkpoint"
                )
            raise DataError(
                f"update {self._updates} needs a finite loss and gradient norm, but they are {loss} and {norm}, and "
                f"{self._skipped - 1} updates before it were skipped (learner.max_skipped_steps="
                f"{self._config.max_skipped_steps}); the weights are those of before: look at this step's scores, "
                "lower learner.lr, or resume from a checkpoint"
            )

    @torch.no_grad()
    def _infinite_ratio(self, batches: Sequence[Batch[Scores]]) -> str:
        """Sentence about the first token whose importance ratio is not finite, "" if all are; a collective call."""
        if self._config.loss_kernel is not LossKernel.TORCH:  # what such kernels compute has no ratio
            return ""
        watching: Any = InfiniteRatio()  # promises nothing, so it is no objective of a method
        for batch in batches:
            self._forward(self._student, batch, watching)
        return from_first_rank(" ".join(watching.found), self._rank, self._config.ranks, self._device)

    def _forward(self, model: DeepSpeedEngine | Student, batch: Batch[Scores], objective: LossFunction) -> "_Seen":
        """The weighted sum of the objective over a micro-batch."""
        self._check(batch)
        here, objective = batch.to(self._device, self._fetch), with_kernel(self._config.loss_kernel, objective)

        def prepare(first: int, last: int) -> Evaluate:
            rows = read(here.rows(first, last), self._heads)

            def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
                block = rows.rows(start - first, stop - first)
                return by_teacher(diagnosed(objective, student, block), block)

            return evaluate

        tallies: list[MetricSums] = []

        def use(hidden: Tensor, matrix: Tensor) -> Tensor:
            chunk, k = self._config.head_chunk, self._config.overlap_k
            total, metrics = flat_loss(hidden, matrix, here.weights, prepare, chunk=chunk, overlap_k=k)
            tallies.append(metrics)
            return total

        total = model(here.input_ids, here.position_ids, here.cu_seqlens, here.predict_at, use)
        return _Seen(total=total, metrics=tallies[-1], denominator=batch.denominator)

    def _check(self, batch: Batch[Scores]) -> None:
        for scores in (batch.scores, *(term.scores for term in batch.terms.values())):
            check_support(scores, self._student.vocabulary)

    def _whole(self, first: int, last: int) -> AbstractContextManager[list[Tensor]]:
        """The tensors `first` .. `last - 1` of the manifest, complete; all ranks must enter."""
        return engine.complete(self._ordered[first:last], self._config.stage)

    def _facts(self, step: int) -> checkpoint.Facts:
        model = hashlib.sha256(repr(self._publisher.manifest).encode()).hexdigest()[:16]
        return checkpoint.Facts(
            step=step,
            updates=self._updates,
            skipped=self._skipped,
            rank=self._rank,
            ranks=self._config.ranks,
            zero_stage=self._config.stage,
            model=model,
            device=self._device.type,
            snapshots=self._snapshots.places,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A micro-batch after its forward pass: the undivided sum of its losses, with a gradient."""

    total: Tensor
    metrics: MetricSums
    denominator: float


class _Sums:
    """Sums over a step's micro-batches, kept on the device, then over all ranks."""

    def __init__(self, batches: Sequence[Batch[Scores]]) -> None:
        trained = [int(np.count_nonzero(batch.weights)) for batch in batches]
        self.trained_tokens = sum(trained)
        # A batch without weights is there only because ranks must go along with each other.
        self.tokens = sum(len(batch.input_ids) for batch, n in zip(batches, trained, strict=True) if n)
        self._loss: list[Tensor] = []
        self._metrics: list[MetricSums] = []
        self._means: tuple[float, dict[str, float]] | None = None

    def add(self, seen: _Seen) -> None:
        """Add a micro-batch's part of the loss, and the sums of its metrics."""
        self._loss.append(seen.total.detach() / seen.denominator)
        self._metrics.append(seen.metrics)

    def means(self, device: torch.device) -> tuple[float, dict[str, float]]:
        """Loss and mean metrics over all ranks; a collective call after the last `add`. Counts become global."""
        if self._means is None:
            self._means = self._over_ranks(device)
        return self._means

    def _over_ranks(self, device: torch.device) -> tuple[float, dict[str, float]]:
        own = reduce(MetricSums.plus, self._metrics)
        tokens = torch.tensor([self.tokens, self.trained_tokens], dtype=torch.float64, device=device)
        loss = torch.stack(self._loss).sum()[None]
        sums = engine.sum_over_ranks(torch.cat([loss, tokens, own.totals, own.counts]))
        value, self.tokens, self.trained_tokens = float(sums[0]), int(sums[1]), int(sums[2])
        totals, counts = sums[3:].chunk(2)
        maxima = engine.max_over_ranks(own.maxima)
        return value, MetricSums(names=own.names, totals=totals, counts=counts, maxima=maxima).means()


def _generator(device: torch.device) -> torch.Generator:
    """Default random generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator
