"""`opd certify` certifies every shipped method and names what is wrong with every planted defect."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.cli.certify import certify_methods
from launch.config.run_config import run_config
from launch.config.shipped_files import groups
from opd.certify.certificate import Bound, Certificate, Row
from opd.certify.certify import certify
from opd.certify.checks.scorers import check_score_order
from opd.certify.checks.where_to_look import where_to_look
from opd.certify.gradients import how_it_departs, make_case
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError
from opd.types import TokenLoss

ROOT = Path(__file__).resolve().parents[3]
BROKEN = ROOT / "benchmarks" / "broken" / "conf"

GRADIENT = "gradient of the promise"
STALE = f"{GRADIENT}, stale writer"
LONG, SEVERAL = f"{GRADIENT}, long prompts and completions", f"{GRADIENT}, several teachers"
FLOAT32, IDS = f"{GRADIENT}, float32", f"{GRADIENT}, 256 ids"
SURE = (f"{FLOAT32}, sure teacher", f"{FLOAT32}, sure student")
FAR_TEACHER, FAR_WRITER = f"{GRADIENT}, teacher far away", f"{GRADIENT}, writer far away"
COLD, SETTINGS = f"{GRADIENT}, temperature 0.7", f"{GRADIENT}, other settings"
ZERO = "zero where the student equals its teacher"
TEACHER = "the teacher matters"
TOWARDS = "a step moves the student towards its teacher"
CUT, CHUNKS = "invariance: micro-batch size", "invariance: chunks of the loss"
RANKS, IDLE = "invariance: number of ranks", "invariance: ranks without work"
PACKING, AGAIN = "invariance: packing and padding (every trajectory alone)", "invariance: evaluated before"
POSITION, WEIGHT = "invariance: position in the text", "invariance: weight and divisor"
OTHERS, MATRICES = "invariance: other tokens of the batch", "invariance: order of the teachers"
DIVISOR = "the divisor of a step counts what is trained"
DEFINED = "credit is what it is defined to be"
BETTER = "the better of two answers has the greater advantage"
LAST = "the last return of a text is 0"
LATER = "a return falls with the teacher's doubt about later tokens, and about no others"
ASKED = "teachers are asked about whole texts in their own context"
WRITTEN = "text is written in its own context, as the rollout says"
ORDER = "scores follow their text in any order, and again"
WHOLE = "limit: k = V is the whole vocabulary"
SUM = "gradient of the sum of the promises"
SHOWN = "what the teacher is shown does not depend on the text that it scores"
RECORDED = "a text is recorded with its prompt, its writer and that one's log-probabilities"
MIDDLE, END, CUT_TEXTS = (
    f"{GRADIENT}, {where}" for where in ("middle of a run", "end of a run", "texts that the token limit cut")
)
PAID = "an answer that was cut is worth no more than any other"
SUPPORT, MEANT = "a support has the likeliest ids, as many as its `k` says", "weights are what they are defined to be"
ANEW = "texts are written anew, and alike in a group of any size"
SCHEDULED = "schedules have the value at every step that they are defined to"
STEPPED, ENDS = "an update takes one step on the whole batch", "an update ends with the weights that it is defined to"
pytestmark = pytest.mark.timeout(1800)  # some six minutes of one processor, which may be shared
SHIPPED = groups()["method"]
ALL_BROKEN = [f"conf={BROKEN}", "allow_targets=[broken.]"]
REASONS = {  # what must be among the failures: that for which the method is wrong
    "direct_k1": {GRADIENT, STALE, ZERO, TEACHER, TOWARDS},
    "areal_joint": {GRADIENT, STALE, ZERO, TEACHER, TOWARDS},
    "k3_as_reverse_kl": {GRADIENT, STALE},
    "raw_topk_reverse_kl": {ZERO},
    "ema_pg_as_published": {GRADIENT, STALE, ZERO},
    "per_microbatch_mean": {GRADIENT, STALE, CUT, RANKS, CHUNKS},
    "shifted_teacher": {GRADIENT, STALE, ZERO},
    "truncated_sampling": {GRADIENT, STALE},
    "returns_of_the_past": {GRADIENT, DEFINED, LAST, LATER},
    "short_returns": {LONG, DEFINED},
    "scale_ignored": {DEFINED},
    "own_reward": {GRADIENT, DEFINED, LAST, LATER},
    "negated_advantage": {GRADIENT, DEFINED, BETTER},
    "length_advantage": {GRADIENT, DEFINED, BETTER},
    "hidden_teacher": {GRADIENT, DEFINED, BETTER, "a promise without a teacher asks none"},
    "alphabetical": {GRADIENT, ORDER},
    "weight_on_the_draw": {GRADIENT, STALE},
    "every_token_mean": {DIVISOR},
    "k1_from_depth_64": {LONG, POSITION},
    "first_token_left_out": {GRADIENT, POSITION},
    "rounded_log_ratio": {FLOAT32, *SURE, f"{GRADIENT}, bfloat16"},
    "half_log_ratio": {FLOAT32, *SURE},
    "first_teacher_only": {SEVERAL, OTHERS},
    "first_matrix": {SEVERAL, MATRICES},
    "clamped_log_ratio": {FAR_TEACHER, f"{GRADIENT}, teacher farther away"},
    "no_cost_within": {f"{GRADIENT}, teacher nearly reached"},
    "no_cost_beyond": {f"{GRADIENT}, teacher farther away", SURE[0]},
    "certain_left_out": {f"{GRADIENT}, both nearly certain"},
    "clamped_ratio": {FAR_WRITER},
    "end_left_out": {GRADIENT},
    "batch_baseline": {CUT, PACKING, RANKS, IDLE, CHUNKS, OTHERS},
    "weight_twice": {GRADIENT, WEIGHT},
    "noisy": {AGAIN},
    "fading_away": {AGAIN},
    "cached_by_shape": {GRADIENT, TEACHER},
    "away": {TOWARDS},
    "against_credit": {"credit makes what was written likelier"},
    "nothing": {"the promise has a gradient"},
    "eight_ids": {IDS, WHOLE},
    "lost_tail": {f"{GRADIENT}, teacher farther away", SURE[0]},
    "swapped_clip": {SETTINGS},
    "students_context": {GRADIENT, ASKED},
    "short_context": {ASKED},
    "support_with_the_draw": {GRADIENT, "the support does not depend on the sampled token"},
    "temperature_ignored": {WRITTEN},
    "temperature_twice": {COLD, RECORDED},
    "last_token_masked": {"text is trained whole, as it was written"},
    "large_vocabulary": {"invariance: ids of probability 0", "invariance: ids under other numbers"},
    "while_reported": {"invariance: what is reported"},
    "ungated": {GRADIENT, "targets are what they are defined to be"},
    "late_distances": {"distances of near futures are what they are defined to be"},
    "drawn_from_teacher": {"draws follow the student (standard errors)"},
    "drawn_once": {"draws of a state are independent (standard errors)"},
    "one_draw_left_out": {"the loss is that of the draws"},
    "per_eight_texts": {"weights follow their text in any order, and again"},
    "zero_spread": {"weights are numbers in degenerate steps"},
    "context_counts": {"weights do not depend on what is masked"},
    "least_plausible": {MEANT},
    "late_weights": {"weights stand at the token that they are made of"},
    "early_threshold": {"weights stand at the token that they are made of", "weights do not depend on what is masked"},
    "not_put_back": {"weights stand at the token that they are made of"},
    "share_of_batch": {"readings are of their token alone"},
    "no_token": {"tokens are trained"},
    "writer_forgotten": {RECORDED},
    "wrong_texts_kept": {"texts are left out as the filter says"},
    "backwards": {"schedules begin at their first value and end at their last", SCHEDULED},
    "unblended": {WRITTEN},
    "lone_text": {"scores are numbers in degenerate groups"},
    "padded_mean": {"scores of a text do not depend on its group"},
    "context_rewarded": {DEFINED, "scores do not depend on log-probabilities of what was not sampled"},
    "cut_rewarded": {CUT_TEXTS, PAID},
    "from_the_second_step": {MIDDLE, END},
    "stepped_twice": {STEPPED, ENDS},
    "every_other": {"an update keeps nothing between steps", ENDS},
    "from_the_start": {ENDS},
    "pays_cut": {CUT_TEXTS, PAID},
    "mean_of_nothing": {"a text without tokens leaves the others a number"},
    "failing_sibling": {"what the teacher is shown of other texts is the one that is right"},
    "own_text_shown": {SHOWN},
    "next_draft": {"what the teacher is shown of a text does not depend on its group", ANEW},
    "first_sight": {f"{GRADIENT}, student a step later"},
    "writes_into_batch": {AGAIN},
    "first_ids": {"invariance: ids under other numbers"},
    "cached_by_number": {ORDER},
    "one_call_at_a_time": {ORDER},
    "end_written_over": {ORDER, "text is trained whole, as it was written"},
    "twelve_ids": {SUPPORT},
    "likeliest_lost": {SUPPORT},
    "half_recorded": {WHOLE, WRITTEN},
    "bounded_in_place": {RECORDED},
    "negative_coefficient": {"some term has a coefficient above 0 at every step, or none has any"},
    "late_labels": {"a target moves with its teacher at its own token"},
    "teachers_entropy": {"readings are what they are defined to be"},
    "not_its_own_length": {"a token counts in its step as the normalizer is defined"},
    "context_discounts": {DEFINED},
    "ends_early": {SCHEDULED},
    "one_coin": {"a coin falls as often as its fraction says (standard errors)"},
    "endless_answers": {"text is trained whole, as it was written"},
    "taken_back": {"updates bring the loss down"},
    "only_ten_steps": {ENDS},
    "inverted_shares": {MEANT},
    "skips_every": {MEANT},
    "every_tenth_step": {"scores, weights and losses are the same in other circumstances"},
    "replayed": {ANEW},
}
# Wrong in one corner alone: everything else must be found right.
ONLY = {name for name, reasons in REASONS.items() if not reasons & {GRADIENT, STALE, AGAIN, FAR_WRITER, FAR_TEACHER}}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command says of all shipped methods and all broken ones, as a user sees it: exit code and JSON."""
    said, folder = {}, tmp_path_factory.mktemp("certificates")
    for name, arguments in (("shipped", []), ("broken", ALL_BROKEN)):
        command = [sys.executable, "-m", "launch.cli", "certify", *arguments, f"output={folder / name}"]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
        )
        assert done.returncode == (name == "broken"), done.stdout + done.stderr
        said[name] = {c["method"]: c for c in json.loads((folder / name).read_text())}
    return said


