"""A kind of scores of one's own is answered like the project's, everywhere; several kinds cost one forward."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margin import Margin, MarginScores, SampledMargin, WhereSure

from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from launch.run.costs import costs
from opd.certify.certify import certify
from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError, DataError, OpdError
from opd.method.method import Method
from opd.objectives.sampled import SampledReverseKL
from opd.ports import AtIds, LastHidden, LogitRows, SampledToken, ScoreAnswer, ScoreKind, ScoreRequest, TopK
from opd.ports.score_kinds import BUILT_IN
from opd.rollouts.student import StudentRollout
from opd.scorers.validation import validate_scores
from opd.settings.secret import Secret
from opd.types import RemoteRows, Scores, TokenScores
from opd.types.columns import columns
from teacher_service.backends.http import HttpTeacher
from teacher_service.backends.torch_forward import TorchTeacher
from teacher_service.config import Backend, TeacherConfig, check_supports
from teacher_service.frames import FrameLimits, Question, decode_question, encode_question
from teacher_service.known_kinds import known_kinds
from teacher_service.scoring import scores_from_hidden
from teacher_service.server import ServerConfig, TeacherServer
from teacher_service.server_identity import identity_of, served_kinds

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "shop"
PATH, TOKEN, VOCABULARY = "margin.Margin", "a-token-of-score-kinds", 64
Score = Callable[[Sequence[ScoreRequest]], list[ScoreAnswer]]


class Counting(TorchTeacher):
    """A torch teacher that counts its forwards and keeps the logits of each."""

    forwards = 0

    def _loaded(self) -> Any:
        model = super()._loaded()
        if not hasattr(self, "watched"):
            self.watched, hidden = model, model.hidden

            def counted(sequences: Any) -> Any:
                self.forwards += 1
                return hidden(sequences)

            model.hidden = counted
        return model


def teacher_config(**fields: Any) -> TeacherConfig:
    return TeacherConfig(path=str(ASSETS / "teacher"), **{"deadline_s": 60.0, "head_chunk": 7, "max_k": 16} | fields)


@pytest.fixture(scope="module")
def teacher() -> Counting:
    return Counting(teacher_config(), lambda array: array)


@pytest.fixture(scope="module", params=["torch", "http"])
def score(request: pytest.FixtureRequest, teacher: Counting) -> Iterator[Score]:
    """The teacher in this process, and behind our server."""
    loop = asyncio.new_event_loop()
    if request.param == "torch":
        yield lambda asked: loop.run_until_complete(teacher.score(asked))
    else:
        served = teacher_config(score_kinds=(PATH,))
        identity = identity_of(served, "float32", FrameLimits(k=served.max_k))
        server = TeacherServer(teacher, identity, ServerConfig(port=0, token=Secret(TOKEN)), served_kinds(served))
        remote = replace(served, backend=Backend.HTTP, url=loop.run_until_complete(server.start()), retries=0)
        client = HttpTeacher(remote, lambda array: array, TOKEN)
        yield lambda asked: loop.run_until_complete(client.score(asked))
        loop.run_until_complete(server.close())
    loop.close()


def text(seed: int, *kinds: ScoreKind[Scores]) -> ScoreRequest:
    random = np.random.default_rng(seed)
    context, tokens = random.integers(1, 9), random.integers(2, 19)
    ids = [random.integers(0, VOCABULARY, n).astype(np.int32) for n in (context, tokens)]
    return ScoreRequest(context_ids=ids[0], token_ids=ids[1], kinds=kinds)


def every_kind(request: ScoreRequest, k: int) -> tuple[ScoreKind[Scores], ...]:
    ids = np.arange(3 * len(request.token_ids), dtype=np.int32).reshape(-1, 3) % VOCABULARY
    return SampledToken(), Margin(), TopK(k=k), AtIds(ids=ids), LastHidden(), TopK(k=2)


def defined(logits: torch.Tensor) -> np.ndarray:
    """The definition, on logits over the whole vocabulary."""
    ordered = logits.log_softmax(-1).sort(-1, descending=True).values
    return (ordered[:, 0] - ordered[:, 1]).numpy()


def full_logits(teacher: TorchTeacher, request: ScoreRequest) -> torch.Tensor:
    """From the text alone, in one forward."""
    with torch.inference_mode():
        model = teacher._loaded()
        hidden = model.hidden([torch.from_numpy(np.concatenate([request.context_ids, request.token_ids[:-1]]))])
        return model.logits(hidden[-len(request.token_ids) :])


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit; of rows that are held elsewhere what they are."""
    if isinstance(a, RemoteRows):
        return all(
            np.array_equal(x[i], y[j]) for (x, i), (y, j) in zip(a.pieces, b.pieces, strict=True)
        )  # each of one piece here
    if isinstance(a, Scores):
        return type(a) is type(b) and all(same(getattr(a, c.name), getattr(b, c.name)) for c in columns(type(a)))
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_kind_of_ones_own_is_answered_by_its_definition(teacher: Counting, score: Score) -> None:
    asked = [text(seed, Margin()) for seed in range(8)]
    for request, (answer,) in zip(asked, score(asked), strict=True):
        assert type(answer) is MarginScores and answer.margin.dtype == np.float32
        np.testing.assert_allclose(answer.margin, defined(full_logits(teacher, request)), atol=2e-5)
        assert (answer.margin > 0).all()
    rows = scores_from_hidden(asked[:1], full_logits(teacher, asked[0]), lambda h: h.clone(), 5, lambda array: array)
    ((exact,),) = rows
    assert isinstance(exact, MarginScores)
    np.testing.assert_allclose(exact.margin, defined(full_logits(teacher, asked[0])), atol=1e-6)


