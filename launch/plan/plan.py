"""Plan of a run: everything that can be known before anything is started, checked and shown as a table."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hf.folder_check import Folder
from hf.tokenizer import HuggingFaceTokenizer
from hf.tokenizer_check import check_checkpoint, tokenizer_identity
from launch.config.run_config import RunConfig
from launch.inputs.few_shot import read_examples
from launch.inputs.prompt_files import read_rows
from launch.plan.checks.answers import check_answers
from launch.plan.checks.architectures import check_contexts, check_followers, check_ids, check_student, check_teacher
from launch.plan.checks.blends import check_blends, check_one_context
from launch.plan.checks.conversations import check_conversations, check_openings, teachers_tokenizers
from launch.plan.checks.devices import automatic, gpus, resolved, undecided, unseen_notes, visible_gpus
from launch.plan.checks.ends import text_ends
from launch.plan.checks.engines import engine_notes
from launch.plan.checks.methods.meaning import check_meaning
from launch.plan.checks.models import parameter_count
from launch.plan.checks.numbers import check_numbers, decided_notes, numbers_notes, processor_notes
from launch.plan.checks.prompts import (
    HeldOut,
    Lengths,
    check_lengths,
    check_routes,
    check_rows,
    check_templates,
    remarks,
)
from launch.plan.checks.settings import check_settings, check_shares, settings_notes
from launch.plan.checks.survey import Survey, survey_all, survey_held_out
from launch.plan.checks.tasks import check_tasks
from launch.plan.checks.teachers import (
    check_adapters,
    check_embeddings,
    check_names,
    check_teachers,
    unmeasured_notes,
    unread_notes,
)
from launch.plan.environment import check_folder, check_interpreter, check_temporary_folder
from launch.plan.hub import HubInput, localized
from launch.plan.hub import remarks as hub_remarks
from launch.plan.lr_curve import BLOCKS, PLAIN, rate_curve
from launch.plan.memory.cards import lines
from launch.plan.memory.footprint import peak
from launch.plan.memory.parts import Part, card_bytes, of_teacher, parts
from launch.plan.memory.store import capacity, store_notes
from launch.plan.sizes import LENGTH, MICROBATCH, Sized, as_recorded, with_length, with_microbatch
from launch.services.weight_transports import check_transport
from learner.liger import with_kernel
from opd.method.needs import check_spelling, needs
from opd.ports import Sources
from opd.token_weights.special_tokens import with_known_tokens
from teacher_service.config import Backend
from weight_sync import sentinel

GIB = 2**30
SHOWN = 400  # characters of a prompt at its start and at its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked run: configuration, resolved parts and estimates.

    `exact_kl` = the exact divergence can be measured: student and all teachers have equal vocabularies of logits, and
    every teacher gives hidden states and has its output matrix here. A remote teacher without weights here counts 0
    parameters. `vocabulary` counts the ids of the tokenizer, without the model's padding. `answers` says of the prompts
    that come from files how many reference answers can be graded against. `prompts` shows the
    first prompt, and `remarks` are sentences about what is no error. `undecided`: nothing says whether the run should
    use GPUs, if the cluster has some. `ends`: the ids that end a completion. `sentinel`: the text by which engines are
    checked (`weight_sync.sentinel`). `hub`: settings that name something on the hub, with the exact commits. `sizes`:
    why a size that is AUTO is what it is, by its setting.
    """

    config: RunConfig
    sources: Sources
    student_params: int
    teacher_params: Mapping[str, int]
    longest: int
    vocabulary: int
    exact_kl: bool
    answers: Mapping[str, str]
    prompts: Mapping[str, str]
    remarks: Sequence[str]
    undecided: bool = False
    ends: tuple[int, ...] = ()
    sentinel: tuple[int, ...] = ()
    hub: tuple[HubInput, ...] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)

    def writes(self, name: str) -> bool:
        """Whether a teacher can generate text: its endpoint does, or its weights are here."""
        return self.config.teachers[name].backend is Backend.OPENAI or self.teacher_params[name] > 0

    def memory_bytes(self) -> Mapping[str, int]:
        """Bytes of one process per role in the phase in which it needs most (`launch.plan.memory`); no libraries."""
        remote = dict.fromkeys(map(of_teacher, self.teacher_params), 0)
        return remote | {part.name: peak(part.role).total for part in self._parts()}

    def _parts(self) -> Sequence[Part]:
        return parts(self.config, card_bytes(self.config), exact=self.exact_kl)

    def table(self) -> Table:
        """The plan as a table."""
        config, memory = self.config, self.memory_bytes()
        adapters = f", adapters of rank {config.learner.lora.r}" if config.learner.lora.r else ""
        trained = f"DeepSpeed ZeRO-{config.learner.stage}, {config.learner.dtype.name}{adapters}"
        table = Table(title=f"plan: {config.method.name}, {config.steps} steps", show_header=True)
        for heading in ("role", "processes", "what", "memory each, at most"):
            table.add_column(heading)
        rows = [
            ("rollout actor", config.student.replicas, f"vLLM, {self.student_params / 1e6:.2f}M parameters"),
            *(
                (of_teacher(name), config.teachers[name].replicas, f"{params / 1e6:.2f}M parameters")
                for name, params in self.teacher_params.items()
            ),
            ("learner rank", config.learner.ranks, trained),
        ]
        for role, count, what in rows:
            table.add_row(role, str(count), what, f"{memory[role] / GIB:.3f} GiB")
        method = config.method
        terms = method.every_term.values()
        summed = [part for t in terms for part in (t.scorer, *t.weights.values(), t.objective)]
        parts = (method.rollout, *summed, method.update)
        table.add_section()
        table.add_row("method", "", " -> ".join(type(p).__name__ for p in parts), "")
        table.add_row("needs", "", ", ".join(sorted(map(str, needs(method)))), "")
        table.add_row("longest", "", f"{self.longest} tokens of {config.student.longest}{self._why(LENGTH)}", "")
        table.add_row("micro-batch", "", f"{config.learner.packed_tokens} tokens{self._why(MICROBATCH)}", "")
        for place, sentence in self.answers.items():
            table.add_row(f"{place}: answers", "", sentence, "")
        table.add_row("GPUs", "", gpus(config), "")
        for name, sentence in lines(self._parts(), card_bytes(config)).items():
            table.add_row(f"memory: {name}", "", sentence, "")
        table.add_row("cluster", "", f"{config.cluster.address}, placement {config.cluster.placement.name}", "")
        table.add_row("ends of text", "", ", ".join(map(str, self.ends)), "")
        return table

    def _why(self, setting: str) -> str:
        return f" ({self.sizes[setting]})" if setting in self.sizes else ""

    def show_rate(self, console: Console) -> None:
        """Print the learning rate's curve, as wide as the terminal at most."""
        levels = BLOCKS if console.encoding.startswith("utf") else PLAIN
        for line in rate_curve(self.config.learner, self.config.steps, console.width, levels):
            console.print(line, highlight=False)

    def show_prompts(self, console: Console) -> None:
        """Print what names on the hub are here, the first prompt, and the remarks about all of them."""
        for one in self.hub:
            console.print(f"{one.setting}: {one}", highlight=False, soft_wrap=True)
        for name, text in self.prompts.items():
            console.print(f"{name}: {text}", highlight=False, soft_wrap=True)
        for remark in self.remarks:
            console.print(remark, highlight=False, soft_wrap=True)


