"""Names in the checkpoint of a model's parameters, which engines and exports use.

transformers keeps all experts of a layer in one parameter, a checkpoint every matrix of every expert by itself, under
the names that vLLM loads. Such a parameter is published in `Piece`s.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from hf.folder import Stored
from opd.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stored matrix within fused experts `[experts, rows, columns]`: rows `first` to `last - 1` of number `expert`.

    Example: `name="model.layers.0.mlp.experts.3.up_proj.weight"`, the second half of the rows.
    """

    name: str
    expert: int
    first: int
    last: int

    def of(self, fused: Tensor) -> Tensor:
        """The matrix, a contiguous view of `fused`."""
        return fused[self.expert, self.first : self.last]


def places(causal: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Stored name -> the parameter or buffer it is loaded into, and whether it is converted on the way (fused, split).

    As transformers loads it; the model may lie on the meta device. Names that are in no model come back as they are.
    """
    return {name: (place, source is not None) for name, (place, source) in _sources(causal, stored).items()}


def _sources(causal: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """`places`, with the pattern of the conversion's source, such as `mlp.experts.*.up_proj.weight`."""
    transforms = get_model_conversion_mapping(causal)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state, prefix = causal.state_dict(), causal.base_model_prefix
    found = {}
    for name in sorted(stored):
        place, source = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, source = rename_source_key(name, [], [], prefix, state)
        found[name] = (place, source)
    return found


def stored_names(causal: PreTrainedModel, stored: Mapping[str, Stored], part: str) -> dict[str, str]:
    """Parameter -> its name in the checkpoint, as in `{"lm_head.weight": "embed_out.weight"}`; tied ones once.

    Fused experts, which have no name there, keep their own; `stored_pieces` has theirs.

    Raises:
        ConfigurationError: a parameter is made of several stored tensors in a way that is not known, or the model
            computes with a stored tensor that is no parameter, which nothing would publish.
    """
    own, state = dict(causal.named_parameters()), causal.state_dict()
    extra = sorted(name for name, _ in causal.named_buffers() if name in state)
    extra += [name for name, p in own.items() if not p.requires_grad]  # of a model that was made and not yet frozen
    if extra:
        raise ConfigurationError(
            f"{part} is a {type(causal).__name__}, which computes with {extra[0]!r}, a stored tensor that is not "
            f"trained ({len(extra)} in all; a router's correction bias, say) and that the learner does not publish to "
            "engines; choose another model as a student"
        )
    kept = {place: name for name, (place, converted) in places(causal, stored).items() if not converted}
    pieces = stored_pieces(causal, stored)
    other = [name for name in own if name not in pieces and name not in kept]
    if other:
        raise ConfigurationError(
            f"{part} needs matrices that are stored one by one, but {other[0]!r} and {len(other) - 1} more of its "
            f"{type(causal).__name__} are several in one, in an order that the learner cannot publish to engines; "
            "choose a dense model as a student, or experts that are stored as those of Qwen3-MoE, OLMoE or Mixtral"
        )
    return {name: name if name in pieces else kept[name] for name in own}


def stored_pieces(causal: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, tuple[Piece, ...]]:
    """Fused experts -> their pieces in the checkpoint, where these cover them exactly, expert by expert."""
    converters = [t for t in get_model_conversion_mapping(causal) if isinstance(t, WeightConverter)]
    by_place: dict[str, dict[tuple[int, int], str]] = {}
    for name, (place, source) in _sources(causal, stored).items():
        converter = next((c for c in converters if source is not None and source in c.source_patterns), None)
        if source is None or converter is None or not _stacks(converter):
            continue
        number = re.search(re.escape(source).replace(r"\*", r"(\d+)"), name)
        if number:
            order = (int(number[1]), converter.source_patterns.index(source))
            by_place.setdefault(place, {})[order] = name
    found = {}
    for place, names in by_place.items():
        pieces, shape = _cut([(*order, names[order]) for order in sorted(names)], stored)
        if shape == tuple(causal.get_parameter(place).shape):
            found[place] = pieces
    return found


def _stacks(converter: WeightConverter) -> bool:
    """Whether it makes a matrix per expert, its sources one below the other, and stacks these."""
    kinds = [(type(op), op.dim) for op in converter.operations if isinstance(op, MergeModulelist | Concatenate)]
    stacked = [(MergeModulelist, 0), (Concatenate, 1)][: 2 if len(converter.source_patterns) > 1 else 1]
    return kinds == stacked and len(converter.operations) == len(stacked)


def _cut(
    ordered: Sequence[tuple[int, int, str]], stored: Mapping[str, Stored]
) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """Pieces of (expert, source, name), and the shape of what they make up; () where they make up nothing."""
    pieces, rows, experts = list[Piece](), 0, 0
    shapes = {stored[name].shape[1:] for *_, name in ordered}
    heights = set[int]()
    for expert, source, name in ordered:
        if source == 0:
            heights |= {rows} if experts else set()
            rows, experts = 0, experts + 1
        last = rows + stored[name].shape[0]
        pieces.append(Piece(name=name, expert=expert, first=rows, last=last))
        rows = last
    whole = len(shapes) == 1 and heights <= {rows} and {p.expert for p in pieces} == set(range(experts))
    return tuple(pieces), (experts, rows, *next(iter(shapes))) if whole else ()
