"""Every field of every part changes something, or another value is refused: fields and values come from the classes.

A part is found because it is a dataclass in one of the packages, a value because its annotation allows it. What changes
is what the part is there for: what an engine is asked, what is said about a text, what a token weighs, its gradient.
With every such value an objective must also keep the promise that it then gives.
"""

import asyncio
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, ClassVar
from zlib import crc32

import numpy as np
import pytest

import opd.objectives
import opd.rollouts
import opd.scorers
import opd.token_weights
import opd.updates
from opd.certify.engines import IdTokenizer, RequestLog, engines
from opd.certify.gradients import draws
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError
from opd.loss import packing
from opd.loss.chunked import StudentLogits
from opd.loss.packing import pack
from opd.loss.readings import StudentEntropy, TeacherEntropy
from opd.method import promises
from opd.method.method import readings_of
from opd.method.shapes import Clip, Floor, ProximalTeacher, SignLog
from opd.objectives.sampled import ClippedPolicyGradient, LogprobSource, SampledReverseKL
from opd.objectives.topk import TopKDivergence
from opd.objectives.truncated import TruncatedRatio
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.ports import Completion, Context, GenerateRequest, Layout, Outcome
from opd.rollouts.contexts import PromptAlone
from opd.rollouts.student import StudentRollout, TeacherRollout
from opd.scorers.ensemble import ContextIds
from opd.scorers.near_future import RecordedReverseKL, SampledLogRatio
from opd.scorers.teacher import SampledTokens, TeacherHidden
from opd.scorers.transport import Assignment, EmbeddingCosine, Sinkhorn, TokenIdentity
from opd.settings.ranges import AtMost, In, Matches
from opd.settings.validation import default_of, fields_of, parts_of
from opd.token_weights.length import SkipTruncated
from opd.token_weights.selection import ByReading, Teachability, TopFraction
from opd.token_weights.special_tokens import look_up
from opd.types import FutureScores, Scored, Scores, StopReason, TokenScores, Trajectory
from tests.unit.methods.test_objectives import World, every_token, expected_gradient, gradient, promised, said, world

