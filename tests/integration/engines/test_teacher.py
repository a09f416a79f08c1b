"""The torch teacher: what it testifies is what the model says of each sequence alone."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from threading import Timer
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM, Qwen3ForCausalLM

from hf.digest import file_digest
from hf.packed_model import load_packed
from learner.publishing import Publisher, StagedSender
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import (
    AtIds,
    LastHidden,
    PublishedWeights,
    SampledToken,
    ScoreKind,
    ScoreRequest,
    Sentinel,
    TopK,
    WeightShard,
)
from opd.scorers.validation import validate_scores
from opd.settings.devices import Device, Dtype
from opd.types import HiddenScores, TokenScores, TopKScores
from opd.types.log_mass import ABSENT
from teacher_service.backends.torch_forward import TorchTeacher, microbatches
from teacher_service.config import TeacherConfig
from tests.one_kind import singles
from tests.shelf import PullSender
from tests.tiny_models import VOCABULARY, completion_logprobs, impatient, tiny_model
from weight_sync.receiver import assemble

POSITIONS = 64
T = TypeVar("T")


def run(work: Awaitable[T]) -> T:
    """The result of `work`, soon."""
    return asyncio.run(asyncio.wait_for(work, 60))


def checkpoint(folder: Path, tied: bool = True, seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A tiny random model with opinions, saved to `folder`."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model(seed, tied=tied, positions=POSITIONS, std=0.15, **heads, **changes)
    model.save_pretrained(folder)
    return model


@dataclass
class School:
    """A teacher with small batches, so that requests are cut and packed in many ways, and its plain twin."""

    teacher: TorchTeacher
    plain: Qwen3ForCausalLM
    shelf: PullSender
    path: Path

    def score(self, requests: Sequence[ScoreRequest]) -> list[Any]:
        answers = run(self.teacher.score(requests))
        validate_scores(requests, answers)
        return singles(answers)

    def twin(self) -> Qwen3ForCausalLM:
        """A copy of the plain model, to be changed."""
        return deepcopy(self.plain)

    def expected(self, request: ScoreRequest) -> torch.Tensor:
        """Full logprobs `[T, V]` from one unpadded, unpacked forward."""
        return completion_logprobs(self.plain, request)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def school(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> School:
    path = tmp_path_factory.mktemp("teacher")
    plain = checkpoint(path, tied=request.param)
    shelf = PullSender()
    config = TeacherConfig(path=str(path), max_batch_tokens=150, head_chunk=7, max_k=50, deadline_s=60)
    teacher = TorchTeacher(config, shelf.store)
    run(teacher.ready())
    return School(teacher=teacher, plain=plain, shelf=shelf, path=path)


def request(kind: Callable[[int, np.random.Generator], ScoreKind], seed: int) -> ScoreRequest:
    """A random context and completion; `kind` gets the completion's length."""
    random = np.random.default_rng(seed)
    context, tokens = random.integers(1, 20), random.integers(1, 40)
    return ScoreRequest(
        context_ids=random.integers(0, VOCABULARY, context).astype(np.int32),
        token_ids=random.integers(0, VOCABULARY, tokens).astype(np.int32),
        kinds=(kind(int(tokens), random),),
    )


WANTS: list[Callable[[int, np.random.Generator], ScoreKind]] = [
    lambda tokens, random: SampledToken(),
    lambda tokens, random: TopK(k=5),
    lambda tokens, random: TopK(k=50),
    lambda tokens, random: AtIds(ids=random.integers(0, VOCABULARY, (tokens, 4)).astype(np.int32)),
    lambda tokens, random: LastHidden(),
]


