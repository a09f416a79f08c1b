"""Exactness of a causal model on packed sequences: checked by its layers and its head, and by a trial.

A model is one of transformers', of which only plain attributes are used. What cannot work is refused with a sentence
that begins with `part`, e.g. "the student 'models/mamba'".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opd.errors import ConfigurationError, DataError

Read = Callable[[Sequence[Tensor]], Tensor]

_SEEN = {"full_attention", "sliding_attention", "attention"}  # layers that `opd.loss.packed_attention` computes
_LENGTHS = (9, 3, 17, 5, 24)  # a state that leaks is largest in the short ones
_LONGEST_WINDOW = 160  # a wider window is not filled by the trial, which is to take a second
_TOLERATED = 3.0  # times the floor; what is right has at most 1 (docs/models.md)
_CHANGED = 0.1  # times the floor: how far one sequence may move another, which it should not at all


def context_length(config: Any) -> int | None:
    """Maximum sequence length, rope scaling considered; None where a configuration of transformers names no bound.

    Example: 2048 positions with linear scaling by 4 are 8192. What YaRN, llama3 and longrope scale is already counted.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    stretched = rope.get("rope_type") in ("linear", "dynamic", "ntk") and "gemma3" not in str(config.model_type)
    return int(positions * (rope.get("factor") or 1.0 if stretched else 1.0)) if positions else None


def unlike(causal: Any, given: Mapping[str, Sequence[int]]) -> list[str]:
    """Parameters (their names) in which a model and `given` shapes by name differ, sorted; [] if it can take them.

    A tied output matrix has one name in the model and may come under both.
    """
    own = {name: tuple(parameter.shape) for name, parameter in causal.named_parameters()}
    both = {name for name, _ in causal.named_parameters(remove_duplicate=False)}
    return sorted((given.keys() - both) | {name for name in own if tuple(given.get(name, ())) != own[name]})


def has_experts(causal: Any) -> bool:
    """Whether some parameters are stacks of matrices, as those of a mixture of experts (and not of a convolution)."""
    modules = [module for module in causal.modules() if not isinstance(module, nn.Conv1d)]
    return any(parameter.ndim > 2 for module in modules for parameter in module.parameters(recurse=False))


def check_layers(causal: Any, part: str) -> None:
    """Refuse a model whose layers are not attention that can be packed; it may lie on the meta device.

    Raises:
        ConfigurationError: it carries a state from token to token, sees in chunks, or has attention of its own.
    """
    name, config = type(causal).__name__, causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or _SEEN) - _SEEN
    convolution = any(isinstance(module, nn.Conv1d) for module in causal.modules())
    why = ""
    if getattr(causal, "_is_stateful", False) or convolution:
        why = "layers that carry a state from token to token (such as Mamba, linear attention, convolution)"
    elif kinds:
        why = f"layers of the kind {sorted(kinds)[0]}"
    elif getattr(config, "attention_chunk_size", None):
        why = "attention in chunks"
    elif not getattr(config, "is_causal", True):
        why = "attention in both directions"
    elif not getattr(causal, "_supports_attention_backend", False):
        why = "an attention of its own (transformers lets no other take its place)"
    if why:
        raise ConfigurationError(
            f"{part} is a {name}, which has {why}; sequences that are packed one after the other would not be read "
            "exactly, so choose a model with full or sliding-window attention in every layer"
        )


def check_head(causal: Any, part: str, bias: bool) -> nn.Linear:
    """The output layer; refuses one that does more than multiply, and a `bias` that is not allowed.

    The model's own forward is asked, with a body that says made-up hidden states and a small output matrix in place of
    its own: logits that are scaled or bounded afterwards are seen whatever their setting is called. The model may lie
    on the meta device and is left as it was.
    """
    name, head, prefix = type(causal).__name__, causal.get_output_embeddings(), causal.base_model_prefix
    if not isinstance(head, nn.Linear):
        raise ConfigurationError(
            f"{part} needs a plain output matrix, but {name} has {head}; choose a model whose lm_head is a linear layer"
        )
    if head.bias is not None and not bias:
        raise ConfigurationError(
            f"{part} needs a plain output matrix, but the output layer of {name} has a bias; choose a model whose "
            "lm_head is a linear layer without bias"
        )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, head.in_features, generator=generator)
    small = nn.Linear(head.in_features, 8, bias=False)
    with torch.no_grad():
        small.weight.copy_(40 * F.normalize(torch.randn(small.weight.shape, generator=generator), dim=-1))
        body = getattr(causal, prefix)
        try:
            setattr(causal, prefix, _ConstantBody(hidden))
            causal.set_output_embeddings(small)
            logits = causal(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False).logits
        finally:
            setattr(causal, prefix, body)
            causal.set_output_embeddings(head)
        expected = F.linear(hidden, small.weight)
    if not torch.allclose(logits.float(), expected, rtol=1e-3, atol=1e-3):
        worst = int((logits.float() - expected).abs().argmax())
        raise ConfigurationError(
            f"{part} needs logits that are hidden states times the output matrix, but {name} scales or bounds them "
            f"afterwards ({float(expected.flatten()[worst]):.1f} becomes {float(logits.flatten()[worst]):.1f}); choose "
            "a model with a plain output layer"
        )
    return head


