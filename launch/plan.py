"""Everything that can be known before anything is started: checked, and shown as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from rich.table import Table
from safetensors import safe_open

from launch.config import DEFAULT, RunConfig
from launch.data import read_rows
from launch.tokenizer import HuggingFaceTokenizer
from launch.transports import check_transport
from learner.liger import with_kernel
from opd.devices import Dtype
from opd.errors import ConfigurationError, DataError
from opd.ports import LastHidden, Routed, Sources
from opd.scorers.ensemble import Ensemble
from opd.types import Prompt, VocabularyScores
from opd.weights.special import look_up
from teacher_service.config import REMOTE, TeacherConfig, check_answers
from teacher_service.identity import check_checkpoint, compare, tokenizer_identity

GIB = 2**30
ADAM_BYTES = 12  # float32 gradient and two moments per parameter
TASKS = ("shop", "peak", "math")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will be made of.

    `exact_kl` = the exact divergence can be measured: student and all teachers have equal vocabularies of logits, and
    every teacher gives hidden states and has its output matrix here. A remote teacher without weights here counts 0
    parameters. `vocabulary` counts the ids of the tokenizer, without the model's padding.
    """

    config: RunConfig
    sources: Sources
    student_params: int
    teacher_params: Mapping[str, int]
    longest: int
    vocabulary: int
    exact_kl: bool

    def memory_bytes(self) -> Mapping[str, int]:
        """Estimated bytes of one process per role, engines' caches included, libraries not."""
        config = self.config
        width = 2 if config.learner.dtype is Dtype.BFLOAT16 else 4
        shards = config.learner.ranks if config.learner.zero_stage == 3 else 1
        # Of adapters' own state nothing is counted: it is a percent or so of the model's.
        state = 0 if config.learner.lora.r else ADAM_BYTES + 4 * (width == 2)
        vocabulary = vocabulary_rows(config.student.path)
        heads = sum(vocabulary * hidden_width(t.path) * width for t in config.teachers.values()) * self.exact_kl
        return {
            "rollout actor": self.student_params * width + config.student.kv_cache_bytes,
            **{_role(name): params * width for name, params in self.teacher_params.items()},
            "learner rank": self.student_params * (width + state) // shards
            + 4 * 4 * config.learner.head_chunk * vocabulary
            + heads,
        }

    def table(self) -> Table:
        """The plan for people."""
        config, memory = self.config, self.memory_bytes()
        adapters = f", adapters of rank {config.learner.lora.r}" if config.learner.lora.r else ""
        table = Table(title=f"plan: {config.method.name}, {config.steps} steps", show_header=True)
        for heading in ("role", "processes", "what", "memory each (estimate)"):
            table.add_column(heading)
        rows = [
            ("rollout actor", config.student.replicas, f"vLLM, {self.student_params / 1e6:.2f}M parameters"),
            *(
                (_role(name), config.teachers[name].replicas, f"{params / 1e6:.2f}M parameters")
                for name, params in self.teacher_params.items()
            ),
            ("learner rank", config.learner.ranks, f"DeepSpeed ZeRO-{config.learner.zero_stage}{adapters}"),
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
    return _size(path, "vocab_size")


def hidden_width(path: str) -> int:
    """Columns of the output matrix."""
    return _size(path, "hidden_size")


def _size(path: str, name: str) -> int:
    config = json.loads((Path(path) / "config.json").read_text())
    return int(config.get(name) or config["text_config"][name])


def _role(teacher: str) -> str:
    return "teacher actor" if teacher == DEFAULT else f"teacher actor {teacher!r}"


def make_plan(config: RunConfig) -> Plan:
    """Check checkpoints, tokenizers, prompts and sizes; raises one sentence about the first thing wrong."""
    check_transport(config)
    with_kernel(config.learner.loss_kernel, config.method.objective)
    _check_adapters(config)
    check_checkpoint(config.student.path, "student")
    exact_kl = _check_teachers(config)
    tokens = tokenizer_identity(config.student.path).tokens
    config = replace(config, method=replace(config.method, weights=look_up(config.method.weights, tokens)))
    sources = Sources(tokenizer=HuggingFaceTokenizer(config.student.path), rows=read_rows)
    asked = [*config.prompts(0, sources), *config.evaluation.prompts(0, sources)]
    longest = _check_lengths(config, asked)
    _check_tasks(asked)
    _check_routes(config, sources, asked)
    return Plan(
        config=config,
        sources=sources,
        student_params=parameter_count(config.student.path),
        teacher_params={name: parameter_count(t.path) for name, t in config.teachers.items()},
        longest=longest,
        vocabulary=1 + max(tokens.values()),
        exact_kl=exact_kl,
    )


def _check_adapters(config: RunConfig) -> None:
    following = [name for name, teacher in config.teachers.items() if teacher.mixup]
    if config.learner.lora.r and following:
        raise ConfigurationError(
            f"teacher {following[0]!r} follows the student's weights (mixup), but with learner.lora.r="
            f"{config.learner.lora.r} only adapters are published; set its mixup to 0, or learner.lora.r=0"
        )


def _check_teacher(config: RunConfig, name: str, teacher: TeacherConfig) -> None:
    """The method's questions can be answered, and the weights are here if a part of the run reads them here."""
    asks, remote = config.method.scorer.asks, teacher.backend in REMOTE
    check_answers(teacher, asks, f"method {config.method.name}")
    if not remote or LastHidden in asks or config.method.rollout.needs_writer:
        check_checkpoint(teacher.path, "teacher" if name == DEFAULT else f"teachers.{name}")


def _check_teachers(config: RunConfig) -> bool:
    """Refuse a teacher whose tokens are not the student's; whether all have the student's vocabulary of logits."""
    student, rows = tokenizer_identity(config.student.path), vocabulary_rows(config.student.path)
    said, wanted = config.method.scorer.produces, config.method.objective.consumes
    exact = True
    for name, teacher in config.teachers.items():
        _check_teacher(config, name, teacher)
        compare(student, tokenizer_identity(teacher.path))
        theirs = vocabulary_rows(teacher.path)
        exact &= theirs == rows and LastHidden in teacher.answers and parameter_count(teacher.path) > 0
        if theirs != rows and wanted is VocabularyScores and not issubclass(said, VocabularyScores):
            whose = "the teacher's" if name == DEFAULT else f"that of teacher {name!r}"
            raise ConfigurationError(
                f"method {config.method.name} compares whole vocabularies, but the student's output has {rows} rows "
                f"and {whose} {theirs} (padded differently); use a top-k method such as method=topk_reverse_kl"
            )
    return exact


def _check_routes(config: RunConfig, sources: Sources, asked: Sequence[Prompt]) -> None:
    """Refuse a teacher that somebody asks for and the run does not have, before anything is started."""
    first = {p.teacher: f"prompt {p.id!r}" for p in reversed(asked)}
    for place, source in (("prompts", config.prompts), ("evaluation.prompts", config.evaluation.prompts)):
        if isinstance(source, Routed):
            first = dict.fromkeys(source.routes(sources), place) | first
    if isinstance(config.method.scorer, Ensemble):
        first |= dict.fromkeys(config.method.scorer.shares, "method.scorer")
    unknown = sorted(first.keys() - config.teachers.keys())
    if unknown:
        raise ConfigurationError(
            f"{first[unknown[0]]} asks for teacher {unknown[0]!r}, but the run has {sorted(config.teachers)}; name one "
            f"of those, or add it with teachers.{unknown[0]}.path=..."
        )


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