TEACHERS = ("default", "second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Builder that has nothing to show."""

    needs_engines: ClassVar[frozenset[Any]] = frozenset()
    min_group: ClassVar[int] = 1

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[np.ndarray | None]":
        return [None for _ in trajectories]


VOCABULARY = 40
# What stands in a slot that has no values of its own.
PARTS: Mapping[str, Sequence[Any]] = {
    "Direction": (FullReverseKL(), FullForwardKL(), JensenShannon(beta=0.3)),
    "Support": (promises.Union(k=2), promises.TeacherTop(k=3), promises.StudentTop(k=2)),
    "Objective": (SampledReverseKL(signal=LogprobSource.STUDENT), ClippedPolicyGradient()),
    "Rollout": (TeacherRollout(max_tokens=8), StudentRollout(max_tokens=8)),
    "opd.method.slots.Rollout | None": (TeacherRollout(max_tokens=8),),
    "StudentRollout": (StudentRollout(max_tokens=8), StudentRollout(max_tokens=5)),
    "Scorer": (TeacherHidden(), SampledTokens()),
    "Shape": (Clip(limit=0.5), SignLog(), ProximalTeacher(alpha=0.4), Floor(mixture=0.4)),
    "TokenScore": (ByReading(reading=StudentEntropy()), Teachability()),
    "Reading": (StudentEntropy(), TeacherEntropy()),
    "TeacherContext": (PromptAlone(), Hidden()),
    "TokenLoss": (SampledLogRatio(), RecordedReverseKL()),
    "GroundCost": (EmbeddingCosine(), TokenIdentity()),
    "Transport": (Assignment(), Sinkhorn()),
}
FILLED: Mapping[str, Sequence[Any]] = {
    "solution": ("{prompt} {completion}", "{completion}"),
    "template": ("{prompt} {completion}", "{completion}"),
    "feedback": ("{prompt} {feedback}", "{feedback}"),
    "shares": ({"default": 1.0, "second": 2.0}, {"default": 3.0, "second": 2.0}),
    "contexts": ({"second": ContextIds.STUDENT},),
    "filters": ({}, {"whole": SkipTruncated()}),
    "token_ids": ((), (3,), (4, 5)),
    "tokens": ((), ("c",)),
    "share": (0.75, 1.0),
    "teacher_power": (0.4, 1.0),
    "student_power": (0.6, 0.0),
    "room": (1000, 15, 12),
    "budget": (0.0, 0.02, 3.0),
    "base": ("second", "default"),
    "judge": ("second", "default"),
    "before": ("{prompt} 3", "{answer} 5"),
    "after": ("7", "8 {answer}"),
    "yes": ("4", "5"),
    "no": ("6",),
    "probes": ({"right": "{prompt} 3"}, {"right": "{prompt} 3", "answer": "{answer}"}),
    "parameters": ("mlp", "attn"),
    "metric": ("loss", "reverse_kl"),
}


ROOMY: Mapping[str, Mapping[str, Any]] = {
    "EnvironmentRollout": {"max_tokens": 30},  # for several turns
    "GoodTexts": {"of": TeacherRollout(max_tokens=50), "cut": True},  # whose texts are long, repetitive and cut
    "OpenPrompts": {"of": TeacherRollout(max_tokens=50), "solved_at_most": 1.0},  # whose texts are right
    "PrefixRollout": {"share": 0.5},  # of which limits differ
    "Draft": {"room": 1000, "free": 10},
    "AtTemperature": {"of": FullReverseKL()},  # no estimate
    "ImportanceWeighted": {"of": TopKDivergence(of=FullReverseKL())},
    "JudgeAdvantage": {"judge": "second"},
    "TeacherDelta": {"base": "second"},  # there is none of the default name
    "NearFuture": {"fraction": 0.6, "temperature": 8.0, "transport": Sinkhorn()},  # of which labels are soft
    "FutureDistances": {"fraction": 0.6, "temperature": 8.0, "transport": Sinkhorn()},
    "TopFraction": {"fraction": 0.4},  # of which selections differ
}


def classes() -> list[type]:
    """Every part that can stand in a method."""
    found = set()
    for package in (opd.objectives, opd.rollouts, opd.scorers, opd.updates, opd.token_weights):
        names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
        for module in map(importlib.import_module, names):
            for part in vars(module).values():
                if isinstance(part, type) and is_dataclass(part) and part.__module__ == module.__name__:
                    found.add(part)
    found |= {
        p
        for p in vars(packing).values()
        if isinstance(p, type) and is_dataclass(p) and p.__module__ == "opd.loss.packing"
    }
    return sorted((p for p in found if "__call__" in dir(p) and p.__name__[0] != "_"), key=lambda p: p.__name__)


def values(cls: type, name: str) -> list[Any]:
    """Values that a field may have, its default first."""
    (spec,) = [f for f in fields(cls) if f.name == name]
    base, marks = parts_of(fields_of(cls)[name])
    start = [] if default_of(spec) is MISSING else [default_of(spec)]
    kind = getattr(base, "__name__", str(base))
    if name in FILLED:
        return [*start, *FILLED[name]]
    if base is bool:
        return [*start, True, False]
    if isinstance(base, type) and issubclass(base, Enum):
        return [*start, *base]
    for mark in marks:
        if isinstance(mark, In):
            most = VOCABULARY if any(isinstance(m, AtMost) for m in marks) else mark.high
            return [*start, *(n for n in _numbers(base, mark, start) if n <= most)]
    if any(isinstance(mark, Matches) and mark.allows(TEACHERS[1]) for mark in marks):
        return [*start, TEACHERS[1]]  # a name
    if kind in PARTS:
        return [*start, *PARTS[kind]]
    raise AssertionError(f"say in this file what {cls.__name__}.{name} of type {base} may be")


def _numbers(base: type, mark: In, start: list[Any]) -> Iterator[Any]:
    """Numbers in the range: near the default, small ones, and both ends."""
    near = [start[0] * 2, start[0] * 0.5, start[0] + 1] if start and start[0] != MISSING else []
    for number in (*near, 2, 3, 0.25, 0.7, mark.low, mark.high):
        if mark.allows(base(number)) and (base is float or number == int(number)):
            yield base(number)


def example(cls: type) -> Any:
    """The part with its defaults, and where there is none with the first value that is allowed."""
    given = {f.name: values(cls, f.name)[0] for f in fields(cls) if default_of(f) is MISSING and f.init}
    return cls(**(given | ROOMY.get(cls.__name__, {})))


CASES = [(cls, f.name) for cls in classes() for f in fields(cls)]


def test_the_walk_finds_the_parts_and_fields_there_are() -> None:
    names = {f"{cls.__name__}.{name}" for cls, name in CASES}
    assert len(names) >= 40
    for known in ("WithReturns.reward_scale", "ClippedPolicyGradient.clip_low", "StudentRollout.top_p", "Mixed.seed"):
        assert known in names
    assert {"TeacherBalance.shares", "Constant.divisor", "Ensemble.reader", "TopKDivergence.outside"} <= names


@pytest.mark.parametrize(("cls", "name"), CASES, ids=[f"{c.__name__}.{n}" for c, n in CASES])
def test_another_value_changes_what_the_part_does_or_is_refused(cls: type, name: str) -> None:
    part = example(cls)
    before, changed, refused, other = seen(part), 0, 0, getattr(part, name)
    for value in values(cls, name):
        if value == other:
            continue
        try:
            now = replace(part, **{name: value})
            after = seen(now)
        except ConfigurationError:
            refused += 1
            continue
        changed += after != before
        if hasattr(now, "promise") and not draws(now) and not isinstance(now, TruncatedRatio):  # the last is biased
            keeps_its_promise(now)
    assert changed or refused, f"{cls.__name__}.{name} can be anything: nothing changes"


# What a part does, as something that can be compared.


def seen(part: Any) -> Any:
    """What the part is there for, in numbers."""
    package = type(part).__module__.split(".")[1]
    if type(part).__module__ == "opd.rollouts.contexts":
        return told(part)
    return {
        "rollouts": written,
        "scorers": scores,
        "token_weights": weighed,
        "loss": divided,
        "objectives": slopes,
        "updates": repr,
    }[package](part)


@dataclass
class Recorder:
    """Writes as much of a fixed text as it may, and notes what it was asked."""

    name: str
    asked: list[Any]

    async def receive(self, weights: Any) -> Any:
        raise NotImplementedError

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.asked += [(self.name, r.prompt_id, r.sampling, r.blend, r.context_ids.tolist()) for r in requests]
        n = [50 if r.sampling.max_tokens == 50 else min(3, r.sampling.max_tokens) for r in requests]
        zeros = [np.zeros(i, dtype=np.float32) for i in n]
        return [
            Completion(
                token_ids=np.arange(len(z), dtype=np.int32) % 10,
                behavior=TokenScores(logprobs=z),
                versions=z.astype(np.int32),
                stop=StopReason.LENGTH if len(z) == r.sampling.max_tokens else StopReason.END,
            )
            for z, r in zip(zeros, requests, strict=True)
        ]


class LongIsRight:
    """A grader that takes long texts for right, also those that are cut."""

    judges_cut = True

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(len(c.split()) > 9) for c in completions]


