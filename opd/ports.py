"""What the loop asks of the engines around it: protocols, and the requests that cross them.

Applications implement these without inheriting from them; a pool of engines has the same protocol as one engine.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32
from torch import Tensor

from opd.settings.ranges import In, Temperature, Tokens, TopP
from opd.settings.validation import settings
from opd.types import Batch, Prompt, Scores, StepReport, Stop, TokenLoss, TokenScores
from opd.types.prompt_rows import Columns, Row, Said


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Sampling:
    """How completions are written. `topk` > 0 also records the writer's top-k at every token.

    `temperature=0` is greedy. Example: `Sampling(temperature=1.0, max_tokens=77)`.
    """

    max_tokens: Tokens
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    topk: Annotated[int, In(0, 1_000_000)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One completion to write. `(prompt_id, sample)` and the policy version seed it, never the placement."""

    prompt_id: str
    sample: int
    context_ids: Int32[np.ndarray, " P"]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine wrote for a request; `behavior` is a `TopKScores` when `sampling.topk` > 0.

    `digests` says for every policy version that wrote here which weights the engine held under that number (see
    `Weights.digest`; "" is a checkpoint's own weights, which nobody published).
    """

    token_ids: Int32[np.ndarray, " T"]
    behavior: TokenScores
    versions: Int32[np.ndarray, " T"]
    stop: Stop
    digests: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenToken:
    """Ask for the log-probability of each written token: answered with `TokenScores`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Ask for the teacher's own `k` likeliest ids and their full-softmax logprobs: `TopKScores`."""

    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AtIds:
    """Ask for full-softmax logprobs at ids the caller names per token: `TopKScores` with those ids."""

    ids: Int32[np.ndarray, "T K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastHidden:
    """Ask for the hidden states that predict each written token: `HiddenScores`."""


Want = WrittenToken | TopK | AtIds | LastHidden
Kinds = frozenset[type[WrittenToken] | type[TopK] | type[AtIds] | type[LastHidden]]
"""Kinds of requests: what a scorer `asks`, what a teacher backend `answers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A completion to be read in a context. `context_ids` has at least one token."""

    context_ids: Int32[np.ndarray, " Q"]
    token_ids: Int32[np.ndarray, " T"]
    want: Want


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Names, dtypes and shapes of a model's parameters in the order their `nbytes` bytes are published.

    `lora_scale` > 0: they are adapters (`weight_sync.lora`) on the checkpoint that the receiver started from.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    lora_scale: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentinel:
    """A fixed text and the learner's logprobs of its tokens 1.. : what a rightly loaded engine must repeat.

    `tolerance` > 0 bounds the largest difference in nats. At 0 the bound is measured (`weight_sync.sentinel`) with
    `origin`, the learner's logprobs of the same tokens before its first step, when both hold the same checkpoint.
    """

    ids: Int32[np.ndarray, " S"]
    logprobs: Float32[np.ndarray, " S1"]
    tolerance: float
    origin: Float32[np.ndarray, " S1"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The parameters `first` .. `last - 1` of a manifest, one after the other in `nbytes` bytes.

    `digest` names their content (`weight_sync.manifest.digest`), `owner` is the learner rank that holds them, and
    `handle` what a receiver's `fetch` turns into the bytes.
    Example: `Chunk(first=0, last=3, nbytes=4096, digest="0f..", owner=1, handle=ref)`.
    """

    first: int
    last: int
    nbytes: int
    digest: str
    owner: int
    handle: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one learner rank publishes of a version: the chunks it owns."""

    version: int
    manifest: Manifest
    chunks: tuple[Chunk, ...]
    sentinel: Sentinel


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One version of the student: all its chunks, in the order of the manifest.

    `digest` covers the manifest and the digests of the chunks (`weight_sync.receiver.digest_of`), so it names the
    content: two versions with the same bytes, cut alike, have the same one.
    """

    version: int
    manifest: Manifest
    chunks: tuple[Chunk, ...]
    digest: str
    sentinel: Sentinel


Fill = Callable[[np.ndarray | Tensor], None]


class Outlet(Protocol):
    """Where a learner rank lays its chunks for receivers to fetch: one side of a transport."""

    def put(self, turn: int, number: int, nbytes: int, fill: Fill) -> Any:
        """The handle of `nbytes` bytes, which `fill` writes into what it is given: an array of host memory, or a tensor
        where the model is.

        `turn` counts publications, `number` chunks. What was put stays readable until the second turn after it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """An engine's word that it writes with exactly these weights; `gap`: see `PublishReport`."""

    version: int
    digest: str
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """`gap` is the largest |engine - learner| logprob on the sentinel over all engines (nats); `digest` names what
    was published, and what the engines' completions must name (`opd.loop.staleness.unknown_weights`)."""

    version: int
    gap: float
    nbytes: int
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a step's tokens are cut into micro-batches for `ranks` learners."""

    ranks: int
    tokens_per_microbatch: int


@runtime_checkable
class TextEngine(Protocol):
    """Something that writes: the student, or a teacher that generates."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in the order asked."""
        ...


@runtime_checkable
class StudentEngine(TextEngine, Protocol):
    """The student as a writer whose weights can be replaced."""

    async def receive(self, weights: Weights) -> Receipt:
        """Make `weights` live everywhere. Raises and keeps refusing work if the loaded model is wrong."""
        ...


@runtime_checkable
class LogprobTeacher(Protocol):
    """A teacher that reads given tokens."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """Testimony per request, in order, of the type its `want` names; hidden states as `RemoteRows`."""
        ...


class Grader(Protocol):
    """Task reward of a finished completion: 0.0 .. 1.0."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order; a completion that cannot be graded in time gets 0."""
        ...


@runtime_checkable
class ReadsReferences(Protocol):
    """A grader that knows before a run which reference answers it can grade against."""

    def unreadable(self, answer: str) -> str:
        """Why a reference answer cannot be read, "" if it can."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. What is encoded begins as the model's texts do (e.g. with one `<bos>`)."""

    eos_id: int

    def encode(self, text: str) -> Int32[np.ndarray, " P"]:
        """Ids of a plain prompt."""
        ...

    def encode_all(self, prompts: Sequence[Said]) -> list[Int32[np.ndarray, " P"]]:
        """Ids of each prompt; those of a conversation end where the assistant begins to write."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Text without special tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What prompt sources read from: the tokenizer, and files as rows. `place`: see `Columns`."""

    tokenizer: Tokenizer
    rows: Callable[[str, Columns], Sequence[Row]]
    place: str = "prompts"


@runtime_checkable
class PromptSource(Protocol):
    """What is asked: a pure function of the step, so resuming needs the step number and nothing else."""

    @property
    def group_size(self) -> int:
        """Samples of a prompt; their trajectories form a group."""
        ...

    def __call__(self, step: int, sources: Sources) -> Sequence[Prompt]:
        """The step's prompts; those with the same `id` stand next to each other and form a group."""
        ...


@runtime_checkable
class Routed(Protocol):
    """A prompt source that knows beforehand whom its prompts will ask, so that a wrong name is found at the start."""

    def routes(self, sources: Sources) -> frozenset[str]:
        """The names of all teachers that any prompt may ask."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A prompt source that can show beforehand what it will ask, so that no prompt ends a run later."""

    def rows(self, sources: Sources) -> int:
        """How many different prompts there are; 0 = without end."""
        ...

    def every(self, sources: Sources, step: int | None) -> Iterator[tuple[Row, Prompt]]:
        """All prompts, once each, or those of one step; of endless ones a sample. What is left out does not come.

        Raises `DataError` for one that could never be asked.
        """
        ...

    def starved(self, kept: Collection[str], steps: int, sources: Sources) -> int | None:
        """The first of `steps` steps that would have no prompt, if only those with the ids `kept` are asked."""
        ...

    def files(self, place: str) -> Mapping[str, str]:
        """Paths of what is read, by the setting that names each."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """All reference answers of one file, for the grader of `task`, each with its file and line.

    `allowed` is the share that may be unreadable, which the settings under `place` name.
    """

    place: str
    task: str
    answers: Sequence[tuple[str, str]]
    allowed: float


@runtime_checkable
class Answered(Protocol):
    """A prompt source that can show its reference answers before a run."""

    def references(self, sources: Sources) -> Sequence[References]:
        """One item per file; none where there are no answers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Everything the parts of a method may call.

    The order of `teachers` numbers their output matrices (`HiddenScores.head`), in the learner too.
    """

    student: StudentEngine
    teachers: Mapping[str, LogprobTeacher]
    writers: Mapping[str, TextEngine]
    graders: Mapping[str, Grader]
    tokenizer: Tokenizer


class Objective(Protocol):
    """What is minimised per token (see `opd.method.method`)."""

    def __call__(self, student: Any, batch: Any) -> TokenLoss:
        """The unreduced loss of `batch`'s trained tokens given the student's logits at them."""
        ...


class Learner(Protocol):
    """The trained model, however many ranks it lives on."""

    layout: Layout

    async def step(self, batches: Sequence[Sequence[Batch[Scores]]], objective: Objective) -> StepReport:
        """Forward, backward and one optimizer step over `batches[rank][micro-batch]`."""
        ...

    async def evaluate(self, batches: Sequence[Sequence[Batch[Scores]]], objective: Objective) -> Mapping[str, float]:
        """The objective's loss (`loss`) and metrics without a gradient."""
        ...

    async def publish(self, student: StudentEngine, version: int) -> PublishReport:
        """Make the learner's weights live in the engines as `version`; raises if they disagree afterwards."""
        ...

    async def save(self, directory: Path, step: int) -> None:
        """Write a checkpoint that `load` restores exactly."""
        ...


class Observer(Protocol):
    """Somebody who is told of every finished step: trackers, the evaluator, the live view."""

    async def __call__(self, record: Any) -> None:
        """`record` is an `opd.loop.train.StepRecord`. Awaited before the next step is taken."""
        ...