def of_any_term(row: str) -> str:
    """Name of a row without that of the term whose row it is. Example: `main: gradient of the promise`."""
    return re.sub(r"^(?!invariance|limit)[a-z_]+: ", "", row)


def failures(certificate: dict[str, Any]) -> set[str]:
    return {row["property"] for row in certificate["properties"] if row["verdict"] == "fail"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_method_is_certified(name: str, certificates: dict[str, Any]) -> None:
    found = certificates["shipped"][name]
    assert found["passed"] and not failures(found)
    rows = {of_any_term(row["property"]) for row in found["properties"]}
    assert len(found["properties"]) >= 8 and GRADIENT in rows


def test_every_broken_method_is_listed() -> None:
    assert {path.stem for path in (BROKEN / "method").glob("*.yaml")} == set(REASONS)


@pytest.mark.parametrize("name", REASONS)
def test_a_planted_defect_is_refused_for_its_reason(name: str, certificates: dict[str, Any]) -> None:
    found = failures(certificates["broken"][name])
    assert found >= REASONS[name]
    assert found == REASONS[name] or name not in ONLY


def test_every_property_has_refused_something(certificates: dict[str, Any]) -> None:
    """A row that cannot fail says nothing. Limits that methods list themselves are theirs to break.

    What breaks a sum stands in `tests/unit/methods/test_terms.py`: it cannot be shown by a method alone.
    """
    every = {of_any_term(row["property"]) for found in certificates["shipped"].values() for row in found["properties"]}
    refused = {of_any_term(name) for found in certificates["broken"].values() for name in failures(found)}
    elsewhere = ("limit: ", "sum, invariance: ", "the sum has a part of ")
    assert {name for name in every - refused if not name.startswith(elsewhere)} == {SUM}


def test_every_refusal_says_where_to_look(certificates: dict[str, Any]) -> None:
    shipped = {row["property"] for found in certificates["shipped"].values() for row in found["properties"]}
    refused = {name for found in certificates["broken"].values() for name in failures(found)}
    for name in sorted(shipped | refused):
        row = Row(name=name, measured=1.0, tolerance=0.0)
        said = where_to_look(Certificate(method="m", promise="", rows=(row,), skipped={}))
        assert len(said[name]) >= 8 and not said[name].endswith(".")
    base = [Row(name=name, measured=1.0, tolerance=0.0) for name in (GRADIENT, STALE, LONG, ZERO)]
    for rows, plainest in ((base, GRADIENT), (base[1:], STALE), (base[2:], LONG)):
        found = where_to_look(Certificate(method="m", promise="", rows=tuple(rows), skipped={}))
        assert set(found) == {plainest, ZERO}


class Changed:
    """Objective whose loss is another one's, passed through a function."""

    def __init__(self, of: Any, change: Any) -> None:
        self.of, self.change = of, change
        self.consumes, self.on_policy, self.promise = of.consumes, True, of.promise

    def __call__(self, student: Any, batch: Any) -> TokenLoss:
        return TokenLoss(loss=self.change(self.of(student, batch).loss), metrics={})


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda loss: loss / 0.6931471805599453, "it is 1.443 times that of the promise"),
        (lambda loss: -loss, "it is -1 times that of the promise: the sign"),
        (lambda loss: 1.001 * loss, "it is off by 0.001 of its size"),
        (lambda loss: loss**3, ""),
    ],
)
def test_a_gradient_that_is_not_the_promised_one_is_described(change: Any, note: str) -> None:
    case = make_case(run_config(["method=sampled_reverse_kl"]).method, make_world(0))
    object.__setattr__(case.method, "objective", Changed(case.method.objective, change))
    found = how_it_departs(case)
    assert found.startswith(note) and bool(found) == bool(note)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("cached_by_number", "scores are others where a text has another number"),
        ("one_call_at_a_time", "scores are others where several groups are scored at once"),
        ("end_written_over", "it writes into the texts that it is given"),
    ],
)
def test_scores_that_are_not_a_texts_own_are_told_apart(name: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BROKEN.parents[1]))
    method = run_config([*ALL_BROKEN, f"method={name}", "prompts.group_size=2"]).method
    (row,) = check_score_order(make_case(method, make_world(0)))
    assert isinstance(row, Row) and not row.passed and row.note.startswith(note)


