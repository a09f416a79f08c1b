"""The whole loop of on-policy distillation in one file, on the ports of the library.

    python examples/one_file_opd.py          # tables as models, no engine: a second
    python examples/one_file_opd.py real     # the demo's models with Ray, vLLM and DeepSpeed: a minute

`distill` is what `opd.loop.train` does, without collecting ahead, accounts of every trajectory, and what happens when
something fails. The same function trains a table of logits and a model on a cluster.
"""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd import ports
from opd.loss.chunked import StudentLogits, flat_loss
from opd.method.method import Method, packed, scored, weighed
from opd.objectives.sampled import SampledReverseKL
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import SampledTokens
from opd.types import Batch, Prompt, Scores, StepReport, StopReason, TokenScores


async def distill(
    method: Method,
    prompts: ports.PromptSource,
    sources: ports.Sources,
    engines: ports.Engines,
    learner: ports.Learner,
    steps: int,
) -> list[StepReport]:
    """Reports of `steps` strictly on-policy steps."""
    reports = []
    await learner.publish(engines.student, 0)
    for step in range(steps):
        context = ports.Context.of(engines, step=step, steps=steps, seed=0)
        items = []
        for _, group in groupby(prompts(step, sources), key=lambda prompt: prompt.id):
            trajectories = await method.rollout(list(group), context)  # collect
            items += await scored(method, trajectories, context)  # score
        terms = weighed(method, items, context)  # weigh
        batches = packed(method, items, terms, learner.layout, turn=f" at step {step + 1}")  # pack
        reports.append(await method.update(learner, batches, method.loss_at(context), context))  # learn
        await learner.publish(engines.student, step + 1)
    return reports


# --- First with fakes: a model is a table of logits, whose row of the last token predicts the next one. ---------------

V, GROUP, LENGTH = 12, 64, 8


@dataclass
class TableEngine:
    """Writer and reader of a table of logits `[V, V]`."""

    table: Tensor
    version: int = 0

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        """Sampled text with the log-probabilities it was sampled with."""
        draw = np.random.default_rng([self.version, *requests[0].prompt_id.encode()])
        rows, count = self.table.log_softmax(-1).numpy(), len(requests)
        last = np.array([request.context_ids[-1] for request in requests])
        ids, logprobs = list[np.ndarray](), list[np.ndarray]()
        for _ in range(requests[0].sampling.max_tokens):
            below = np.exp(rows[last]).cumsum(-1) < draw.random((count, 1))
            ids.append(below.sum(-1).clip(max=V - 1))
            logprobs.append(rows[last, ids[-1]])
            last = ids[-1]
        return [
            ports.Completion(
                token_ids=tokens.astype(np.int32),
                behavior=TokenScores(logprobs=values.astype(np.float32)),
                versions=np.full(len(tokens), self.version, dtype=np.int32),
                stop=StopReason.LENGTH,
            )
            for tokens, values in zip(np.stack(ids, 1), np.stack(logprobs, 1), strict=True)
        ]

    async def score(self, requests: Sequence[ports.ScoreRequest]) -> list[ports.ScoreAnswer]:
        """The log-probability of every sampled token."""
        rows = self.table.log_softmax(-1).float().numpy()
        before = [np.concatenate([r.context_ids[-1:], r.token_ids[:-1]]) for r in requests]
        return [(TokenScores(logprobs=rows[b, r.token_ids]),) for b, r in zip(before, requests, strict=True)]

    async def receive(self, weights: ports.PublishedWeights) -> ports.WeightAck:
        """Not used: `TableLearner.publish` writes the table."""
        raise NotImplementedError


