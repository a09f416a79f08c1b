"""What may be combined is combined, what is meaningless is refused in a sentence, no testimony is believed unread."""

import asyncio
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

import opd.objectives
import opd.rollouts
import opd.scorers
import opd.token_weights
from opd.errors import ConfigurationError, DataError
from opd.method.method import Method, check_prompts, weigh
from opd.objectives.sampled import ClippedPolicyGradient, Likelihood, SampledReverseKL
from opd.objectives.support import Outside
from opd.objectives.topk import HeadTailDivergence, TopKDivergence
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.ports import AtIds, Context, LastHidden, SampledToken, Sampling, ScoreAnswer, ScoreKind, ScoreRequest, TopK
from opd.rollouts.mixed import Mixed
from opd.rollouts.student import StudentRollout, TeacherRollout
from opd.scorers.reward import GroupAdvantage
from opd.scorers.teacher import SampledTokens, StudentTopK, TeacherHidden, TeacherTopK, Unscored
from opd.scorers.validation import validate_scores
from opd.token_weights.length import SkipTruncated
from opd.types import (
    AdvantageScores,
    HiddenScores,
    RemoteRows,
    Scored,
    Scores,
    StopReason,
    TokenScores,
    TopKScores,
    VocabularyScores,
)

HEAD_TAIL = HeadTailDivergence(of=FullReverseKL())
ANYWHERE = (Likelihood(),)
ON_TOKENS = (*ANYWHERE, SampledReverseKL())
ON_SUPPORT = (*ON_TOKENS, HEAD_TAIL, *(TopKDivergence(of=FullReverseKL(), outside=outside) for outside in Outside))
MEANINGFUL: dict[Any, tuple[Any, ...]] = {
    SampledTokens(): ON_TOKENS,
    TeacherTopK(k=4): ON_SUPPORT,
    StudentTopK(): ON_SUPPORT,
    TeacherHidden(): (*ON_TOKENS, FullReverseKL(), FullForwardKL(), JensenShannon()),
    GroupAdvantage(): (*ANYWHERE, ClippedPolicyGradient()),
    Unscored(): ANYWHERE,
}
OBJECTIVES = sorted(set().union(*MEANINGFUL.values()), key=str)
RECORDING = StudentRollout(max_tokens=8, record_topk=4)


ON_OWN_TEXT = {  # estimates over sampled tokens; all others are sums over the vocabulary, or likelihoods
    "SquaredReverseKL", "RatioReverseKL", "SampledDivergence", "MiniLLM", "SampledReverseKL", "ClippedPolicyGradient",
    "EntropyAwareKL", "HeadTailDivergence", "TruncatedRatio", "ImportanceWeighted", "CreditedReverseKL",
    "ShapedReverseKL", "FixedAdvantage", "CalibratedReverseKL",
    "DeltaReverseKL",
}  # fmt: skip
FACTS: dict[str, dict[str, object]] = {
    "AnswerRollout": {"on_policy": False, "truncated": True, "needs_engines": ()},
    "StudentRollout": {"on_policy": True, "needs_engines": ("student",)},
    "TeacherRollout": {"on_policy": False, "needs_engines": ("writing teacher",)},
    "BlendedRollout": {"on_policy": True, "truncated": False},
    "GoodTexts": {"on_policy": False},
    "OpenPrompts": {"on_policy": False},
    "EnvironmentRollout": {"on_policy": True, "needs_engines": ("environment", "student")},
    "GroupAdvantage": {"min_group": 2, "needs_engines": ("grader",)},
    "OutcomeCredit": {"min_group": 2, "needs_engines": ("grader", "reading teacher")},
    "SkipTruncated": {"reads_sampled_tokens": True},
    "SkipFirst": {"reads_sampled_tokens": True},
    "SkipBeginning": {"reads_sampled_tokens": False},
    "PromptWeight": {"reads_sampled_tokens": False},
    **{name: {"min_group": 1} for name in (
        "Ensemble", "WithReturns", "SampledTokens", "TeacherTopK", "StudentTopK", "TeacherHidden", "Unscored"
    )},
}  # fmt: skip


