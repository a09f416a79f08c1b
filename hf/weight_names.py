"""Names in the checkpoint of a model's parameters, which engines and exports use."""

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from opd.errors import ConfigurationError


def places(causal: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Stored name -> the parameter or buffer it is loaded into, and whether it is converted on the way (fused, split).

    As transformers loads it; the model may lie on the meta device. Names that are in no model come back as they are.
    """
    transforms = get_model_conversion_mapping(causal)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state, prefix = causal.state_dict(), causal.base_model_prefix
    found = {}
    for name in sorted(stored):
        place, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, pattern = rename_source_key(name, [], [], prefix, state)
        found[name] = (place, pattern is not None)
    return found


def stored_names(causal: PreTrainedModel, stored: Iterable[str], part: str) -> dict[str, str]:
    """Parameter -> its name in the checkpoint, as in `{"lm_head.weight": "embed_out.weight"}`; tied ones once.

    Raises:
        ConfigurationError: a parameter is made of several stored tensors, or is several matrices in one.
    """
    kept = {place: name for name, (place, converted) in places(causal, stored).items() if not converted}
    other = [name for name, p in causal.named_parameters() if name not in kept or p.ndim > 2]
    if other:
        raise ConfigurationError(
            f"{part} needs matrices that are stored one by one as {type(causal).__name__} has them, but {other[0]!r} "
            f"and {len(other) - 1} more are several in one (fused experts), which the learner does not publish to "
            "engines; choose a dense model as a student"
        )
    return {name: kept[name] for name, _ in causal.named_parameters()}