@dataclass
class TableLearner:
    """Plain gradient descent on a table, through the library's own packing and chunked loss."""

    table: Tensor
    lr: float = 4.0
    layout: ports.Layout = field(default=ports.Layout(ranks=1, tokens_per_microbatch=10_000))

    async def step(self, batches: Sequence[Sequence[Batch[Scores]]], objective: Any) -> StepReport:
        """One step of gradient descent."""
        head, total, tokens = self.table.T.clone().requires_grad_(), torch.zeros(()).double(), 0
        for batch in (b.to("cpu", lambda rows: rows) for rank in batches for b in rank):
            hidden = torch.eye(V).double()[batch.input_ids[batch.predict_at]]

            def evaluate(student: StudentLogits, start: int, stop: int, batch: Batch[Any] = batch) -> Any:
                return objective(student, batch.rows(start, stop))

            loss, _ = flat_loss(hidden, head, batch.weights, lambda *_, e=evaluate: e)
            total, tokens = total + loss / batch.denominator, tokens + len(batch)
        total.backward()
        assert head.grad is not None
        self.table = self.table - self.lr * head.grad.T
        norm = float(head.grad.norm())
        return StepReport(
            loss=total.item(), grad_norm=norm, lr=self.lr, tokens=tokens, trained_tokens=tokens, metrics={}
        )

    async def publish(self, student: Any, version: int) -> ports.PublishReport:
        """The engine writes with the table of now."""
        student.table, student.version = self.table, version
        return ports.PublishReport(version=version, gap=0.0, nbytes=self.table.nbytes)


@dataclass
class TablePrompts:
    """`GROUP` samples after each of four tokens."""

    group_size: int = GROUP

    def __call__(self, step: int, sources: ports.Sources) -> Sequence[Prompt]:
        """The prompts of a step."""
        starts = [np.array([(4 * step + i) % V], dtype=np.int32) for i in range(4)]
        return [Prompt(id=f"{step}/{s[0]}", student_ids=s, teacher_ids=s) for s in starts for _ in range(GROUP)]


def reverse_kl(student: Tensor, teacher: Tensor) -> float:
    """KL(student || teacher), mean over states, in nats."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def with_fakes(steps: int = 60) -> tuple[float, float]:
    """Reverse KL of the table before and after `steps` steps."""
    start, teacher = torch.randn(2, V, V, generator=torch.Generator().manual_seed(0)).double() * 1.5
    rollout: Any = StudentRollout(max_tokens=LENGTH)
    scorer: Any = SampledTokens()
    objective: Any = SampledReverseKL()
    method = Method(name="one_file", rollout=rollout, scorer=scorer, objective=objective)
    tokenizer: Any = None  # nothing here is text
    engines = ports.Engines(
        student=TableEngine(start),
        teachers={"default": TableEngine(teacher)},
        writers={},
        graders={},
        tokenizer=tokenizer,
    )
    learner: Any = TableLearner(start)
    sources = ports.Sources(tokenizer=tokenizer, rows=lambda *_: ())
    prompts: Any = TablePrompts()
    asyncio.run(distill(method, prompts, sources, engines, learner, steps))
    return reverse_kl(start, teacher), reverse_kl(learner.table, teacher)


# --- Then with the real parts: vLLM writes, a pool of teachers scores, DeepSpeed learns. ------------------------------


def with_real_parts(steps: int = 3) -> Sequence[Mapping[str, float]]:
    """Loss and reverse KL of every step of the demo (`experiment=shop`)."""
    from launch.config.run_config import run_config
    from launch.plan.plan import make_plan
    from launch.run.session import open_session
    from launch.services.ray_session.cluster import connected

    config = run_config(["experiment=shop", f"steps={steps}", "prompts.prompts_per_step=16"])
    plan = make_plan(config)

    async def train() -> list[StepReport]:
        session = await open_session(plan)
        try:
            return await distill(
                plan.config.method, plan.config.prompts, plan.sources, session.engines, session.learner, steps
            )
        finally:
            session.close()

    with connected(plan.config.cluster):
        reports = asyncio.run(train())
    return [{"loss": report.loss, "reverse_kl": report.metrics["reverse_kl"]} for report in reports]


if __name__ == "__main__":
    if sys.argv[1:] == ["real"]:
        for number, values in enumerate(with_real_parts(), 1):
            print(f"step {number}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    else:
        print("reverse KL {:.3f} before, {:.3f} after 60 steps".format(*with_fakes()))