def test_what_parts_say_of_themselves_is_true() -> None:
    """What may be combined is decided by these alone, so each is written down twice."""
    found: dict[str, dict[str, object]] = {}
    for package in (opd.objectives, opd.rollouts, opd.scorers, opd.token_weights):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, part in vars(importlib.import_module(module.name)).items():
                if is_dataclass(part) and isinstance(part, type) and part.__module__ == module.name and name[0] != "_":
                    facts = {n: getattr(part, n, None) for n in FLAGS}
                    found[name] = {n: fact for n, fact in facts.items() if isinstance(fact, bool | int)}
                    if isinstance(declared := getattr(part, "needs_engines", None), frozenset):
                        found[name]["needs_engines"] = tuple(sorted(map(str, declared)))
                    if package is opd.objectives and hasattr(part, "consumes"):
                        assert found[name] == {"on_policy": name in ON_OWN_TEXT}, name
    assert {name: found[name] for name in FACTS} == FACTS


FLAGS = ("on_policy", "truncated", "min_group", "reads_sampled_tokens")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("scorer", MEANINGFUL, ids=lambda part: type(part).__name__)
def test_an_objective_takes_the_scores_it_needs_and_no_other(scorer: Any, objective: Any) -> None:
    if objective in MEANINGFUL[scorer]:
        assert Method(name="m", rollout=RECORDING, scorer=scorer, objective=objective).normalizer is not None
        return
    needs, produced = objective.consumes.__name__, scorer.produces.__name__
    sentence = (
        f"objective {type(objective).__name__} needs {needs}, but scorer {type(scorer).__name__} produces {produced}; "
    )
    with pytest.raises(ConfigurationError, match=sentence + "choose a scorer that produces it or another objective"):
        Method(name="m", rollout=RECORDING, scorer=scorer, objective=objective)


@pytest.mark.parametrize("rollout", [StudentRollout(max_tokens=8), TeacherRollout(max_tokens=8)], ids=str)
def test_the_students_topk_must_have_been_recorded(rollout: Any) -> None:
    sentence = (
        f"scorer StudentTopK needs TopKScores of the behavior policy, but rollout {type(rollout).__name__} records "
    )
    with pytest.raises(ConfigurationError, match=sentence + "TokenScores; set rollout.record_topk"):
        Method(name="m", rollout=rollout, scorer=StudentTopK(), objective=HEAD_TAIL)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_estimate_over_the_students_own_tokens_is_refused_on_somebody_elses_text(objective: Any) -> None:
    (scorer, *_) = (s for s, meaningful in MEANINGFUL.items() if objective in meaningful)
    if isinstance(scorer, StudentTopK):
        scorer = TeacherTopK(k=4)
    parts: Any = {"name": "m", "scorer": scorer, "objective": objective}
    assert objective.on_policy == (objective in (SampledReverseKL(), HEAD_TAIL, ClippedPolicyGradient()))
    if not objective.on_policy:
        assert Method(**parts, rollout=TeacherRollout(max_tokens=8))
        return
    name = type(objective).__name__
    sentence = f"objective {name} estimates from tokens that the student sampled, but rollout Teacher.*; choose"
    with pytest.raises(ConfigurationError, match=sentence):
        Method(**parts, rollout=TeacherRollout(max_tokens=8))


CUT = {"top-p": {"top_p": 0.9}, "greedy": {"temperature": 0.0}}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_estimate_from_the_written_token_is_refused_where_tokens_cannot_be_written(objective: Any, cut: str) -> None:
    (scorer, *_) = (s for s, meaningful in MEANINGFUL.items() if objective in meaningful)
    rollout = StudentRollout(max_tokens=8, **CUT[cut])
    parts: Any = {"name": "m", "scorer": scorer, "objective": objective}
    if objective not in (SampledReverseKL(), HEAD_TAIL):
        assert Method(**parts, rollout=rollout)
        return
    sentence = (
        rf"objective {type(objective).__name__} .*every token to have a chance .*StudentRollout has top_p < 1.*; set"
    )
    for writer in (rollout, Mixed(student=rollout, fixed=TeacherRollout(max_tokens=8), fraction=1.0)):
        with pytest.raises(ConfigurationError, match=sentence.replace("StudentRollout", type(writer).__name__)):
            Method(**parts, rollout=writer)


@pytest.mark.parametrize("top_p", [0.95, 0.1])
def test_the_students_topk_is_not_recorded_from_a_nucleus(top_p: float) -> None:
    """Beyond it all ids have -inf, and which of them an engine names is chance."""
    with pytest.raises(
        ConfigurationError, match=rf"needs top_p=1 to record the student's top 4, but got {top_p}.*; set"
    ):
        StudentRollout(max_tokens=8, record_topk=4, top_p=top_p)


