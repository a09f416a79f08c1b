"""The student as the learner sees it: a Hugging Face model that reads packed sequences.

The body is untouched: packing enters through transformers' own attention interface. The output matrix lives
in one small module that is asked what to do with it, so that ZeRO-3 gathers it once and no tensor of tokens
times vocabulary has to exist. Parameters keep their Hugging Face names.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from opd.attention import NAME, Packing, attend
from opd.errors import ConfigurationError, DataError

Use = Callable[[Float[Tensor, "L H"], Float[Tensor, "V H"]], Tensor]

ADAPTER = "learner"  # what PEFT calls the only adapter that we have
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # nats; a wrong mask is off by far more


class Head(nn.Module):
    """The only owner of the output matrix; `use(hidden, matrix)` says what is wanted (default: logits)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Float[Tensor, "L H"], use: Use = F.linear) -> Tensor:
        """Whatever `use` returns; its gradient reaches hidden states and matrix."""
        return use(hidden, self.weight)


class Student(nn.Module):
    """`causal` with packed attention and its output layer replaced by a `Head`."""

    def __init__(self, causal: PreTrainedModel) -> None:
        super().__init__()
        head = causal.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ConfigurationError(
                f"the student needs a plain output matrix, but {type(causal).__name__} has {head}; "
                "choose a model whose lm_head is a linear layer without bias"
            )
        causal.set_output_embeddings(Head(cast(nn.Parameter, head.weight)))
        causal.set_attn_implementation(NAME)
        for module in causal.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the policy that is trained must be the policy that wrote
        self.causal = causal
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
        """What is trained, under Hugging Face names; a tied head is the embedding and does not appear.

        Adapters have the names of `opd.adapters`; beside them nothing is trained.
        """
        return ((_plain(name), p) for name, p in self.causal.named_parameters() if p.requires_grad)

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The rest: what adapters are added to."""
        return ((_plain(name), p) for name, p in self.causal.named_parameters() if not p.requires_grad)


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts between when a layer gets an adapter."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.weight", ".weight")


def sentinel_ids(vocabulary: int, length: int = 24) -> Int[np.ndarray, " S"]:
    """A fixed text of pseudo-random tokens. Example: `sentinel_ids(192)` has 24 ids below 192."""
    return np.random.default_rng(20240607).integers(0, vocabulary, length).astype(np.int32)


def load_student(path: str, dtype: torch.dtype, gradient_checkpointing: bool) -> Student:
    """The model in `path` (a folder, or a name on the Hugging Face hub), ready for packed sequences.

    Raises:
        ConfigurationError: its layers do not read packed sequences exactly, or its weights are stored under
            other names than its modules have (an engine could then not receive them).
    """
    AttentionInterface.register(NAME, attend)
    causal = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, use_safetensors=True
    )
    assert isinstance(causal, PreTrainedModel)
    _check_names(causal, path)
    ids = torch.from_numpy(sentinel_ids(len(cast(nn.Linear, causal.get_output_embeddings()).weight))).long()
    with torch.no_grad():
        logits = causal(input_ids=ids[None], use_cache=False).logits[0, :-1]
    expected = logits.float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    student = Student(causal)
    gap = float((student.logprobs(ids, after=9) - expected).abs().max())
    if not gap <= _CHECK_TOLERANCE[dtype]:
        raise ConfigurationError(
            f"the student {path} needs layers that read packed sequences one by one, but packed and plain "
            f"log-probabilities of {type(causal).__name__} differ by {gap:.3g} nats; choose a model with "
            "plain causal attention and an unscaled output matrix"
        )
    if gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return student.train()


def load_head(path: str, dtype: torch.dtype, vocabulary: int) -> Float[Tensor, "V H"]:
    """A teacher's output matrix, read alone from its safetensors (tied or not).

    Raises:
        DataError: the checkpoint holds none.
        ConfigurationError: it has other rows than the student's vocabulary.
    """
    tied = bool(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().tie_word_embeddings)
    files = _tensor_files(path)
    wanted = ("lm_head.weight", "embed_tokens.weight") if tied else ("lm_head.weight",)
    found = [name for suffix in wanted for name in files if name.endswith(suffix)]
    if not found:
        raise DataError(
            f"full-vocabulary objectives need the teacher's output matrix, but {path} has no "
            f"{' or '.join(wanted)} in its safetensors; choose another checkpoint or a top-k method"
        )
    with safe_open(files[found[0]], framework="pt") as handle:
        head = handle.get_tensor(found[0])
    if len(head) != vocabulary:
        raise ConfigurationError(
            f"full-vocabulary objectives need equal vocabularies, but the teacher's output matrix has "
            f"{len(head)} rows and the student's {vocabulary}; use a top-k method or models of one family"
        )
    return head.to(dtype)


def _check_names(causal: PreTrainedModel, path: str) -> None:
    stored = _tensor_files(path)
    other = [name for name, _ in causal.named_parameters() if name not in stored]
    if other:
        raise ConfigurationError(
            f"the student {path} needs weights stored under the names of its modules, but {other[0]!r} and "
            f"{len(other) - 1} more are not in its safetensors; choose a dense architecture"
        )


def _tensor_files(path: str) -> dict[str, str]:
    """Tensor name -> safetensors file of a checkpoint, in one or several shards."""
    single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        with safe_open(single, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), single)
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise DataError(f"{path} has neither model.safetensors nor its index; convert the checkpoint to safetensors")
    shards = cast(dict[str, str], json.loads(Path(index).read_text())["weight_map"])
    located = {shard: cast(str, cached_file(path, shard)) for shard in set(shards.values())}
    return {name: located[shard] for name, shard in shards.items()}