class Endless:
    """An environment that never ends an episode and says one token."""

    async def reset(self, prompt: Any) -> str:
        return ""

    async def step(self, action: str) -> Outcome:
        return Outcome(reward=0.0, done=False, text="7")


def _prompts(make_id: str = "p") -> list[Any]:
    whole = make_world(0, 9).prompts
    return [replace(whole[0], id=f"{make_id}/{i}", answer="4 5 3 2 1 2 3 4 5 6") for i in range(12)]


def written(rollout: Any) -> Any:
    asked: list[Any] = []
    teachers = {name: Recorder(name=name, asked=asked) for name in TEACHERS}
    box = Context(
        student=Recorder(name="student", asked=asked),  # type: ignore[arg-type]
        teachers={},
        writers=teachers,
        graders={"": LongIsRight()},
        tokenizer=IdTokenizer(),
        environments={"": Endless},
    )
    texts = [t for p in _prompts() for t in asyncio.run(rollout([p], box))]
    return asked, [(t.token_ids.tolist(), t.stop, t.versions.tolist(), t.loss_mask.any()) for t in texts]


def told(builder: Any) -> Any:
    """What a teacher is shown for texts of three groups: two with successes, and one that heard something."""
    box, texts = _group()
    heard = [replace(t, reward=0.0, loss_mask=np.arange(len(t)) < 1) for t in texts]
    groups = (texts, texts[2:], heard)  # the first of the second was worse than the third
    return [[ids if ids is None else ids.tolist() for ids in asyncio.run(builder(g, box))] for g in groups]