def test_several_kinds_are_answered_from_one_forward_as_each_alone(teacher: Counting, score: Score) -> None:
    plain = text(3)
    request = replace(plain, kinds=every_kind(plain, 5))
    alone = [score([replace(plain, kinds=(kind,))])[0][0] for kind in request.kinds]
    score([plain_written := replace(plain, kinds=(SampledToken(),))])
    before = teacher.forwards
    score([plain_written])
    once = teacher.forwards - before
    before = teacher.forwards
    (together,) = score([request])
    assert teacher.forwards - before == once == 1  # the control question of a remote teacher goes along
    validate_scores([request], [together])
    assert len(together) == len(alone) == 6 and all(map(same, together, alone))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.lists(st.permutations(range(6)), min_size=1, max_size=4), st.integers(1, 16))
def test_kinds_in_any_order_and_company_are_what_each_text_alone_gets(seed: int, orders: list[Any], k: int) -> None:
    """Over logits that are given, so that nothing but the reading of them is compared."""
    texts = [text(seed + i) for i in range(len(orders))]
    kinds = [tuple(every_kind(t, k)[i] for i in order) for t, order in zip(texts, orders, strict=True)]
    asked = [replace(t, kinds=some) for t, some in zip(texts, kinds, strict=True)]
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(len(t.token_ids) for t in texts), VOCABULARY, generator=draw)

    def read(some: list[ScoreRequest], states: torch.Tensor) -> list[ScoreAnswer]:
        return list(scores_from_hidden(some, states, lambda h: h.clone(), 7, lambda array: array))

    at = 0
    for request, answer in zip(asked, read(asked, hidden), strict=True):
        mine = hidden[at : at + len(request.token_ids)]
        at += len(request.token_ids)
        for kind, scores in zip(request.kinds, answer, strict=True):
            ((other,),) = read([replace(request, kinds=(kind,))], mine)
            for column in kind.columns():
                one, two = getattr(scores, column.name), getattr(other, column.name)
                if not column.remote:  # sums over rows of another chunk may differ in the last bit
                    np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)
        validate_scores([request], [answer])


def test_the_enumerated_engine_answers_it_by_its_definition() -> None:
    world = make_world(0)
    reader = engines(world, RequestLog()).teachers["default"]
    ids = np.array([1, 4, 2], dtype=np.int32)
    kinds = (Margin(), TopK(k=3), LastHidden(), SampledToken())
    request = ScoreRequest(context_ids=ids, token_ids=ids[::-1].copy(), kinds=kinds)
    (answer,) = asyncio.run(reader.score([request]))
    (rows,) = world.teachers["default"].logprobs([(request.context_ids, request.token_ids)])
    assert isinstance(answer[0], MarginScores) and np.array_equal(answer[0].margin, defined(rows))
    assert all(
        same(scores, asyncio.run(reader.score([replace(request, kinds=(kind,))]))[0][0])
        for kind, scores in zip(kinds, answer, strict=True)
    )


