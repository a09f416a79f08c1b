"""The student in the learner: a Hugging Face model that reads packed sequences.

The body is untouched: packing enters through transformers' own attention interface. The output matrix lives
in one small module that is asked what to do with it, so that ZeRO-3 gathers it once and no tensor of tokens
times vocabulary has to exist. Parameters keep their Hugging Face names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf.folder import read_headers
from hf.lm_head import read_head
from hf.packable import check_head
from hf.packed_model import load_causal
from hf.weight_names import Piece, stored_names, stored_pieces
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits, chunk_rows, read
from opd.loss.packed_attention import NAME, Packing
from opd.loss.readings import token_readings
from opd.ports import Reading
from opd.types import Batch, Scores
from weight_sync.lora import A, B

Use = Callable[[Float[Tensor, "L H"], Float[Tensor, "V H"]], Tensor]

ADAPTER = "learner"  # what PEFT calls the only adapter that we have


class Head(nn.Module):
    """Output layer, the only owner of its matrix; `use(hidden, matrix)` is computed with it (default: logits)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Float[Tensor, "L H"], use: Use = F.linear) -> Tensor:
        """The value of `use`; its gradient reaches hidden states and matrix."""
        return use(hidden, self.weight)


class Student(nn.Module):
    """`causal` with packed attention and its output layer replaced by a `Head`.

    `stored` has the names under which a checkpoint keeps parameters that the model calls otherwise, as in
    `{"lm_head.weight": "embed_out.weight"}`, and `pieces` the matrices in place of which it has fused experts.
    """

    def __init__(
        self,
        causal: PreTrainedModel,
        stored: Mapping[str, str] | None = None,
        pieces: Mapping[str, Sequence[Piece]] | None = None,
    ) -> None:
        super().__init__()
        head = check_head(causal, "the student", bias=False)
        causal.set_output_embeddings(Head(cast(nn.Parameter, head.weight)))
        causal.set_attn_implementation(NAME)
        _without_dropout(causal)
        self.causal = causal
        self._stored = {_layer(name): _layer(kept) for name, kept in (stored or {}).items()}
        self.pieces = dict(pieces or {})
        self.vocabulary = len(head.weight)  # rows of the output matrix; may exceed the tokenizer's size

    def forward(
        self,
        input_ids: Int[Tensor, " N"],
        position_ids: Int[Tensor, " N"],
        cu_seqlens: Int[Tensor, " M1"],
        predict_at: Int[Tensor, " L"],
        use: Use,
    ) -> Tensor:
        """`use(hidden states at predict_at, output matrix)` of packed sequences."""
        body = self.causal.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            packing=Packing.of(cu_seqlens),
        )
        hidden = body.last_hidden_state[0].index_select(0, predict_at)
        return cast(Head, self.causal.get_output_embeddings())(hidden, use)

    def logits(self, sequences: Sequence[Int[Tensor, " n"]]) -> Float[Tensor, "N V"]:
        """Logits after every token of `sequences`, which are packed one after the other."""
        places = [torch.arange(len(s)) for s in sequences]
        ends = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
        ids, device = torch.cat(list(sequences)), next(self.parameters()).device
        at = torch.arange(len(ids), device=device)
        return self(ids.to(device), torch.cat(places).to(device), ends.to(device), at, F.linear)

    def logprobs(self, ids: Int[Tensor, " S"], after: int = 0) -> Float[Tensor, " S1"]:
        """Log-probabilities of `ids[1:]` in the model's own context, without gradient.

        `after` > 0 packs that many of the first ids before it as a sequence of its own; the answer is the
        same.
        """

        def read(hidden: Tensor, matrix: Tensor) -> Tensor:
            return F.linear(hidden, matrix).float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]

        places = torch.arange(len(ids), device=ids.device)
        bounds = [0, after, after + len(ids)] if after else [0, len(ids)]
        with torch.no_grad():
            return self(
                torch.cat([ids[:after], ids]),
                torch.cat([places[:after], places]),
                torch.tensor(bounds, device=ids.device),
                after + places[:-1],
                read,
            )

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters, under the names of their checkpoint; a tied head is the embedding and does not appear.

        Fused experts, which have no name there, have their own: `publishing.published` takes them apart.
        Adapters have the names of `weight_sync.lora`; beside them nothing is trained.
        """
        return ((self._kept(name), p) for name, p in self.causal.named_parameters() if p.requires_grad)

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Frozen parameters, under the same names: those that adapters are added to."""
        return ((self._kept(name), p) for name, p in self.causal.named_parameters() if not p.requires_grad)

    def _kept(self, name: str) -> str:
        plain = _plain(name)
        layer = _layer(plain)
        return self._stored.get(layer, layer) + plain.removeprefix(layer)