@cache
def _group() -> tuple[Any, list[Trajectory]]:
    """A small world with two teachers, and the texts of its first prompt."""
    here, notes = make_world(0, VOCABULARY, TEACHERS), RequestLog()
    box = engines(here, notes)
    group = [p for p in here.prompts if p.id == here.prompts[0].id][:8]
    return box, asyncio.run(StudentRollout(max_tokens=8, record_topk=4)(group, box))


def scores(scorer: Any) -> Any:
    box, texts = _group()
    found = []
    for said_of in asyncio.run(scorer(texts, box)):
        for f in fields(said_of):
            value = getattr(said_of, f.name)
            found.append((f.name, value.tolist() if isinstance(value, np.ndarray) else type(value).__name__))
    return found


def weighed(weight: Any) -> Any:
    box, texts = _group()
    step = [
        replace(
            t, stop=StopReason.LENGTH if i % 3 else StopReason.END, prompt=replace(t.prompt, teacher=TEACHERS[i % 2])
        )
        for i, t in enumerate(texts)
    ]
    if not hasattr(weight, "consumes"):  # a score by which tokens are selected
        weight = TopFraction(by=weight, fraction=0.3)
    known = look_up({"w": weight}, {"c": 6})["w"]
    draw = np.random.default_rng(0)
    scored = [Scored(trajectory=t, scores=_scored(known, -draw.random(len(t), np.float32))) for t in step]
    read = [
        replace(s, readings={r: _read(r, i, len(s.trajectory)) for r in readings_of(known)})
        for i, s in enumerate(scored)
    ]
    return [w.tolist() for w in known(read, box)]


def _scored(weight: Any, logprobs: np.ndarray) -> Scores:
    """Scores that a weight part can read."""
    if not issubclass(weight.consumes, FutureScores):
        return TokenScores(logprobs=logprobs)
    return FutureScores(logprobs=logprobs, hidden=logprobs[:, None], ahead=-logprobs)


def _read(reading: Any, number: int, tokens: int) -> np.ndarray:
    """Numbers that stand for a reading of a text: others for every reading."""
    draw = np.random.default_rng([crc32(repr(reading).encode()), number])
    return draw.random(tokens, np.float32)


def divided(normalizer: Any) -> Any:
    _, texts = _group()
    step = [Scored(trajectory=t, scores=Scores()) for t in texts[:3]]
    weights = [np.ones(len(t.trajectory)) * (i + 1) for i, t in enumerate(step)]
    ((batch,),) = pack(step, weights, Layout(ranks=1, tokens_per_microbatch=99), normalizer)
    return batch.denominator, batch.weights.tolist()


def _worlds() -> list[World]:
    return [world(seed, stale=True) for seed in range(3)]


def slopes(objective: Any) -> Any:
    """The gradient of every written token in a few states, of text that another policy wrote."""
    found = []
    for w in _worlds():
        student = StudentLogits(logits=w.z.expand(len(w.q), -1))
        loss = objective(student, every_token(w, said(objective.consumes, w))).loss
        found += [gradient(one, w).tolist() for one in loss]
    return found


def keeps_its_promise(objective: Any) -> None:
    """The expected gradient is that of what it promises with these values: bounds that were swapped would show."""
    for w in _worlds():
        exact = gradient(promised(objective)(w), w)
        error = float((expected_gradient(objective, w) - exact).abs().max())
        assert error < 1e-6 * max(1.0, float(exact.abs().max())), objective