def test_every_kind_of_testimony_is_the_model_s_own(school: School) -> None:
    requests = [request(WANTS[i % len(WANTS)], i) for i in range(30)]  # mixed in one call
    for asked, answer in zip(requests, school.score(requests), strict=True):
        full = school.expected(asked)
        ids = torch.from_numpy(asked.token_ids).long()
        np.testing.assert_allclose(answer.logprobs, full.gather(1, ids[:, None])[:, 0].numpy(), atol=1e-5)
        match asked.kinds[0]:
            case TopK(k=k):
                assert isinstance(answer, TopKScores)
                values, best = full.topk(k)
                np.testing.assert_allclose(answer.topk_logprobs, values.numpy(), atol=1e-5)
                at_ours = full.gather(1, torch.from_numpy(answer.topk_ids).long())
                np.testing.assert_allclose(at_ours.numpy(), values.numpy(), atol=1e-5)
                assert np.array_equal(answer.topk_ids[:, :5], best.numpy()[:, :5])
            case AtIds(ids=named):
                assert isinstance(answer, TopKScores)
                at_named = full.gather(1, torch.from_numpy(named).long())
                np.testing.assert_allclose(answer.topk_logprobs, at_named.numpy(), atol=1e-5)
                assert np.array_equal(answer.topk_ids, named)
            case LastHidden():
                assert isinstance(answer, HiddenScores)
                head = school.plain.get_output_embeddings().weight
                rebuilt = (answer.hidden.fetch(school.shelf.fetch) @ head.T).log_softmax(-1)
                np.testing.assert_allclose(rebuilt.numpy(), full.numpy(), atol=1e-4)
            case SampledToken():
                assert type(answer) is TokenScores


def test_answers_do_not_depend_on_company_or_order(school: School) -> None:
    requests = [request(WANTS[i % 4], i) for i in range(20)]
    together = school.score(requests)
    shuffled = np.random.default_rng(1).permutation(len(requests))
    apart = school.score([requests[i] for i in shuffled])
    for i, answer in zip(shuffled, apart, strict=True):
        alone = school.score([requests[i]])[0]
        for other in (answer, alone):
            np.testing.assert_allclose(other.logprobs, together[i].logprobs, atol=1e-5)
            if isinstance(other, TopKScores):
                np.testing.assert_allclose(other.topk_logprobs, together[i].topk_logprobs, atol=1e-5)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_teacher_that_slept_scores_as_before(school: School, mixup: float) -> None:
    """Twice, because weights that never change are parked once."""
    teacher = TorchTeacher(TeacherConfig(path=str(school.path), mixup=mixup, deadline_s=60), school.shelf.store)
    asked = [request(WANTS[0], i) for i in range(4)]
    before = run(teacher.score(asked))
    for _ in range(2):
        run(teacher.sleep())
        with pytest.raises(ConfigurationError, match=r"it sleeps; wake it before"):
            run(teacher.score(asked))
        run(teacher.wake())
        for one, other in zip(run(teacher.score(asked)), before, strict=True):
            assert np.array_equal(one[0].logprobs, other[0].logprobs)


def test_hidden_states_of_a_microbatch_are_stored_once(school: School) -> None:
    school.shelf.arrays.clear()
    requests = [request(WANTS[4], i) for i in range(12)]
    school.score(requests)
    lengths = [len(r.context_ids) + len(r.token_ids) - 1 for r in requests]
    assert len(school.shelf.arrays) == len(list(microbatches(lengths, 150)))
    assert sum(map(len, school.shelf.arrays.values())) == sum(len(r.token_ids) for r in requests)
    assert all(array.dtype == np.float32 for array in school.shelf.arrays.values())
    assert school.score([]) == []


def test_bfloat16_travels_as_words(school: School) -> None:
    config = TeacherConfig(path=str(school.path), dtype=Dtype.BFLOAT16, deadline_s=60)
    teacher = TorchTeacher(config, school.shelf.store)
    asked = request(WANTS[4], 3)
    (answer,) = singles(run(teacher.score([asked])))
    assert isinstance(answer, HiddenScores)
    hidden = answer.hidden.fetch(school.shelf.fetch)
    assert hidden.dtype == torch.bfloat16
    head = school.plain.get_output_embeddings().weight.bfloat16()
    rebuilt = (hidden @ head.T).float().log_softmax(-1).gather(1, torch.from_numpy(asked.token_ids).long()[:, None])
    np.testing.assert_allclose(answer.logprobs, rebuilt[:, 0].numpy(), atol=1e-6)
    assert np.abs(answer.logprobs - school.score([asked])[0].logprobs).mean() < 0.1


@pytest.mark.parametrize("lengths", [[3, 9, 2, 9, 1], [40, 40, 40], [100], []])
def test_microbatches_hold_everything_once_within_the_budget(lengths: list[int]) -> None:
    groups = list(microbatches(lengths, 80))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(g) * max(lengths[i] for i in g) <= 80 or len(g) == 1 for g in groups)


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 90))
def test_microbatches_go_from_long_to_short_and_are_as_full_as_they_may_be(lengths: list[int], budget: int) -> None:
    groups = list(microbatches(lengths, budget))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    assert [i for group in groups for i in group] == order
    for group, following in pairwise([*groups, []]):
        longest = lengths[group[0]]
        assert len(group) == 1 or len(group) * longest <= budget
        assert not following or (len(group) + 1) * longest > budget