def test_a_method_that_asks_it_is_certified() -> None:
    parts = {"scorer": SampledMargin(), "objective": SampledReverseKL(), "weights": {"sure": WhereSure(least=0.5)}}
    found = certify(Method(name="margin", rollout=StudentRollout(max_tokens=8), **parts))
    assert len(found.rows) > 5 and found.failures == []


@pytest.mark.parametrize("kind", [Margin, SampledToken])
def test_a_teacher_that_is_asked_any_kind_is_counted(kind: Any) -> None:
    """Also where the answer has no log-probability of the sampled token."""
    plan = make_plan(run_config(["experiment=shop", "method=sft"]))
    scorer: Any = one_kind(kind)
    method = replace(plan.config.method, scorer=scorer)
    assert not costs(plan).teacher_reads
    assert costs(replace(plan, config=replace(plan.config, method=method))).teacher_reads


def one_kind(kind: type[ScoreKind[Scores]]) -> Any:
    """A scorer whose scores are those of one kind."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class OneKind(SampledMargin):
        produces: ClassVar[type[Scores]] = kind.answer
        requires: ClassVar[Any] = frozenset({kind})

    return OneKind()


# What is refused.


def test_a_certificate_names_a_kind_that_looks_at_more_ids_than_it_has() -> None:
    ids = np.array([1, 2], dtype=np.int32)
    asked = ScoreRequest(context_ids=ids, token_ids=ids, kinds=(Deep(),))
    reader = engines(make_world(0), RequestLog()).teachers["default"]
    with pytest.raises(ConfigurationError, match=r"12 ids and cannot give the margin .*depth=32 is not within 1 and"):
        asyncio.run(reader.score([asked]))


@pytest.mark.parametrize("backend", [Backend.VLLM_LOGPROBS, Backend.OPENAI])
def test_a_backend_without_logits_refuses_it_with_its_reason(backend: Backend) -> None:
    config = teacher_config(backend=backend, url="http://h", model="m")
    with pytest.raises(ConfigurationError, match=r"margin of the two likeliest.*cannot answer \(.+\); .* TORCH, VLLM"):
        check_supports(config, SampledMargin.requires, "method mine")


def test_a_remote_teacher_must_have_been_told_the_class() -> None:
    config = teacher_config(backend=Backend.HTTP, url="http://h")
    with pytest.raises(ConfigurationError, match=rf"set teacher\.score_kinds=\[{PATH}\] here and for"):
        check_supports(config, SampledMargin.requires, "method mine")
    check_supports(replace(config, score_kinds=(PATH,)), SampledMargin.requires, "method mine")
    check_supports(teacher_config(), SampledMargin.requires, "method mine")  # it is computed in this process


def test_a_server_that_was_not_told_is_not_asked() -> None:
    async def scene() -> None:
        plain = teacher_config()
        identity = identity_of(plain, "float32", FrameLimits())
        server = TeacherServer(TorchTeacher(plain, lambda a: a), identity, ServerConfig(port=0, token=Secret(TOKEN)))
        config = replace(plain, backend=Backend.HTTP, url=await server.start(), score_kinds=(PATH,), retries=0)
        try:
            await HttpTeacher(config, lambda array: array, TOKEN).score([text(0, Margin())])
        finally:
            await server.close()

    with pytest.raises(OpdError, match=rf"supports the kinds of scores written, topk, .* but {PATH} is asked; start"):
        asyncio.run(scene())


def test_a_question_of_a_kind_that_is_not_listed_is_never_built() -> None:
    frame = encode_question(Question(call=bytes(16), requests=(text(0, Margin()),)))
    assert decode_question(frame, FrameLimits(), known_kinds([PATH])).requests[0].kinds == (Margin(),)
    with pytest.raises(DataError, match="kinds of scores that do not exist here"):
        decode_question(frame, FrameLimits())


@dataclass(frozen=True, slots=True, kw_only=True)
class Nameless(ScoreKind[TokenScores]):
    """Called as one of the project's."""

    answer: ClassVar[type[Scores]] = TokenScores
    wire: ClassVar[str] = "written"

    def read(self, rows: LogitRows) -> dict[str, torch.Tensor]:
        return {"logprobs": rows.own}


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(Scores):
    """Has no arrays."""

    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Texting(Nameless):
    """Answers with what cannot travel."""

    answer: ClassVar[type[Scores]] = Texts
    wire: ClassVar[str] = "texts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Square(Margin):
    """Has another shape than it says."""

    def read(self, rows: LogitRows) -> dict[str, torch.Tensor]:
        return {"margin": rows.logits}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deep(Margin):
    """Looks at more ids than a small vocabulary has."""

    @property
    def depth(self) -> int:
        return 32