@dataclass(frozen=True)
class Reading:
    """A weight that reads testimony of type `consumes`; gives `factor` to every token."""

    consumes: type[Scores]
    factor: float = 1.0

    def __call__(self, scored: Sequence[Scored[Any]], context: Any) -> list[np.ndarray]:
        return [np.full(len(s.trajectory), self.factor) for s in scored]


@pytest.mark.parametrize("needs", [TopKScores, VocabularyScores, AdvantageScores])
def test_a_weight_reads_what_travels_and_nothing_else(needs: type[Scores]) -> None:
    """Hidden states become a vocabulary in the learner only: no weight can have read it before."""
    parts: Any = {"name": "m", "rollout": RECORDING, "scorer": TeacherHidden(), "objective": FullReverseKL()}
    sentence = f"weight 'mine' Reading needs {needs.__name__}, but scorer TeacherHidden produces HiddenScores; "
    with pytest.raises(
        ConfigurationError, match=sentence + "choose a scorer that produces it or another weight 'mine'"
    ):
        Method(**parts, weights={"mine": Reading(needs)})
    assert Method(**parts, weights={"mine": Reading(TokenScores), "whole": SkipTruncated()})


class Grouped:
    """A source of prompts of which only the size of its groups is asked."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def __call__(self, step: int, sources: Any) -> list[Any]:
        raise NotImplementedError


def test_a_group_of_one_cannot_be_compared() -> None:
    grpo = Method(name="g", rollout=RECORDING, scorer=GroupAdvantage(), objective=ClippedPolicyGradient())
    with pytest.raises(ConfigurationError, match=r"GroupAdvantage compares .*group_size >= 2, but got 1; raise"):
        check_prompts(grpo, Grouped(1))
    check_prompts(grpo, Grouped(2))
    check_prompts(Method(name="s", rollout=RECORDING, scorer=Unscored(), objective=Likelihood()), Grouped(1))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_jsd_refuses_the_ends_of_beta(beta: float) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"JensenShannon\.beta needs a number from 1e-06 to .*, got .*beta=0\.5$",
    ):
        JensenShannon(beta=beta)


@pytest.mark.parametrize("bounds", [(0.0, 0.2), (1.1, 0.2), (0.2, 0.0), (-0.1, 0.2)])
def test_clipping_refuses_bounds_that_clip_nothing_or_everything(bounds: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"ClippedPolicyGradient\.clip_(low|high) needs"):
        ClippedPolicyGradient(clip_low=bounds[0], clip_high=bounds[1])


def test_a_topk_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"TeacherTopK\.k needs a whole number from 1 to \d+, got 0; set"):
        TeacherTopK(k=0)


GOOD_SAMPLING: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "topk": 0}


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"topk": -1}]
)
def test_sampling_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    assert Sampling(**GOOD_SAMPLING)
    with pytest.raises(ConfigurationError, match=r"Sampling\.\w+ needs"):
        Sampling(**(GOOD_SAMPLING | wrong))


def test_weights_multiply_each_other_and_the_loss_mask(make: Any) -> None:
    step = [
        make.scored([1], [2, 3], loss_mask=np.array([True, False])),
        make.scored([1], [2, 3, 4], stop=StopReason.LENGTH),
        make.scored([1], [2]),
    ]
    weights = {"half": Reading(Scores, 0.5), "triple": Reading(Scores, 3.0), "whole": SkipTruncated()}
    assert [w.tolist() for w in weigh(weights, step, engines())] == [[1.5, 0.0], [0.0, 0.0, 0.0], [1.5]]
    assert [w.tolist() for w in weigh({}, step, engines())] == [[1, 0], [1, 1, 1], [1]]


@pytest.mark.parametrize("lengths", [[1, 3], [2, 1], [2, 4], [2]], ids=str)
def test_a_weight_part_that_miscounts_is_named(make: Any, lengths: list[int]) -> None:
    class Wrong(Reading):
        def __call__(self, scored: Sequence[Scored[Any]], context: Any) -> list[np.ndarray]:
            return [np.ones(n) for n in lengths]

    with pytest.raises(DataError, match=r"weight 'mine' Wrong must give one number per token, \[2, 3\] for"):
        weigh({"mine": Wrong(Scores)}, [make.scored([1], [2, 3]), make.scored([1], [2, 3, 4])], engines())


class Teacher:
    """Remembers what it was asked and answers it rightly."""

    def __init__(self) -> None:
        self.asked: list[ScoreRequest] = []

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        self.asked += requests
        return [tuple(answer(kind, len(r.token_ids)) for kind in r.kinds) for r in requests]


class Grader:
    """Right is what equals the answer."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(a == b) for a, b in zip(completions, answers, strict=True)]

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, ids))


