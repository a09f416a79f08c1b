"""A method is a frozen value with slots: rollout -> scorer -> weights -> objective -> update.

Parts are frozen dataclasses whose fields are their whole configuration; engines are call arguments. Each part
declares what testimony it consumes and produces, so a combination that would be meaningless is refused when it
is composed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float

from opd.errors import ConfigurationError, DataError
from opd.loss.packing import Normalizer, TokenMean
from opd.method.promises import ClippedCredit, ScoredSupport, Union, renormalized
from opd.method.slots import Objective, Rollout, Scorer, TokenWeight, Update
from opd.ports import PromptSource
from opd.settings.ranges import Matches
from opd.settings.validation import settings
from opd.types import Scored, Scores, TopKScores
from opd.updates.optimizer import OptimizerStep

MethodName = Annotated[
    str,
    Matches(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}", "of letters, digits and . _ = , + - (runs are named after it)"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Method:
    """A distillation method, complete. See `conf/method/` for the shipped ones."""

    # what reports call the method
    name: MethodName
    rollout: Rollout
    scorer: Scorer
    objective: Objective
    # how a batch becomes an update
    update: Update = field(default_factory=OptimizerStep)
    # parts that weigh tokens, by name; their weights are multiplied
    weights: Mapping[str, TokenWeight] = field(default_factory=dict)
    # what a step's sum of losses is divided by
    normalizer: Normalizer = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        said = self.scorer.produces
        if not issubclass(self.rollout.records, self.scorer.needs):
            raise ConfigurationError(
                f"scorer {_name(self.scorer)} needs {self.scorer.needs.__name__} from the writer, but rollout "
                f"{_name(self.rollout)} records {self.rollout.records.__name__}; set rollout.record_topk"
            )
        # Declared, not assumed: a rollout that does not say so is not on-policy.
        if getattr(self.objective, "on_policy", False) and not getattr(self.rollout, "on_policy", False):
            raise ConfigurationError(
                f"objective {_name(self.objective)} estimates from tokens that the student drew, but rollout "
                f"{_name(self.rollout)} has text of somebody else's; choose rollout StudentRollout, or an objective "
                "over distributions such as FullReverseKL"
            )
        if _estimates(self.objective) and getattr(self.rollout, "truncated", False):
            raise ConfigurationError(
                f"objective {_name(self.objective)} estimates from the written token and needs every token to have a "
                f"chance of being written, but rollout {_name(self.rollout)} has top_p < 1 or temperature 0; set "
                "rollout.top_p=1 and a temperature above 0, or choose an objective over distributions such as "
                "FullReverseKL"
            )
        readers = {"objective": self.objective} | {f"weight {k!r}": w for k, w in self.weights.items()}
        for role, reader in readers.items():
            if not issubclass(said, reader.consumes) and not (
                role == "objective" and issubclass(getattr(said, "reads_as", Scores), reader.consumes)
            ):
                raise ConfigurationError(
                    f"{role} {_name(reader)} needs {reader.consumes.__name__}, but scorer {_name(self.scorer)} "
                    f"produces {said.__name__}; choose a scorer that produces it or another {role}"
                )
        self._check_weights()
        self._check_supports()

    def _check_weights(self) -> None:
        """Refuse weights that would bend what an estimate expects."""
        if not _estimates(self.objective):
            return
        for name, part in self.weights.items():
            if getattr(part, "reads_written", True):
                raise ConfigurationError(
                    f"weight {name!r} {_name(part)} depends on what was written, but objective {_name(self.objective)} "
                    "estimates from written tokens, whose expectation such a weight changes; choose an objective over "
                    "distributions such as FullReverseKL, or leave the weight out (one that reads the state alone "
                    "declares reads_written = False)"
                )

    def _check_supports(self) -> None:
        """Refuse an objective that renormalizes over a single id, where every distribution is the same."""
        for support in renormalized(getattr(self.objective, "promise", None)):
            setting, ids = _ids(self) if isinstance(support, ScoredSupport) else _ids_of(self.objective, support)
            if ids == 1:
                raise ConfigurationError(
                    f"objective {_name(self.objective)} renormalizes over its support and needs at least 2 ids there, "
                    f"but {setting}=1, and of a single id nothing is left to learn; set {setting}=2 or more"
                )


def _estimates(objective: Any) -> bool:
    """Whether the expected gradient needs tokens drawn from all of the student's distribution.

    A clipped credit counts what was written and nothing else; its promise says so.
    """
    return getattr(objective, "on_policy", False) and not isinstance(getattr(objective, "promise", None), ClippedCredit)


def _ids(method: Method) -> tuple[str, int]:
    """The setting that says of how many ids the scorer's testimony is, and its value; 0 where that is not known."""
    scorer: Any = method.scorer
    if issubclass(scorer.needs, TopKScores):
        rollout: Any = method.rollout
        mixed = "student." if hasattr(rollout, "student") else ""
        writer = rollout.student if mixed else rollout
        return f"method.rollout.{mixed}record_topk", getattr(writer, "record_topk", 0)
    return "method.scorer.k", getattr(scorer, "k", 0)


def _ids_of(objective: Any, support: Any) -> tuple[str, int]:
    """The same of a support that the objective chooses. The union of two single ids may hold two."""
    inside = "support." if hasattr(objective, "support") else ""
    return f"method.objective.{inside}k", 0 if isinstance(support, Union) else getattr(support, "k", 0)


def check_prompts(method: Method, prompts: PromptSource) -> None:
    """Refuse a prompt source whose groups the method's scorer cannot judge."""
    if prompts.group_size < method.scorer.min_group:
        raise ConfigurationError(
            f"scorer {_name(method.scorer)} compares the trajectories of a group and needs "
            f"prompts.group_size >= {method.scorer.min_group}, but got {prompts.group_size}; raise prompts.group_size"
        )


def weigh(weights: Mapping[str, TokenWeight], scored: Sequence[Scored[Any]]) -> list[Float[np.ndarray, " _T"]]:
    """The product of all weights and the loss mask, per trajectory."""
    total = [item.trajectory.loss_mask.astype(np.float64) for item in scored]
    for name, part in weights.items():
        factors = part(scored)
        lengths, got = [len(item.trajectory) for item in scored], [len(factor) for factor in factors]
        if got != lengths:
            raise DataError(
                f"weight {name!r} {_name(part)} must give one number per token, {lengths} for the step's "
                f"trajectories, but gave {got}; correct the weight part"
            )
        total = [a * b for a, b in zip(total, factors, strict=True)]
    return total


def _name(part: object) -> str:
    return type(part).__name__