def make_plan(config: RunConfig) -> Plan:
    """Plan of a run: checks checkpoints, tokenizers, prompts and sizes; raises one sentence about the first error."""
    placed = _placed(config)
    config = placed.config
    with_kernel(config.learner.loss_kernel, config.method.loss)
    check_adapters(config)
    check_names(config)
    check_numbers(config)
    check_checkpoint(config.student.path, "student")
    check_blends(config)
    check_embeddings(config)
    exact_kl = check_teachers(config)
    student = check_student(config)
    length = with_length(config, student)
    config = length.config
    teachers = {name: check_teacher(config, name) for name in config.teachers}
    check_followers(config, student, teachers)
    exact_kl &= all(teacher.causal.get_output_embeddings().bias is None for teacher in teachers.values())
    check_settings(config)
    tokens = tokenizer_identity(config.student.path).tokens
    config = replace(config, method=with_known_tokens(config.method, tokens))
    tokenizer = HuggingFaceTokenizer(config.student.path)
    check_spelling(config.method, tokenizer)
    sources = _sources(config, tokenizer)
    ends = text_ends(config.student.path, tokenizer, config.teachers)
    training = survey_all(config.prompts, sources, tokenizer)
    held_out = survey_held_out(config.evaluation, sources, tokenizer)
    lengths = _lengths(config, [student, *teachers.values()], training, held_out, tokenizer)
    sizes = _sized(config, placed, length, lengths.scored, exact=exact_kl)
    config = sizes.config
    check_shares(config, training)
    check_one_context(config, training)
    notes = _remarks(config, placed, training, held_out, tokenizer)
    answers = check_answers(config, sources, held_out)
    check_routes(config, sources, training, held_out)
    check_rows(config, sources, training)
    template_notes = _template_notes(config, training)
    return Plan(
        config=config,
        sources=sources,
        student_params=parameter_count(config.student.path),
        teacher_params={name: parameter_count(t.path) for name, t in config.teachers.items()},
        longest=lengths.all,
        vocabulary=1 + max(tokens.values()),
        exact_kl=exact_kl,
        undecided=placed.undecided,
        answers=answers,
        prompts=_shown(training, tokenizer),
        remarks=[
            *sizes.notes,
            *remarks(config, training, held_out, template_notes, dated=tokenizer.dated),
            *ends.notes,
            *notes,
            *_notes(config, student, teachers),
        ],
        ends=ends.ids,
        hub=placed.hub,
        sizes=sizes.why,
        sentinel=_sentinel(config, training.first.student_ids, 1 + max(tokens.values())),
    )