class Silent:
    """A student that is never asked to write."""

    generate = receive = Teacher.score


def engines(teacher: Any = None) -> Context:
    return Context(
        student=Silent(),
        teachers={"default": teacher or Teacher()},
        writers={},
        graders={"sum": Grader(), "other": Grader()},
        tokenizer=Grader(),
    )


def floats(*shape: int) -> np.ndarray:
    return np.full(shape, -2.0, dtype=np.float32)


def answer(kind: ScoreKind, n: int) -> TokenScores:
    match kind:
        case LastHidden():
            return HiddenScores(logprobs=floats(n), hidden=RemoteRows(pieces=(("h", np.arange(n)),)))
        case TopK(k=k):
            ids = np.tile(np.arange(k, dtype=np.int32), (n, 1))
            return TopKScores(logprobs=floats(n), topk_ids=ids, topk_logprobs=floats(n, k))
        case AtIds(ids=ids):
            return TopKScores(logprobs=floats(n), topk_ids=ids, topk_logprobs=floats(*ids.shape))
    return TokenScores(logprobs=floats(n))


def test_teachers_read_their_own_context_and_answer_what_was_wanted(make: Any) -> None:
    prompt = replace(make.prompt([1]), teacher_ids=np.array([7, 8, 9], dtype=np.int32))
    ids = np.array([[5, 6], [6, 2]], dtype=np.int32)
    behavior = TopKScores(logprobs=floats(2), topk_ids=ids, topk_logprobs=floats(2, 2))
    written = make.trajectory([1], [3, 4], prompt=prompt, behavior=behavior)
    wants = {SampledTokens(): SampledToken, TeacherTopK(k=3): TopK, StudentTopK(): AtIds, TeacherHidden(): LastHidden}
    for scorer, kind in wants.items():
        teacher = Teacher()
        (said,) = asyncio.run(scorer([written], engines(teacher)))
        assert type(said) is scorer.produces
        assert [type(one) for one in teacher.asked[0].kinds] == [kind]
        assert scorer.requires == {kind}
        assert teacher.asked[0].context_ids.tolist() == [7, 8, 9]
        assert teacher.asked[0].token_ids.tolist() == [3, 4]
    assert asyncio.run(Unscored()([written], engines())) == [Scores()]
    assert Unscored().requires == GroupAdvantage().requires == frozenset()
    stranger = make.trajectory([1], [2], prompt=make.prompt([1], teacher="nobody"))
    with pytest.raises(ConfigurationError, match=r"asks for teacher 'nobody', but the run has \['default'\]; name one"):
        asyncio.run(SampledTokens()([stranger], engines()))


def test_advantages_are_relative_to_the_group(make: Any) -> None:
    """Rewards 1, 0, 0 (cut by the limit), 1 in two tasks: mean 1/2, standard deviation (n - 1) sqrt(1/3)."""
    group = [
        make.trajectory([1], [4, 2], prompt=make.prompt([1], task="sum", answer="4 2")),
        make.trajectory([1], [9], prompt=make.prompt([1], task="sum", answer="4 2")),
        make.trajectory([1], [8], prompt=make.prompt([1], task="sum", answer="8"), stop=StopReason.LENGTH),
        make.trajectory([1], [7], prompt=make.prompt([1], task="other", answer="7")),
    ]
    said = asyncio.run(GroupAdvantage()(group, engines()))
    expected = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    for scores, reward, length in zip(said, [1, 0, 0, 1], [2, 1, 1, 1], strict=True):
        assert scores.rewards.tolist() == [reward] * length
        np.testing.assert_allclose(scores.advantages, [expected * (2 * reward - 1)] * length, rtol=1e-6)
    plain = asyncio.run(GroupAdvantage(scale_by_std=False)(group, engines()))
    assert [s.advantages[0] for s in plain] == [0.5, -0.5, -0.5, 0.5]
    equal = asyncio.run(GroupAdvantage()(group[:1] * 3, engines()))
    assert not any(s.advantages.any() for s in equal)