HERE = __name__


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no.such.Thing", "cannot be imported"),
        ("margin.Nothing", "cannot be imported"),
        ("margin.MarginScores", "is no kind of scores"),
        (f"{HERE}.Nameless", "both called 'written'"),
        (f"{HERE}.Texting", "Texts.said is of type .*cannot travel"),
    ],
)
def test_a_path_that_names_no_kind_is_refused_when_planned(path: str, says: str) -> None:
    remote = ["teacher.backend=http", "teacher.url=http://127.0.0.1:1", f"teacher.score_kinds=[{path}]"]
    with pytest.raises(ConfigurationError, match=says):
        make_plan(run_config(["experiment=shop", "method=topk_reverse_kl", *remote]))


def test_a_path_that_is_none_is_refused_by_its_form() -> None:
    with pytest.raises(ConfigurationError, match=r"score_kinds\[0\] needs text that is the path of a class"):
        teacher_config(score_kinds=("rm -rf",))


def test_a_kind_that_reads_another_shape_than_it_declares_is_named(teacher: Counting) -> None:
    with pytest.raises(ConfigurationError, match=r"Square\.read must give .*'margin'.* but gave"):
        asyncio.run(teacher.score([text(0, Square())]))


def test_a_request_of_no_kind_is_refused(teacher: Counting) -> None:
    with pytest.raises(DataError, match="asks for no kind of scores"):
        asyncio.run(teacher.score([text(0)]))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((MarginScores(margin=np.ones(3, np.float32)),), "expected 2 rows of margin, got 3"),
        ((MarginScores(margin=np.array([1, np.nan], np.float32)),), "margin contains NaN"),
        ((MarginScores(margin=np.ones(2, np.int32)),), "dtype int32"),
        ((TokenScores(logprobs=np.ones(2, np.float32)),), "asked for the margin .* got TokenScores"),
        ((), "asked for 1 kinds of scores, got 0"),
    ],
)
def test_a_false_answer_is_refused(answer: Any, says: str) -> None:
    ids = np.array([1, 2], dtype=np.int32)
    with pytest.raises(DataError, match=says):
        validate_scores([ScoreRequest(context_ids=ids, token_ids=ids, kinds=(Margin(),))], [answer])


def test_the_columns_of_the_projects_scores_are_those_of_their_annotations() -> None:
    found = {kind.wire_name(): [(c.name, c.dtype.str, c.axes, c.remote) for c in kind.columns()] for kind in BUILT_IN}
    support = [
        ("logprobs", "<f4", (), False),
        ("topk_ids", "<i4", ("K",), False),
        ("topk_logprobs", "<f4", ("K",), False),
        ("rest", "<f4", (), False),
    ]
    assert found == {
        "written": support[:1],
        "topk": support,
        "at_ids": support,
        "hidden": [support[0], ("hidden", "<f4", ("H",), True)],
    }


def test_rows_are_as_they_were_after_their_rest_was_summed() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    before, ids = logits.clone(), torch.tensor([[0, 3, 3]] * 5)
    rows = LogitRows.of(logits, logits.logsumexp(-1, keepdim=True), ids[:, 0])
    rest = rows.rest(ids)
    assert torch.equal(logits, before)
    expected = before.log_softmax(-1)[:, [1, 2, 4, 5, 6, 7, 8]].logsumexp(-1)
    torch.testing.assert_close(rest, expected)
