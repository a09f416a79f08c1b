"""One rank of the learner as others see it: a plain object that `launch/` turns into an actor.

The work is in `learner.training`, imported when a rank joins the others: a driver only names this class and
should not pay seconds for transformers and DeepSpeed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from learner.config import LearnerConfig, StudentText
from opd.errors import ConfigurationError
from opd.ports import WeightShard
from opd.types import Batch, Fetch, Scores, StepReport
from weight_sync.rendezvous import free_port, own_host

if TYPE_CHECKING:
    from learner.training import MakeSender, Training
    from opd.ports import LossFunction


class LearnerRank:
    """A rank of the learner: all ranks get the same calls, each with its own batches.

    `fetch` resolves the handles of remote rows, `sender` makes the place where published chunks are laid. `steps` is
    the planned number of updates, for the learning-rate schedule; `teacher_head_paths` are the checkpoints that hold
    the output matrices, in the order of `HiddenScores.head`, and are needed when batches carry hidden states. After an
    exception out of `step` a rank must only be asked to `save`.

    Example, alone: `rank = LearnerRank(config, "student", (), 100, 0, fetch, lambda: StagedSender(np.copy))`, then
    `rank.setup(0, 1, *rank.address())` and `rank.step([batch], objective)`.
    """

    def __init__(
        self,
        config: LearnerConfig,
        student_path: str,
        teacher_head_paths: Sequence[str],
        steps: int,
        seed: int,
        fetch: Fetch,
        sender: "MakeSender",
        text: StudentText = StudentText(),  # noqa: B008 (frozen)
    ) -> None:
        self._config, self._student_path, self._teacher_head_paths = config, student_path, teacher_head_paths
        self._steps, self._seed, self._fetch, self._sender = steps, seed, fetch, sender
        self._text = text
        self._training: Training | None = None
        self._busy_s = 0.0

    def address(self) -> tuple[str, int]:
        """This machine as other machines see it, and a port that is free now: where the ranks can meet."""
        host = own_host()
        return host, free_port(host)

    def setup(self, rank: int, world: int, host: str, port: int) -> None:
        """Meet the other ranks at `host:port` and load the student; returns when all have.

        Raises:
            ConfigurationError: the device is missing, or the models cannot be used together.
        """
        if world != self._config.ranks:
            raise ConfigurationError(
                f"learner.ranks is {self._config.ranks}, but {world} ranks are being started; start as many "
                "as configured"
            )
        from learner.training import Training

        self._training = Training(self._config, rank, host, port, self._seed, self._steps)
        self._training.load_models(self._student_path, self._teacher_head_paths, self._fetch, self._sender, self._text)

    def step(self, batches: Sequence[Batch[Scores]], objective: "LossFunction") -> StepReport:
        """One update from this rank's micro-batches; all ranks bring the same number and get the same report.

        Raises:
            DataError: the loss or the gradient was not finite too often in a row (before that, the report says
                `skipped`); the weights are still those of before.
            OpdError: memory does not suffice even for half a micro-batch.
        """
        with self._busy() as training:
            return training.step(batches, objective)

    def evaluate(self, batches: Sequence[Batch[Scores]], objective: "LossFunction") -> dict[str, float]:
        """The objective's `loss` and metrics at the current weights, computed as in `step`."""
        with self._busy() as training:
            return training.evaluate(batches, objective)

    def share(self, version: int) -> WeightShard:
        """This rank's chunks of the student as `version`, and a sentinel to check it by. All ranks must call.

        The last two shares can be read at any time; older ones may not be there any more.
        """
        with self._busy() as training:
            return training.share(version)

    def save(self, directory: str | Path, step: int) -> None:
        """Copy weights, optimizer, schedule and random state, and begin to write them into the existing `directory`.

        Returns when training may go on. Every rank writes a file of its own; `written` says when it is there.
        Raises `OpdError` where an update broke off in the middle.
        """
        with self._busy() as training:
            training.save(Path(directory), step)

    def written(self) -> tuple[str, str]:
        """Name and xxh3_128 of the file that `save` began, once it is on the disk.

        Raises:
            OpdError: it could not be written; one sentence.
        """
        return self._ready().written()

    def load(self, directory: str | Path) -> int:
        """Restore what all ranks' `save` wrote, however many they were and whatever they shared; returns its `step`.

        Raises:
            DataError: the checkpoint is foreign, cut off or incomplete.
            ConfigurationError: it is of another model.
        """
        with self._busy() as training:
            return training.load(Path(directory))

    def export(self, directory: str | Path) -> None:
        """Write a folder that transformers and vLLM load: safetensors, configuration, tokenizer."""
        with self._busy() as training:
            training.export(Path(directory))

    def stats(self) -> dict[str, float]:
        """`busy_s`: seconds in the calls above; `peak_memory_bytes`: of the device, on CPU of the process."""
        peak = self._training.peak_memory_bytes() if self._training else 0
        return {"busy_s": self._busy_s, "peak_memory_bytes": float(peak)}

    def close(self) -> None:
        """Leave the other ranks and free the model. The rank cannot be set up again."""
        if self._training is not None:
            self._training.close()
            self._training = None

    def _ready(self) -> "Training":
        if self._training is None:
            raise ConfigurationError("a learner rank needs setup(...) before it can work; call it on every rank")
        return self._training

    @contextmanager
    def _busy(self) -> "Iterator[Training]":
        training, began = self._ready(), perf_counter()
        try:
            yield training
        finally:
            self._busy_s += perf_counter() - began