def test_requests_that_cannot_be_read_are_refused(school: School) -> None:
    good = request(WANTS[0], 0)

    def refused(match: str, **changes: Any) -> None:
        fields = {"context_ids": good.context_ids, "token_ids": good.token_ids, "kinds": good.kinds}
        with pytest.raises(DataError, match=f"score request 1 cannot be read.*{match}"):
            run(school.teacher.score([good, ScoreRequest(**(fields | changes))]))

    tokens = len(good.token_ids)
    empty, far = np.zeros(0, dtype=np.int32), np.asarray([VOCABULARY], dtype=np.int32)
    refused("0 context", context_ids=empty)
    refused("0 completion", token_ids=empty)
    refused("65 tokens, more than the 64", context_ids=np.ones(66 - tokens, dtype=np.int32))
    school.score([replace(good, context_ids=np.ones(65 - tokens, dtype=np.int32))])  # 64, as many as there may be
    refused("context has ids outside", context_ids=far)
    refused("completion has ids outside", token_ids=far)
    refused("k=51 is not within 1 and 50", kinds=(TopK(k=51),))
    refused("k=0", kinds=(TopK(k=0),))
    refused("shape", kinds=(AtIds(ids=np.zeros((tokens + 1, 2), dtype=np.int32)),))
    refused("asks at ids outside", kinds=(AtIds(ids=np.full((tokens, 2), VOCABULARY, dtype=np.int32)),))


def published(model: Qwen3ForCausalLM, version: int = 1) -> PublishedWeights:
    """The weights of `model` as the learner hands them out."""
    tensors = dict(model.named_parameters())
    shapes, dtypes = [tuple(t.shape) for t in tensors.values()], [t.dtype for t in tensors.values()]
    publisher = Publisher(
        list(tensors), shapes, dtypes, chunk_bytes=5000, rank=0, ranks=1, sender=StagedSender(np.copy)
    )
    ordered = [tensors[name].detach() for name in publisher.manifest.names]
    chunks = publisher.chunks(lambda first, last: nullcontext(ordered[first:last]))
    nothing = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
    return assemble([WeightShard(version=version, manifest=publisher.manifest, chunks=chunks, sentinel=nothing)])


def test_a_teacher_that_follows_is_the_moving_average_of_its_students(school: School, tmp_path: Path) -> None:
    tied = bool(school.plain.config.tie_word_embeddings)
    teacher = TorchTeacher(TeacherConfig(path=str(school.path), mixup=0.25, deadline_s=60), school.shelf.store)
    twin = school.twin()
    for seed in (1, 2):
        student = checkpoint(tmp_path / str(seed), tied=tied, seed=seed)
        run(teacher.follow(published(student), np.asarray))
        with torch.no_grad():
            for own, new in zip(twin.parameters(), student.parameters(), strict=True):
                own.copy_(0.75 * own + 0.25 * new)
    asked = [request(WANTS[1], seed) for seed in range(4)]
    for one, answer in zip(asked, singles(run(teacher.score(asked))), strict=True):
        expected = completion_logprobs(twin, one).gather(1, torch.from_numpy(one.token_ids).long()[:, None])
        np.testing.assert_allclose(answer.logprobs, expected[:, 0].numpy(), atol=1e-5)


def test_a_teacher_that_followed_goes_on_from_its_file(school: School, tmp_path: Path) -> None:
    config = TeacherConfig(path=str(school.path), mixup=0.25, deadline_s=60)
    first, second = TorchTeacher(config, school.shelf.store), TorchTeacher(config, school.shelf.store)
    tied = bool(school.plain.config.tie_word_embeddings)
    students = [published(checkpoint(tmp_path / str(seed), tied=tied, seed=seed)) for seed in (1, 2)]
    asked = [request(WANTS[1], seed) for seed in range(4)]
    run(first.follow(students[0], np.asarray))
    digest = run(first.save(str(tmp_path / "teacher.safetensors")))
    assert digest == file_digest(tmp_path / "teacher.safetensors")
    run(second.restore(str(tmp_path / "teacher.safetensors")))
    for teacher in (first, second):
        run(teacher.follow(students[1], np.asarray))
    for one, other in zip(singles(run(first.score(asked))), singles(run(second.score(asked))), strict=True):
        assert np.array_equal(one.logprobs, other.logprobs)
    (tmp_path / "file").write_text("")
    with pytest.raises(OpdError, match="cannot write"):
        run(first.save(str(tmp_path / "file" / "teacher.safetensors")))