def _remarks(
    config: RunConfig, placed: "_Placed", training: Survey, held_out: HeldOut, tokenizer: HuggingFaceTokenizer
) -> list[str]:
    """Remarks of checks of the tasks, of what is on the hub, and of what the method would train."""
    chats = (found.chats for found in (training, *held_out.values()))
    check_openings(config, tokenizer, next((kind.first for kind in chats if kind.count), ""))
    tasks = check_tasks(config, training, held_out)
    return [*tasks, *hub_remarks(config, placed.hub), *check_meaning(config, training, tokenizer)]


def _notes(config: RunConfig, student: Folder, teachers: Mapping[str, Folder]) -> list[str]:
    """Remarks on what is no error, by settings and folders alone."""
    return [
        *numbers_notes(config),
        *processor_notes(config, student, teachers),
        *store_notes(config, capacity()),
        *settings_notes(config),
        *unread_notes(config),
        *unmeasured_notes(config),
        *engine_notes(config, student),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """Configuration with models from the hub in place and a device for every part, with `notes` on both.

    `kept`: why a size that was AUTO is a number already, by its setting.
    """

    config: RunConfig
    hub: tuple[HubInput, ...]
    notes: tuple[str, ...]
    undecided: bool
    kept: Mapping[str, str]


def _placed(config: RunConfig) -> _Placed:
    check_interpreter(os.environ)
    check_folder(Path.cwd())
    check_temporary_folder(os.environ, local=config.cluster.address == "local")
    open_device = config.cluster.address != "local" and undecided(config)
    unseen = unseen_notes(config)
    if not automatic(config, visible_gpus(config)):  # before anything is fetched
        check_transport(config)
    found = as_recorded(config)
    placed, hub = localized(resolved(found.config))
    notes = (*unseen, *decided_notes(config, placed))
    return _Placed(config=placed, hub=hub, notes=notes, undecided=open_device, kept=found.why)


def _sized(config: RunConfig, placed: _Placed, length: Sized, longest: int, *, exact: bool) -> Sized:
    """`config` with a layout and micro-batches for it; notes and reasons are those of all that was decided so far."""
    found = with_microbatch(config, longest, exact=exact, kept=placed.kept.get(MICROBATCH, ""))
    notes = (*placed.notes, *length.notes, *found.notes)
    return replace(found, notes=notes, why={**length.why, **found.why, **placed.kept})


def _template_notes(config: RunConfig, training: Survey) -> list[str]:
    """Remarks about chat templates that differ."""
    identities = {name: tokenizer_identity(t.path) for name, t in config.teachers.items()}
    return check_templates(config, tokenizer_identity(config.student.path), identities, training)


def _lengths(
    config: RunConfig, models: Sequence[Folder], training: Survey, held_out: HeldOut, tokenizer: HuggingFaceTokenizer
) -> Lengths:
    """Lengths of the longest sequences that a run may have, after a check that every model can read them."""
    lengths = check_lengths(config, training, held_out, tokenizer)
    teachers = dict(zip(config.teachers, models[1:], strict=True))
    check_contexts(config, teachers, lengths.of_teachers, training, *held_out.values())
    check_ids(models, training, *held_out.values())
    return lengths


def _sources(config: RunConfig, tokenizer: HuggingFaceTokenizer) -> Sources:
    """Inputs of prompt sources, after a check of what is put around prompts."""
    teachers = teachers_tokenizers(config)
    check_conversations(config, tokenizer, teachers)
    return Sources(tokenizer=tokenizer, rows=read_rows, examples=read_examples, teachers=teachers)


def _sentinel(config: RunConfig, prompt: np.ndarray, vocabulary: int) -> tuple[int, ...]:
    return tuple(sentinel.text(prompt.tolist(), vocabulary, config.student.longest).tolist())


def _shown(found: Survey, tokenizer: HuggingFaceTokenizer) -> Mapping[str, str]:
    """The first prompt as student and teacher read it, and how many there are."""
    prompt = found.first
    mine, its = tokenizer.visible(prompt.student_ids), tokenizer.visible(prompt.teacher_ids)
    return {
        "prompts": f"{found.total} rows" if found.total else "made or read as they are needed",
        "first prompt": _cut(mine),
        "for the teacher": "the same" if np.array_equal(prompt.student_ids, prompt.teacher_ids) else _cut(its),
        "its answer": _cut(prompt.answer) or "none",
    }


def _cut(text: str) -> str:
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"
