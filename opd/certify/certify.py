"""`certify`: every property that applies to a method, measured.

It runs the method's own rollout, scorer, weights, packing and loss in enumerable worlds (`opd.certify.worlds`) and
compares expected gradients with those of the promise, and results with each other. Nothing is left to chance, so a
certificate is the same on every machine, up to rounding.
"""

from collections.abc import Iterator
from dataclasses import replace

from opd.certify.draws import of_draws
from opd.certify.expected_gradient import (
    at_limits,
    at_other_settings,
    corners,
    in_corners,
    of_several_teachers,
    of_the_promise,
)
from opd.certify.fitting import fitted, teacher_names
from opd.certify.gradients import Case, case
from opd.certify.page import Certificate, Finding, Row, at_least, worst
from opd.certify.relations import of_masks, of_steps, of_tokens, with_teacher
from opd.certify.scoring import of_credit, of_order, of_questions
from opd.certify.sums import of_terms
from opd.certify.worlds import VOCABULARY, make_world, stale
from opd.method.method import Method

SEEDS = (0, 1)


def certify(method: Method) -> Certificate:
    """Check every property that applies to `method`. Raises what its parts raise."""
    if method.is_sum:
        return _of_sum(method)
    promise = getattr(method.objective, "promise", None)
    if promise is None:
        return Certificate(
            method=method.name,
            promise="nothing: the objective has no `promise`",
            rows=(at_least("a promise is declared", 0.0, 1.0),),
            skipped={},
        )
    small, names = fitted(method, VOCABULARY), teacher_names(method)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    worlds = [make_world(seed, names=names) for seed in SEEDS]
    cases = [case(small, world) for world in worlds]
    drawn = getattr(method.rollout, "on_policy", False)
    olds = [case(small, stale(world, 1)) if drawn else None for world in worlds]
    several = zip(*[list(of_the_promise(*pair)) for pair in zip(cases, olds, strict=True)], strict=True)
    for same in several:
        alike = [finding for finding in same if isinstance(finding, Row)]
        _note(worst(alike) if alike else same[0], rows, skipped)
    for finding in _of_one(method, cases[0], olds[0] or cases[0]):
        _note(finding, rows, skipped)
    return Certificate(method=method.name, promise=str(promise), rows=tuple(rows), skipped=skipped)


def _of_sum(method: Method) -> Certificate:
    """Each term by itself, and the gradient of all of them together."""
    alone = {name: certify(method.one_term(name)) for name in method.every_term}
    rows = [replace(row, name=f"{name}: {row.name}") for name, page in alone.items() for row in page.rows]
    skipped = {f"{name}: {what}": why for name, page in alone.items() for what, why in page.skipped.items()}
    if all(page.promise for page in alone.values()):
        for finding in of_terms(method):
            _note(finding, rows, skipped)
    promise = " + ".join(
        f"{name}: {term.coefficient} * {alone[name].promise}" for name, term in method.every_term.items()
    )
    return Certificate(method=method.name, promise=promise, rows=tuple(rows), skipped=skipped)


def _note(finding: Finding, rows: list[Row], skipped: dict[str, str]) -> None:
    if isinstance(finding, Row):
        rows.append(finding)
    else:
        skipped[finding.name] = finding.why


def _of_one(method: Method, fresh: Case, old: Case) -> Iterator[Finding]:
    """What is measured in one world. `method` is as shipped."""
    extremes = corners(method)
    elsewhere = [corner.found for corner in extremes if corner.found]
    yield from in_corners(extremes)
    yield from of_several_teachers(method)
    yield from at_other_settings(old)
    yield from at_limits(fresh)
    yield from with_teacher(fresh)
    yield from of_credit(fresh, elsewhere[0])
    yield from of_steps(fresh)
    yield from of_tokens(fresh)
    yield from of_masks(fresh)
    yield from of_questions([fresh, *elsewhere])
    yield from of_order(fresh)
    yield from of_draws(fresh)