class _ConstantBody(nn.Module):
    """Stand-in for a model's body, and any part of one, that returns `hidden` for every input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "hidden" or name.startswith("_") else self

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return _Output(last_hidden_state=self.hidden)


class _Output(dict[str, Any]):
    """Stand-in for the output of transformers' models: fields by name, by place, and None for missing ones."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, place: Any) -> Any:
        return self["last_hidden_state"] if place == 0 else super().__getitem__(place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Reference log-probabilities (float32) of a model on some sequences, each alone, and their rounding error.

    `floor` (nats) is how far that moves if what the embedding and each layer write is rounded otherwise, and `moved` in
    multiples of it what other neighbors in a row may change.
    """

    sequences: tuple[Int[Tensor, " _"], ...]
    expected: tuple[Float[Tensor, "_ V"], ...]
    floor: float
    moved: float = _CHANGED

    @staticmethod
    @torch.no_grad()
    def of(causal: Any, vocabulary: int, part: str) -> "Trial":
        """Reference of `causal` on each sequence alone, by transformers' own attention.

        Raises:
            DataError: it answers with NaN.
        """
        window = getattr(causal.config.get_text_config(), "sliding_window", None)
        window = window if window and window <= _LONGEST_WINDOW else 0
        positions = getattr(causal.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        lengths = [min(length, positions) for length in (*_LENGTHS, *([2 * window + 9] if window else []))]
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
        device = next(causal.parameters()).device

        def alone(after: int) -> list[Tensor]:
            rows = [F.pad(s, (0, after), value=1)[None].to(device) for s in ids]
            logits = [causal(input_ids=row, use_cache=False).logits[0] for row in rows]
            return [one[: len(s)].float() for one, s in zip(logits, ids, strict=True)]

        causal.set_attn_implementation("eager")  # the only one that computes whatever a model asks
        logits = alone(0)
        if any(bool(one.isnan().any()) for one in logits):
            raise DataError(f"{part} answers with NaN, so its weights are damaged; copy the folder anew")
        hooks = [module.register_forward_hook(_nudge) for module in stream(causal)]
        again = alone(1 if max(lengths) < positions else 0)
        for hook in hooks:
            hook.remove()
        expected = tuple(one.log_softmax(-1) for one in logits)
        # Never less than the rounding of a logit itself.
        grain = torch.finfo(next(causal.parameters()).dtype).eps * max(float(one.abs().median()) for one in logits)
        floor = max(_gap(expected, (one.log_softmax(-1) for one in again)), grain)
        # Neighbors decide how many tokens an expert multiplies at once, and with it how their products are rounded.
        moved = _TOLERATED if has_experts(causal) else _CHANGED
        return Trial(sequences=tuple(ids), expected=expected, floor=floor, moved=moved)

    @torch.no_grad()
    def check(self, packed: Read, part: str) -> float:
        """The gap of `packed` (sequences in one row to logits `[N, V]`) in nats; refuses one above rounding.

        Raises:
            ConfigurationError: sequences are read otherwise than alone, or one changes what is said of another.
        """
        lengths = [len(s) for s in self.sequences]
        first = packed(self.sequences).float().log_softmax(-1).split(lengths)
        vocabulary = first[0].shape[-1]
        # The same lengths, but every second sequence is another: the rest must not notice.
        others = [(s + 1) % vocabulary if i % 2 == 0 else s for i, s in enumerate(self.sequences)]
        second = packed(others).float().log_softmax(-1).split(lengths)
        gap, moved = _gap(self.expected, first), _gap(first[1::2], second[1::2])
        if not gap <= _TOLERATED * self.floor or not moved <= self.moved * self.floor:
            wrong = f"{gap:.3g} nats from what it says of each alone" if gap > moved else f"{moved:.3g} nats by others"
            raise ConfigurationError(
                f"{part} does not read packed sequences exactly: what it says of one is moved {wrong}, where its "
                f"dtype rounds {self.floor:.2g}; choose a model with plain causal attention and an unscaled output "
                "matrix"
            )
        return gap


def stream(causal: Any) -> list[nn.Module]:
    """Modules that write the residual stream: the embedding and every layer."""
    layers = causal.config.get_text_config().num_hidden_layers
    lists = [m for m in causal.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return [causal.get_input_embeddings(), *(layer for found in lists[:1] for layer in found)]


def _nudge(_: nn.Module, __: Any, written: Tensor | tuple[Any, ...]) -> Tensor | tuple[Any, ...]:
    """The residual stream with every second number larger by a rounding."""
    if isinstance(written, tuple):
        return (_nudge(_, __, written[0]), *written[1:])
    places = torch.arange(written.shape[-1], device=written.device) % 2
    return written * (1 + torch.finfo(written.dtype).eps * places.to(written.dtype))


def _gap(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Typical gap of the worst sequence: of each token the largest over the vocabulary, of these the median.

    A median, since a router may choose another expert for a token by a rounding.
    """
    worst = [(a - b).abs().amax(-1).median() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(worst).max())  # unlike Python's own, NaN if one is
