"""A rank of the learner, for its callers: a plain object that `launch/` turns into an actor.

The work is in `learner.training`, imported when a rank joins the others: a driver only names this class and
should not pay seconds for transformers and DeepSpeed.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import isfunction
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from learner.config import LearnerConfig, StudentText
from opd.errors import ConfigurationError
from opd.heavy_imports import uncollected
from opd.ports import Rank
from opd.types import Fetch
from weight_sync.rendezvous import free_port, own_host

if TYPE_CHECKING:
    from learner.training import MakeSender, Training

Class = TypeVar("Class", bound=type)


def _forwarding(cls: Class) -> Class:
    """A class with every verb of `Rank` that it does not write itself, each done by its `Training` and timed."""
    for name, verb in vars(Rank).items():
        if isfunction(verb) and not name.startswith("_") and name not in vars(cls):
            setattr(cls, name, _forwarded(verb))
    return cls


def _forwarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(verb)
    def do(self: "LearnerRank", *arguments: Any, **options: Any) -> Any:
        training, began = self._ready(), perf_counter()
        if training.is_offloaded and verb not in (Rank.offload, Rank.reload):
            raise ConfigurationError(
                f"the learner's {verb.__name__} needs a model on its device, but it was offloaded to host memory; call "
                "reload() before it"
            )
        try:
            return getattr(training, verb.__name__)(*arguments, **options)
        finally:
            self._busy_s += perf_counter() - began

    return do


@_forwarding
class LearnerRank(Rank):
    """A rank of the learner: the verbs of `opd.ports.Rank`, once `setup` has made its `learner.training.Training`.

    `fetch` resolves the handles of remote rows, `sender` makes the place where published chunks are laid. `steps` is
    the planned number of updates, for the learning-rate schedule; `teacher_head_paths` are the checkpoints that hold
    the output matrices, in the order of `HiddenScores.head`, and are needed when batches carry hidden states.

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
        """Host name of this machine and a port that is free now, for the ranks' rendezvous."""
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
        with uncollected():
            from learner.training import Training

        self._training = Training(self._config, rank, host, port, self._seed, self._steps)
        self._training.load_models(self._student_path, self._teacher_head_paths, self._fetch, self._sender, self._text)

    def written(self) -> tuple[str, str]:
        """The file that `save` began, once it is on the disk: waited for beside other verbs, so no work of the rank."""
        return self._ready().written()

    def busy_s(self) -> float:
        """Seconds in the verbs so far."""
        return self._busy_s

    def close(self) -> None:
        """Leave the other ranks and free the model. The rank cannot be set up again."""
        if self._training is not None:
            self._training.close()
            self._training = None

    def _ready(self) -> "Training":
        if self._training is None:
            raise ConfigurationError("a learner rank needs setup(...) before it can work; call it on every rank")
        return self._training