def target_logprobs(student: Student, batch: Batch[Scores], device: torch.device, chunk: int) -> Float32[Tensor, " L"]:
    """Log-probabilities of `batch.target_ids`, without gradient, as an objective sees them.

    At most `chunk` rows of logits are alive at once (0: see `chunk_rows`).
    """
    packed = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.predict_at, batch.target_ids)
    *text, targets = (torch.as_tensor(ids).long().to(device) for ids in packed)

    def read(hidden: Tensor, matrix: Tensor) -> Tensor:
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        for rows in torch.arange(len(hidden), device=device).split(chunk or chunk_rows(matrix)):
            logits = StudentLogits(logits=(hidden[rows] @ matrix.T).float())
            found[rows] = logits.at(targets[rows])
        return found

    with torch.no_grad():
        return student(*text, read)


def batch_readings(
    student: Student, here: Batch[Scores], heads: Sequence[Tensor], readings: Sequence[Reading], chunk: int
) -> Float32[Tensor, "R L"]:
    """Readings at the trained tokens of a micro-batch that is on the student's device, without gradient."""

    def use(hidden: Tensor, matrix: Tensor) -> Tensor:
        return token_readings(hidden, matrix, lambda *rows: read(here.rows(*rows), heads), readings, chunk=chunk)

    with torch.no_grad():
        return student(here.input_ids, here.position_ids, here.cu_seqlens, here.predict_at, use)


def _without_dropout(model: nn.Module) -> None:
    """Set all dropout rates to 0, those of layers and of modules: the trained policy must be the one that sampled."""
    for module in model.modules():
        rates = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in rates:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)


def _layer(name: str) -> str:
    """Name of a tensor's layer: `a.b` of `a.b.weight` and of `a.b.lora_A.weight`."""
    return next((name.removesuffix(end) for end in (A, B, ".weight", ".bias") if name.endswith(end)), name)


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts between when a layer gets an adapter."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.weight", ".weight")


def sentinel_ids(vocabulary: int, length: int = 24) -> Int[np.ndarray, " S"]:
    """A fixed text of pseudo-random tokens. Example: `sentinel_ids(192)` has 24 ids below 192."""
    return np.random.default_rng(20240607).integers(0, vocabulary, length).astype(np.int32)


def load_student(
    path: str, dtype: torch.dtype, gradient_checkpointing: bool, device: torch.device | None = None
) -> Student:
    """The model in the folder `path` on `device` (None: the host), ready for packed sequences.

    Raises:
        ConfigurationError: its layers do not read packed sequences exactly, or its weights are not stored one by one
            as its modules have them (an engine could then not receive them).
    """
    part = f"the student {path!r}"

    def made(causal: PreTrainedModel) -> Student:  # to be tried as it is trained, so that a dropout would be seen
        stored = read_headers(path, "the student")
        return Student(causal, stored_names(causal, stored, part), stored_pieces(causal, stored)).train()

    return load_causal(
        path,
        part,
        dtype,
        made,
        Student.logits,
        bias=False,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
    )


def load_head(path: str, dtype: torch.dtype, vocabulary: int) -> Float[Tensor, "V H"]:
    """A teacher's output matrix, read alone from its safetensors (tied or not).

    Raises:
        DataError: the checkpoint holds none.
        ConfigurationError: it has other rows than the student's vocabulary.
    """
    absent = (
        f"full-vocabulary objectives need the teacher's output matrix, but {path} has none in its safetensors; choose "
        "another checkpoint or a top-k method"
    )
    head = read_head(read_headers(path, "the teacher"), absent)
    if len(head) != vocabulary:
        raise ConfigurationError(
            f"full-vocabulary objectives need equal vocabularies, but the teacher's output matrix has "
            f"{len(head)} rows and the student's {vocabulary}; use a top-k method or models of one family"
        )
    return head.to(dtype)