IDS = np.array([[1, 2], [3, 4]], dtype=np.int32)
WANTS: dict[str, ScoreKind] = {
    "written": SampledToken(),
    "top": TopK(k=2),
    "at": AtIds(ids=IDS),
    "hidden": LastHidden(),
}


@pytest.mark.parametrize("kind", WANTS.values(), ids=WANTS)
def test_true_testimony_is_believed(kind: ScoreKind) -> None:
    request = ScoreRequest(context_ids=IDS[0], token_ids=IDS[0], kinds=(kind,))
    said = answer(kind, 2)
    validate_scores([request, request], [(said,), (said,)])
    if not isinstance(said, TopKScores):  # which would have to agree
        rounded = replace(said, logprobs=np.array([5e-4, -80.0], dtype=np.float32))
        validate_scores([request], [(rounded,)])


def spoiled(value: float) -> np.ndarray:
    return np.array([[-1, -2], [-1, value]], dtype=np.float32)


LIES: dict[str, tuple[str, Any, str]] = {
    "NaN": ("written", {"logprobs": spoiled(np.nan)[1]}, "logprobs contains NaN"),
    "positive": ("written", {"logprobs": spoiled(0.1)[1]}, "a value above 0"),
    "minus infinity": ("written", {"logprobs": spoiled(-np.inf)[1]}, "an infinity"),
    "too long": ("written", {"logprobs": floats(3)}, "expected 2 rows of logprobs, got 3"),
    "nothing": ("written", Scores(), "asked for log-probabilities of sampled tokens, got Scores"),
    "advantages": ("written", AdvantageScores(advantages=floats(2), rewards=floats(2)), "got AdvantageScores"),
    "no support": ("top", TokenScores(logprobs=floats(2)), "asked for the teacher's own top-k, got TokenScores"),
    "k": ("top", answer(TopK(k=3), 2), "asked for k=2, got k=3"),
    "NaN in the support": ("top", {"topk_logprobs": spoiled(np.nan)}, "topk_logprobs contains NaN"),
    "positive in the support": ("at", {"topk_logprobs": spoiled(0.1)}, "a value above 0"),
    "other ids": ("at", {"topk_ids": IDS[::-1].copy()}, "about other token ids than were asked"),
    "another number in the support": ("top", {"logprobs": np.array([-2.1, -2], np.float32)}, "shifted rows"),
    "likelier than the support": ("top", {"logprobs": np.array([-2, -1], np.float32)}, "likelier than the top-k"),
    "a token twice": ("top", {"topk_ids": np.array([[5, 5], [6, 7]], np.int32)}, "names a token twice"),
    "too much mass": ("top", {"topk_logprobs": np.array([[-0.1, -2], [-0.1, -0.1]], np.float32)}, "sum to more than 1"),
    "shorter support": ("top", answer(TopK(k=2), 1), "expected 2 rows"),
    "no states": (
        "hidden",
        TokenScores(logprobs=floats(2)),
        r"\(last hidden states\), got TokenScores",
    ),
    "states by value": ("hidden", {"hidden": floats(2, 4)}, "by reference, got ndarray in HiddenScores"),
    "too many states": ("hidden", {"hidden": RemoteRows(pieces=(("h", IDS.ravel()),))}, "2 rows of hidden, got 4"),
    "NaN beside states": ("hidden", {"logprobs": spoiled(np.nan)[1]}, "logprobs contains NaN"),
}


@pytest.mark.parametrize("name", LIES)
def test_false_testimony_is_refused(name: str) -> None:
    kind, lie, problem = LIES[name]
    request = ScoreRequest(context_ids=IDS[0], token_ids=IDS[0], kinds=(WANTS[kind],))
    true = answer(WANTS[kind], 2)
    said = replace(true, **lie) if isinstance(lie, dict) else lie
    with pytest.raises(DataError, match=f"teacher scores are refused: .*{problem}.*check the teacher's"):
        validate_scores([request, request], [(true,), (said,)])


@pytest.mark.parametrize("count", [0, 2])
def test_a_missing_or_extra_answer_is_refused(count: int) -> None:
    request = ScoreRequest(context_ids=IDS[0], token_ids=IDS[0], kinds=(SampledToken(),))
    with pytest.raises(DataError, match=f"teacher answered {count} of 1 requests"):
        validate_scores([request], [(answer(SampledToken(), 2),)] * count)
