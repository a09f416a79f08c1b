"""A student's engine with a teacher inside, on a real vLLM: what it samples from, and that nothing else changes."""

import os

from actors.config import InnerTeacher, StudentConfig, environment
from opd.settings.devices import Device, Dtype

os.environ |= environment(Device.CPU)  # before anything imports vLLM

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from actors.engine import VLLMEngine
from actors.engine_thread import BUDGET
from opd.errors import DataError
from opd.ports import Completion, GenerateRequest, Sampling, TeacherBlend
from opd.rollouts.trust_region import blended, with_one_end
from opd.types import BlendedScores
from tests.integration.engines.test_engine import SEED, House, requests, weights
from tests.tiny_models import EOS, VOCABULARY, logprobs, tiny_model

LONGEST = 320  # more than two blocks of the key-value cache
BUDGETS = (0.05, 1.0, 1e6)
THEIR_END = 7  # with which the teacher ends texts
ENDS = (EOS, THEIR_END)


def opened(path: Path, origin: Qwen3ForCausalLM, loop: asyncio.AbstractEventLoop, inner: InnerTeacher | None) -> House:
    config = StudentConfig(
        path=str(path), max_model_len=LONGEST, dtype=Dtype.FLOAT32, kv_cache_bytes=16 << 20, max_num_seqs=16
    )
    engine = VLLMEngine(config, SEED, lambda handle: handle(), inner=inner)
    house = House(engine=engine, origin=origin, path=path, tied=True, loop=loop)
    house.run(engine.ready())
    return house


def within(asked: Sequence[GenerateRequest], budget: float) -> list[GenerateRequest]:
    return [replace(r, blend=TeacherBlend(teacher="default", budget=budget)) for r in asked]


