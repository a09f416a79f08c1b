"""Sources of texts in worlds, for methods whose terms are each about the texts of one source.

Which source a group has is drawn for its prompt, and a world has two prompts: the draw is settled here, so that a term
has the texts that it trains, and a sum has some of both.
"""

from dataclasses import replace
from typing import Any

from opd.certify.worlds import CONTEXTS
from opd.method.method import Method
from opd.rollouts.mixed import AnswerRollout
from opd.token_weights.sources import Source

ROOMY = 100_000  # tokens: more than any text of a world has


def _selected(method: Method) -> list[Source]:
    """Sources that token weights of any term select, where the rollout mixes several."""
    if not hasattr(method.rollout, "student_generates"):
        return []
    weights: list[Any] = [weight for term in method.every_term.values() for weight in term.weights.values()]
    return [weight.source for weight in weights if isinstance(getattr(weight, "source", None), Source)]


def _roomy(rollout: Any) -> Any:
    fixed = rollout.fixed
    return replace(rollout, fixed=replace(fixed, max_tokens=ROOMY) if hasattr(fixed, "max_tokens") else fixed)


def with_whole_answers(method: Method) -> Method:
    """The method, whose rollout cuts no answer of a data set: what is cut there enumerates no state."""
    rollout: Any = method.rollout
    if isinstance(rollout, AnswerRollout):
        return replace(method, rollout=replace(rollout, max_tokens=ROOMY))
    if isinstance(getattr(rollout, "fixed", None), AnswerRollout):
        return replace(method, rollout=_roomy(rollout))
    return method


def with_one_source(method: Method) -> Method:
    """The method of one term, with texts of the source alone that its weights select, if they select one."""
    sources, rollout = _selected(method), method.rollout
    if not sources:
        return method
    share: Any = {"fraction": 1.0 if sources[0] is Source.STUDENT else 0.0}
    return replace(method, rollout=replace(_roomy(rollout), **share))


def with_both_sources(method: Method) -> Method:
    """The sum of terms, with texts of either source for one of the two prompts of a world, if its terms select them."""
    if not _selected(method):
        return method
    prompts = [f"state/{number}" for number in range(len(CONTEXTS))]
    mixed: list[Any] = [replace(_roomy(method.rollout), **_coin(seed)) for seed in range(64)]
    parted = (rollout for rollout in mixed if len({rollout.student_generates(p) for p in prompts}) > 1)
    return replace(method, rollout=next(parted, mixed[0]))


def _coin(seed: int) -> Any:
    return {"fraction": 0.5, "seed": seed}
