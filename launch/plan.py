"""Everything that can be known before anything is started: checked, and shown as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.table import Table
from safetensors import safe_open

from launch.config import RunConfig
from launch.data import read_rows
from launch.tokenizer import HuggingFaceTokenizer
from opd.devices import Dtype
from opd.errors import ConfigurationError, DataError
from opd.ports import LastHidden, Sources
from opd.types import HiddenScores, Prompt, VocabularyScores
from teacher_service.config import REMOTE, check_answers
from teacher_service.identity import check_checkpoint, compare, tokenizer_identity

GIB = 2**30
ADAM_BYTES = 12  # float32 gradient and two moments per parameter
TASKS = ("shop", "math")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will be made of.

    `exact_kl` = the exact divergence can be measured: equal vocabularies of logits, a teacher that gives hidden
    states, and its output matrix here. `teacher_params` is 0 for a remote teacher without weights here.
    """

    config: RunConfig
    sources: Sources
    student_params: int
    teacher_params: int
    longest: int
    exact_kl: bool

    def memory_bytes(self) -> Mapping[str, int]:
        """Estimated bytes of one process per role, engines' caches included, libraries not."""
        config = self.config
        width = 2 if config.learner.dtype is Dtype.BFLOAT16 else 4
        shards = config.learner.ranks if config.learner.zero_stage == 3 else 1
        vocabulary = vocabulary_rows(config.student.path)
        return {
            "rollout actor": self.student_params * width + config.student.kv_cache_bytes,
            "teacher actor": self.teacher_params * width,
            "learner rank": self.student_params * (width + ADAM_BYTES + 4 * (width == 2)) // shards
            + 4 * 4 * config.learner.head_chunk * vocabulary,
        }

    def table(self) -> Table:
        """The plan for people."""
        config, memory = self.config, self.memory_bytes()
        table = Table(title=f"plan: {config.method.name}, {config.steps} steps", show_header=True)
        for heading in ("role", "processes", "what", "memory each (estimate)"):
            table.add_column(heading)
        rows = [
            ("rollout actor", config.student.replicas, f"vLLM, {self.student_params / 1e6:.2f}M parameters"),
            ("teacher actor", config.teacher.replicas, f"{self.teacher_params / 1e6:.2f}M parameters"),
            ("learner rank", config.learner.ranks, f"DeepSpeed ZeRO-{config.learner.zero_stage}"),
        ]
        for role, count, what in rows:
            table.add_row(role, str(count), what, f"{memory[role] / GIB:.3f} GiB")
        method = config.method
        parts = (method.rollout, method.scorer, *method.weights.values(), method.objective, method.update)
        table.add_section()
        table.add_row("method", "", " -> ".join(type(p).__name__ for p in parts), "")
        table.add_row("longest", "", f"{self.longest} tokens of {config.student.max_model_len}", "")
        table.add_row("cluster", "", f"{config.cluster.address}, placement {config.cluster.placement.name}", "")
        return table


def parameter_count(path: str) -> int:
    """Parameters in a folder's safetensors (tied ones once)."""
    total = 0
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def vocabulary_rows(path: str) -> int:
    """Rows of the output matrix, padding included."""
    config = json.loads((Path(path) / "config.json").read_text())
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def make_plan(config: RunConfig) -> Plan:
    """Check checkpoints, tokenizers, prompts and sizes; raises one sentence about the first thing wrong."""
    check_checkpoint(config.student.path, "student")
    _check_teacher(config)
    compare(tokenizer_identity(config.student.path), tokenizer_identity(config.teacher.path))
    rows = {role: vocabulary_rows(getattr(config, role).path) for role in ("student", "teacher")}
    same_rows = rows["student"] == rows["teacher"]
    said = config.method.scorer.produces
    if not same_rows and issubclass(said, HiddenScores) and config.method.objective.consumes is VocabularyScores:
        raise ConfigurationError(
            f"method {config.method.name} compares whole vocabularies, but the student's output has "
            f"{rows['student']} rows and the teacher's {rows['teacher']} (padded differently); use a top-k method "
            "such as method=topk_reverse_kl"
        )
    sources = Sources(tokenizer=HuggingFaceTokenizer(config.student.path), rows=read_rows)
    asked = [*config.prompts(0, sources), *config.evaluation.prompts(0, sources)]
    longest = _check_lengths(config, asked)
    _check_tasks(asked)
    teacher_params = parameter_count(config.teacher.path)
    return Plan(
        config=config,
        sources=sources,
        student_params=parameter_count(config.student.path),
        teacher_params=teacher_params,
        longest=longest,
        exact_kl=same_rows and LastHidden in config.teacher.answers and teacher_params > 0,
    )


def _check_teacher(config: RunConfig) -> None:
    """The method's questions can be answered, and the weights are here if a part of the run reads them here."""
    asks, remote = config.method.scorer.asks, config.teacher.backend in REMOTE
    check_answers(config.teacher, asks, f"method {config.method.name}")
    if not remote or LastHidden in asks or config.method.rollout.needs_writer:
        check_checkpoint(config.teacher.path, "teacher")


def _check_lengths(config: RunConfig, prompts: Sequence[Prompt]) -> int:
    worst = max(prompts, key=lambda p: len(p.student_ids))
    longest = len(worst.student_ids) + max(config.max_tokens, config.evaluation.max_tokens)
    if longest > config.student.max_model_len:
        raise ConfigurationError(
            f"prompt {worst.id!r} has {len(worst.student_ids)} tokens and max_tokens is {config.max_tokens}, but "
            f"student.max_model_len is {config.student.max_model_len}; raise it to {longest} or lower max_tokens"
        )
    if longest > config.learner.tokens_per_microbatch:
        raise ConfigurationError(
            f"a sequence may have {longest} tokens, but learner.tokens_per_microbatch is "
            f"{config.learner.tokens_per_microbatch}; raise it to at least {longest}"
        )
    return longest


def _check_tasks(prompts: Sequence[Prompt]) -> None:
    unknown = {p.task for p in prompts} - set(TASKS)
    if unknown:
        raise DataError(f"no grader is called {sorted(unknown)[0]!r}; set prompts.task to one of {list(TASKS)}")
