"""Certification of a method: all properties that apply to it, measured.

It runs the method's own rollout, scorer, weights, packing and loss in enumerable worlds (`opd.certify.worlds`) and
compares expected gradients with those of the promise, and results with each other. Nothing is left to chance, so a
certificate is the same on every machine, up to rounding.
"""

from collections.abc import Iterator
from dataclasses import replace

from opd.certify.certificate import Certificate, Finding, Row, at_least, worst
from opd.certify.checks.circumstances import check_circumstances
from opd.certify.checks.degenerate import check_degenerate
from opd.certify.checks.divisors import check_divisor
from opd.certify.checks.groups import check_groups
from opd.certify.checks.invariances import check_masks, check_steps, check_teacher, check_tokens
from opd.certify.checks.rollouts import check_coins, check_filters, check_records, check_writing
from opd.certify.checks.schedules import check_schedules
from opd.certify.checks.scorers import check_credit, check_definitions, check_requests, check_score_order
from opd.certify.checks.supports import check_followed, check_supports
from opd.certify.checks.term_sums import check_terms
from opd.certify.checks.updates import check_updates
from opd.certify.checks.weights import NUMBERS, check_weights
from opd.certify.draws import check_draws
from opd.certify.expected_gradient import (
    check_corners,
    check_limits,
    check_other_settings,
    check_promise,
    check_several_teachers,
    corner_cases,
)
from opd.certify.fitting import fitted, teacher_names
from opd.certify.gradients import Case, make_case
from opd.certify.shown import check_shown, with_one_context
from opd.certify.sources import with_one_source, with_whole_answers
from opd.certify.worlds import VOCABULARY, make_world, stale
from opd.method.method import Method
from opd.method.needs import named
from opd.ports import Role

SEEDS = (0, 1)
TRAINS = "tokens are trained"


def certify(method: Method) -> Certificate:
    """Check every property that applies to `method`. Raises what its parts raise."""
    if method.is_sum:
        return _certify_sum(method)
    method = with_one_source(with_one_context(with_whole_answers(method)))
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
    worlds = [make_world(seed, names=names, named=named(method, Role.READER)) for seed in SEEDS]
    cases = [make_case(small, world) for world in worlds]
    for finding in (*check_weights(cases[0]), *check_filters(cases[0])):
        _note(finding, rows, skipped)
    broken = any(row.name == NUMBERS and not row.passed for row in rows)
    if not broken and not all(case.trains() for case in cases):
        rows.append(at_least(TRAINS, 0.0, 1.0))
        broken = True
    if broken:
        skipped["all other properties"] = "there is no loss without weights"
        return Certificate(method=method.name, promise=str(promise), rows=tuple(rows), skipped=skipped)
    on_policy = getattr(method.rollout, "on_policy", False)
    stale_cases = [make_case(small, stale(world, 1)) if on_policy else None for world in worlds]
    several = zip(*[list(check_promise(*pair)) for pair in zip(cases, stale_cases, strict=True)], strict=True)
    for same in several:
        alike = [finding for finding in same if isinstance(finding, Row)]
        _note(worst(alike) if alike else same[0], rows, skipped)
    for finding in _checks(method, cases[0], stale_cases[0] or cases[0]):
        _note(finding, rows, skipped)
    return Certificate(method=method.name, promise=str(promise), rows=tuple(rows), skipped=skipped)


def _certify_sum(method: Method) -> Certificate:
    """Certificate of a sum of terms: of each term by itself, and of the gradient of the sum."""
    alone = {name: certify(method.one_term(name)) for name in method.every_term}
    rows = [replace(row, name=f"{name}: {row.name}") for name, certificate in alone.items() for row in certificate.rows]
    skipped = {
        f"{name}: {what}": why for name, certificate in alone.items() for what, why in certificate.skipped.items()
    }
    if all(certificate.promise for certificate in alone.values()):
        for finding in (*check_terms(method), *check_schedules(method, make_world(0))):
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


def _checks(method: Method, fresh: Case, stale_case: Case) -> Iterator[Finding]:
    """Findings in one world. `method` is as shipped."""
    corners = corner_cases(method)
    extremes = [corner.case for corner in corners if corner.case]
    yield from check_corners(corners)
    yield from check_several_teachers(method)
    yield from check_other_settings(stale_case)
    yield from check_limits(fresh)
    yield from check_teacher(fresh)
    yield from check_credit(fresh, extremes[0])
    yield from check_groups(fresh)
    yield from check_definitions(fresh, extremes[0])
    yield from check_supports([fresh, *extremes[:2]])
    yield from check_followed(fresh)
    yield from check_steps(fresh)
    yield from check_tokens(fresh)
    yield from check_masks(fresh)
    yield from check_divisor(fresh)
    yield from check_requests([fresh, *extremes])
    yield from check_records([fresh, *extremes])
    yield from check_writing(fresh)
    yield from check_coins(method.rollout)
    yield from check_degenerate(fresh)
    yield from check_schedules(method, fresh.world)
    yield from check_updates(fresh)
    yield from check_score_order(fresh)
    yield from check_circumstances(fresh)
    yield from check_draws(fresh)
    yield from check_shown(fresh)