def test_a_number_that_is_not_finite_never_passes() -> None:
    for bound in Bound:
        assert not Row(name="x", measured=float("nan"), tolerance=1.0, bound=bound).passed
    assert not Row(name="x", measured=float("inf"), tolerance=1.0, bound=Bound.AT_LEAST).passed
    assert Row(name="x", measured=1.0, tolerance=1.0).passed and not Row(name="x", measured=2.0, tolerance=1.0).passed
    assert not Certificate(method="m", promise="", rows=(), skipped={}).passed


def test_the_command_prints_a_table_writes_json_and_exits_non_zero_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BROKEN.parents[1]))
    console = Console(record=True, width=120)
    assert certify_methods(["method=sft"], "", console) == 0
    assert certify_methods([*ALL_BROKEN, "method=direct_k1"], str(tmp_path / "c.json"), console) == 1
    shown = console.export_text()
    assert "the teacher matters: the gradient ignores what the teacher says." in " ".join(shown.split())
    assert "sft: certified" in shown and "direct_k1: REFUSED" in shown and "FAIL" in shown
    (said,) = json.loads((tmp_path / "c.json").read_text())
    verdicts = {row["property"]: row["verdict"] for row in said["properties"]}
    assert said["method"] == "direct_k1" and not said["passed"] and verdicts[TEACHER] == "fail"
    with pytest.raises(ConfigurationError, match=r"output=.* lies in a folder that does not exist; name"):
        certify_methods(["method=sft"], str(tmp_path / "no" / "c.json"), console)
    with pytest.raises(ConfigurationError, match=r"method=sft,grpo names several"):
        certify_methods(["method=sft,grpo"], "", console)


def test_an_objective_that_forgets_who_sampled_fails_where_text_is_stale() -> None:
    method = run_config(["method=squared_reverse_kl"]).method

    @dataclass(frozen=True)
    class WithoutRatio(type(method.objective)):
        def __call__(self, student: Any, batch: Any) -> TokenLoss:
            logprobs = student.at(batch.target_ids)
            return TokenLoss(loss=0.5 * (logprobs - batch.scores.logprobs).square(), metrics={})

    found = certify(replace(method, objective=WithoutRatio())).failures
    assert STALE in found and GRADIENT not in found


def test_an_objective_without_a_promise_is_not_certified() -> None:
    method = run_config(["method=sampled_reverse_kl"]).method

    class Silent:
        consumes = method.objective.consumes
        on_policy = False

        def __call__(self, student: object, batch: object) -> TokenLoss:
            raise NotImplementedError

    object.__setattr__(method, "objective", Silent())
    found = certify(method)
    assert not found.passed and found.failures == ["a promise is declared"]


def test_the_command_needs_neither_ray_nor_vllm_nor_deepspeed() -> None:
    code = (
        "import sys; from launch.cli.main import main\n"
        "try: main(['certify', 'method=sft'])\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