def assert_blends(
    asked: Sequence[GenerateRequest], answers: Sequence[Completion], *models: Qwen3ForCausalLM
) -> list[float]:
    """What was sampled from is the blend of both models in the request's context; the divergences from the student."""
    found = []
    for request, answer in zip(asked, answers, strict=True):
        assert request.blend is not None
        ids, start = np.concatenate([request.context_ids, answer.token_ids]), len(request.context_ids)
        p, q = (
            with_one_end(logprobs(m, ids)[start - 1 : -1] / request.sampling.temperature, ENDS, EOS) for m in models
        )
        mu = blended(p, q, torch.full((len(p),), request.blend.budget))
        chosen = mu.logprobs.gather(1, torch.from_numpy(answer.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(answer.behavior.logprobs, chosen.numpy(), atol=1e-4)
        assert isinstance(answer.behavior, BlendedScores)
        assert THEIR_END not in answer.token_ids
        found += mu.divergence.tolist()
    return found


def test_an_engine_samples_from_blends_and_is_otherwise_the_student(tmp_path: Path) -> None:
    """One engine for all of it: blends at several budgets beside plain requests, new weights, refusals."""
    origin, new = (tiny_model(seed, positions=LONGEST) for seed in (0, 9))
    teacher = tiny_model(5, tied=False, positions=LONGEST, num_hidden_layers=3)
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = THEIR_END
    origin.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    loop = asyncio.new_event_loop()
    plain = opened(tmp_path / "student", origin, loop, None)
    house = opened(tmp_path / "student", origin, loop, InnerTeacher(name="default", path=str(tmp_path / "teacher")))
    asked = requests(Sampling(max_tokens=30))
    expected = plain.generate(asked)

    # Alone, where the teacher is not even computed, and in one batch with blends.
    warm = requests(Sampling(max_tokens=30, temperature=0.7), samples=1)
    mixed = [*asked, *(r for budget in BUDGETS for r in within(asked, budget)), *within(warm, BUDGETS[0])]
    answers = house.generate(mixed)
    for got in (house.generate(asked), answers[: len(asked)]):
        for one, other in zip(got, expected, strict=True):
            assert np.array_equal(one.token_ids, other.token_ids)
            assert np.array_equal(one.behavior.logprobs, other.behavior.logprobs)
            assert not isinstance(one.behavior, BlendedScores)
    for number, budget in enumerate(BUDGETS, start=1):
        part = slice(number * len(asked), (number + 1) * len(asked))
        found = assert_blends(mixed[part], answers[part], origin, teacher)
        assert max(found) <= budget and (budget == BUDGETS[-1] or max(found) > 0.99 * budget)
        changed = [not np.array_equal(a.token_ids, b.token_ids) for a, b in zip(answers[part], expected, strict=True)]
        assert any(changed)
    assert_blends(mixed[-len(warm) :], answers[-len(warm) :], origin, teacher)
    again = house.generate(mixed[len(asked) : 2 * len(asked)])  # in another batch: the same tokens
    for one, other in zip(again, answers[len(asked) : 2 * len(asked)], strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)

    # A prompt whose beginning is cached without the teacher's part.
    long = replace(asked[0], prompt_id="long", context_ids=np.resize(np.arange(3, VOCABULARY, dtype=np.int32), 290))
    house.generate([replace(long, sampling=Sampling(max_tokens=2))])
    after = within([replace(long, sampling=Sampling(max_tokens=12))], BUDGETS[1])
    assert_blends(after, house.generate(after), origin, teacher)

    assert house.receive(weights(new, 1)) < 1e-4
    later = within(asked, BUDGETS[0])
    assert_blends(later, answers := house.generate(later), new, teacher)
    assert all(set(a.versions.tolist()) == {1} for a in answers)

    with pytest.raises(DataError, match=r"blend with teacher 'default', but the engine holds no teacher"):
        plain.generate(later)
    with pytest.raises(DataError, match=r"blend with teacher 'other', but the engine holds teacher 'default' alone"):
        house.generate([replace(later[0], blend=TeacherBlend(teacher="other", budget=1.0))])
    with pytest.raises(DataError, match=r"temperature=0 and top_p=1 leave no trust region"):
        house.generate([replace(later[0], sampling=Sampling(max_tokens=3, temperature=0.0))])
    for one in (plain, house):
        one.run(one.engine.close())
    loop.close()


def test_the_newer_runner_s_slots_lead_to_the_same_blends() -> None:
    """vLLM has two interfaces for this, and the one of GPUs is only here without one."""
    from vllm import SamplingParams

    from actors.blend import _OWN, _STEP, BlendProcessor

    student, teacher = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)) * 2
    asked = {4: SamplingParams(extra_args={BUDGET: 0.1}), 9: SamplingParams(extra_args={BUDGET: 0.5}, temperature=0.5)}
    config: Any = SimpleNamespace(additional_config={_OWN: {"ends": [1, 3], "end": 3}})
    processor = BlendProcessor(config, None)
    assert [processor.add_request(slot, params) for slot, params in asked.items()] == [True, True]
    assert not processor.add_request(2, SamplingParams())
    processor.apply_staged_writes()
    assert _STEP.wanted
    _STEP.teacher = teacher
    order: Any = SimpleNamespace(idx_mapping_np=np.array([9, 2, 4]))
    got = processor.apply(student.clone(), order)
    assert torch.equal(got[1], student[1]), "a plain request is not touched"
    for row, budget, temperature in ((0, 0.5, 0.5), (2, 0.1, 1.0)):
        p, q = (with_one_end(x[row : row + 1].double() / temperature, (1, 3), 3) for x in (student, teacher))
        mu = (got[row] / temperature).softmax(-1)
        expected = blended(p, q, torch.tensor([budget]))
        torch.testing.assert_close(mu, expected.logprobs[0].exp().float())
        assert float(expected.divergence) == pytest.approx(budget, rel=1e-3) and mu[1] == 0

    with pytest.raises(RuntimeError, match=r"logits \(3, 6\) of 2 requests are not in the same rows"):
        processor.apply(student.clone(), SimpleNamespace(idx_mapping_np=np.array([9, 2])))  # type: ignore[arg-type]
    for slot in asked:
        processor.add_request(slot, SamplingParams())
    processor.apply_staged_writes()
    assert not _STEP.wanted
    _STEP.wanted, _STEP.teacher = True, None
