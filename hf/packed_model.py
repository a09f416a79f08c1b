"""A Hugging Face causal model on packed sequences: one row, attention within each sequence."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from hf.packable import Trial, check_head, check_layers, context_length, unlike
from opd.errors import DataError
from opd.loss.packed_attention import NAME, Packing, register

Model = TypeVar("Model")


class PackedModel:
    """A frozen model that returns hidden states; logits over the vocabulary are computed only on request.

    `vocabulary` counts the rows of the output matrix (with padding), `positions` the tokens a sequence may
    have.
    """

    def __init__(self, causal: PreTrainedModel) -> None:
        head = check_head(causal, "the teacher", bias=True)
        self._causal, self._head = causal, head
        self.device = causal.device
        self.vocabulary = len(head.weight)
        self.positions = context_length(causal.config)

    def mix_in(self, tensors: Iterable[tuple[str, Tensor]], share: float) -> None:
        """In-place update of every parameter: `share` times the given one plus `1 - share` times its own.

        Raises:
            DataError: names or shapes are not this model's; nothing is changed then.
        """
        own, given = dict(self._causal.named_parameters()), dict(tensors)
        if wrong := unlike(self._causal, {name: tensor.shape for name, tensor in given.items()}):
            raise DataError(
                f"a teacher that follows the student needs the student's architecture, but {wrong[0]} differs between "
                "them; set teacher.path to a copy of the student's checkpoint, or teacher.mixup=0"
            )
        for name, parameter in own.items():
            parameter.lerp_(given[name].to(parameter), share)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held while nothing is computed."""
        yield from self._causal.parameters()
        yield from self._causal.buffers()

    def state(self) -> dict[str, Tensor]:
        """Host copies of all parameters by name (tied ones once)."""
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in self._causal.named_parameters()}

    def hidden(self, sequences: Sequence[Int[Tensor, " n"]]) -> Float[Tensor, "N H"]:
        """Hidden states after the final norm at every token of `sequences`, one after the other."""
        lengths = torch.tensor([len(s) for s in sequences])
        ends = lengths.cumsum(0)
        places = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
        body = self._causal.base_model(
            input_ids=torch.cat(list(sequences)).long()[None].to(self.device),
            position_ids=places[None].to(self.device),
            packing=Packing.of(torch.cat([torch.zeros(1, dtype=ends.dtype), ends])),
            use_cache=False,
        )
        return body.last_hidden_state[0]

    def read(self, sequences: Sequence[Int[Tensor, " n"]]) -> Float[Tensor, "N V"]:
        """Float32 logits after every token of `sequences`."""
        return self.logits(self.hidden(sequences))

    def logits(self, hidden: Float[Tensor, "rows H"]) -> Float[Tensor, "rows V"]:
        """Float32 logits over the whole vocabulary."""
        return F.linear(hidden, self._head.weight, self._head.bias).float()


def load_causal(
    path: str,
    part: str,
    dtype: torch.dtype,
    make: Callable[[PreTrainedModel], Model],
    read: Callable[[Model, Sequence[Tensor]], Tensor],
    *,
    bias: bool,
    device: torch.device | None = None,
    gradient_checkpointing: bool = False,
) -> Model:
    """Model that `make` builds of the causal model in `path`, on `device` (None: the host), with packed attention.

    It is compared with itself before it is used, `read` giving its logits `[N, V]` after every token of packed
    sequences: a model with layers that carry a state from one packed sequence to the next, with an attention that is
    not ours, or with a head that does more than multiply (`bias` allows one to add), is refused with a
    `ConfigurationError` that begins with `part`.
    """
    causal = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        device_map=None if device is None else {"": device},  # where each tensor goes once read: no copy on the host
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    assert isinstance(causal, PreTrainedModel)
    check_layers(causal, part)
    head = check_head(causal, part, bias=bias)
    trial = Trial.of(causal, len(head.weight), part)
    causal.set_attn_implementation(NAME)
    model = make(causal)
    trial.check(lambda sequences: read(model, sequences), part)
    if gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_packed(path: str, dtype: torch.dtype, device: torch.device) -> PackedModel:
    """The teacher in `path`, frozen."""

    def frozen(causal: PreTrainedModel) -> PackedModel:
        return PackedModel(causal.eval().requires_grad_(False))

    return load_causal(path, f"the teacher {path!r}", dtype, frozen, PackedModel.read, bias=True, device=device)


register(AttentionInterface, AttentionMaskInterface)