def test_a_teacher_keeps_its_weights_when_what_it_should_follow_is_wrong(school: School, tmp_path: Path) -> None:
    teacher = TorchTeacher(TeacherConfig(path=str(school.path), mixup=1.0, deadline_s=60), school.shelf.store)
    asked = [request(WANTS[0], 0)]
    before = singles(run(teacher.score(asked)))[0].logprobs
    tied = bool(school.plain.config.tie_word_embeddings)
    good = published(checkpoint(tmp_path / "wide", tied=tied, seed=9))
    damaged = good.chunks[2].handle.copy()
    damaged[len(damaged) // 2] ^= 1
    chunks = (*good.chunks[:2], replace(good.chunks[2], handle=damaged), *good.chunks[3:])
    with pytest.raises(DataError, match=r"the teacher refuses weights version 1.*damaged"):
        run(teacher.follow(replace(good, chunks=chunks), np.asarray))
    other = published(checkpoint(tmp_path / "narrow", intermediate_size=48))
    with pytest.raises(DataError, match=r"needs the student's architecture, but .* differs"):
        run(teacher.follow(other, np.asarray))
    assert np.array_equal(singles(run(teacher.score(asked)))[0].logprobs, before)
    run(teacher.follow(good, np.asarray))
    assert not np.allclose(singles(run(teacher.score(asked)))[0].logprobs, before)


def test_a_moving_average_in_bfloat16_is_refused(school: School) -> None:
    config = TeacherConfig(path=str(school.path), mixup=0.01, dtype=Dtype.BFLOAT16, deadline_s=60)
    with pytest.raises(ConfigurationError, match=r"moving average needs float32.*teacher\.dtype=FLOAT32"):
        run(TorchTeacher(config, school.shelf.store).ready())


def test_a_teacher_that_copies_its_student_may_compute_in_bfloat16(school: School) -> None:
    for mixup in (0.0, 1.0):
        config = TeacherConfig(path=str(school.path), mixup=mixup, dtype=Dtype.BFLOAT16, deadline_s=60)
        run(TorchTeacher(config, school.shelf.store).ready())


def test_what_was_saved_is_on_the_disk_when_its_digest_is_told(
    school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = list[int](), os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    run(school.teacher.save(str(tmp_path / "teacher.safetensors")))
    assert (tmp_path / "teacher.safetensors").stat().st_ino in synced


def test_code_that_lies_beside_the_weights_is_not_run(school: School, tmp_path: Path) -> None:
    folder, bitten = tmp_path / "model", tmp_path / "bitten"
    copytree(school.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(
        f"from pathlib import Path\nfrom transformers import Qwen3ForCausalLM\n"
        f"Path({str(bitten)!r}).touch()\n\n\nclass Own(Qwen3ForCausalLM):\n    pass\n"
    )
    with pytest.raises(DataError, match="which is never run"):
        run(TorchTeacher(TeacherConfig(path=str(folder), deadline_s=60), school.shelf.store).ready())
    load_packed(str(folder), torch.float32, torch.device("cpu"))  # and not where nobody has looked at it before either
    assert not bitten.exists()


def test_a_head_with_a_bias_is_read_with_it(school: School, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    plain = PhiForCausalLM(config).eval()
    assert plain.lm_head.bias is not None
    torch.nn.init.normal_(plain.lm_head.bias)
    plain.save_pretrained(tmp_path)
    teacher = TorchTeacher(TeacherConfig(path=str(tmp_path), deadline_s=60), school.shelf.store)
    asked = [request(WANTS[0], seed) for seed in range(3)]
    for one, answer in zip(asked, singles(run(teacher.score(asked))), strict=True):
        expected = completion_logprobs(plain, one).gather(1, torch.from_numpy(one.token_ids).long()[:, None])  # pyright: ignore
        np.testing.assert_allclose(answer.logprobs, expected[:, 0].numpy(), atol=1e-5)


def test_a_support_over_the_whole_vocabulary_leaves_nothing(school: School, tmp_path: Path) -> None:
    teacher = TorchTeacher(TeacherConfig(path=str(school.path), deadline_s=60), school.shelf.store)
    every = np.tile(np.arange(VOCABULARY, dtype=np.int32), (3, 1))
    ids = np.array([4, 5, 6], dtype=np.int32)
    asked = [ScoreRequest(context_ids=ids, token_ids=ids, kinds=(w,)) for w in (TopK(k=VOCABULARY), AtIds(ids=every))]
    for answer in singles(run(teacher.score(asked))):
        assert isinstance(answer, TopKScores) and np.array_equal(
            np.asarray(answer.rest), np.full(3, ABSENT, np.float32)
        )


def test_a_damaged_model_does_not_testify(school: School, tmp_path: Path) -> None:
    checkpoint(tmp_path, tied=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][77] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    teacher = TorchTeacher(TeacherConfig(path=str(tmp_path), deadline_s=60), school.shelf.store)
    asked = [
        ScoreRequest(context_ids=np.full(3, i, np.int32), token_ids=np.ones(4, np.int32), kinds=(SampledToken(),))
        for i in (76, 77)
    ]
    run(teacher.score(asked[:1]))
    with pytest.raises(DataError, match="not finite"):
        run(teacher.score(asked))


def test_models_that_cannot_be_packed_are_refused(school: School, tmp_path: Path) -> None:
    capped = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=0.1,
    )
    Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "capped")
    with pytest.raises(ConfigurationError, match="scales or bounds them afterwards"):
        run(TorchTeacher(TeacherConfig(path=str(tmp_path / "capped")), school.shelf.store).ready())


def test_a_window_shorter_than_the_sequence_is_kept(school: School, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["sliding_attention"] * 2}
    plain = checkpoint(tmp_path, **window)
    teacher = TorchTeacher(TeacherConfig(path=str(tmp_path), deadline_s=60), school.shelf.store)
    ids = np.arange(3, 42, dtype=np.int32)
    asked = [ScoreRequest(context_ids=ids[:9], token_ids=ids[9:], kinds=(SampledToken(),))] * 2
    expected = completion_logprobs(plain, asked[0]).gather(1, torch.from_numpy(ids[9:, None]).long())
    for answer in singles(run(teacher.score(asked))):
        np.testing.assert_allclose(answer.logprobs, expected[:, 0].numpy(), atol=1e-5)


def test_ready_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(config: TeacherConfig) -> None:
        run(TorchTeacher(config, lambda array: array).ready())

    with pytest.raises(ConfigurationError, match="is none"):
        ready(TeacherConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"no config\.json"):
        ready(TeacherConfig(path=str(tmp_path)))
    checkpoint(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match=r"teacher\.device is GPU"):
            ready(TeacherConfig(path=str(tmp_path), device=Device.GPU))
    monkeypatch.setattr("teacher_service.backends.torch_forward.START_S", 1e-6)
    with pytest.raises(OpdError, match="did not finish loading its model within"):
        ready(impatient(TeacherConfig(path=str(tmp_path)), seconds=1e-6))


def test_statistics_count(school: School) -> None:
    before = run(school.teacher.stats())
    asked = request(WANTS[0], 5)
    school.score([asked])
    after = run(school.teacher.stats())
    assert after.requests == before.requests + 1
    assert after.scored == before.scored + len(asked.token_ids)
    assert after.read == before.read + len(asked.context_ids) + len(asked.token_ids) - 1
    assert after.busy_s > before.busy_s
    assert after.unanswered == after.quarantined == 0  # nobody is asked twice here


def test_an_answer_is_waited_for_no_longer_than_the_deadline(school: School) -> None:
    config = TeacherConfig(path=str(school.path), deadline_s=60)
    teacher = TorchTeacher(config, school.shelf.store)
    run(teacher.ready())
    teacher._config = impatient(config)
    teacher._lock.acquire()  # as if another call were being scored
    Timer(0.4, teacher._lock.release).start()
    with pytest.raises(OpdError, match="did not finish scoring 1 completions within 0"):
        run(teacher.score([request(WANTS[0], 5)]))
