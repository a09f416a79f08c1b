"""Checks across settings: bounds that another part of the run, or a model folder, sets."""

from collections.abc import Iterator, Mapping
from math import floor
from typing import Any

from hf.folder import read_headers
from launch.artifacts.checkpoint_state import described
from launch.config.run_config import RunConfig, teacher_key
from launch.config.settings import Sharing
from launch.plan.checks.devices import gpus_of_teacher
from launch.plan.checks.models import vocabulary_rows
from launch.plan.checks.survey import Survey
from launch.plan.checks.trackers import check_trackers
from learner.config import learning_rate
from learner.schedule import Schedule
from opd.errors import ConfigurationError
from opd.method.needs import needed
from opd.method.terms import MAIN, Term
from opd.objectives.truncated import TruncatedRatio
from opd.ports import AtIds, Role, TopK
from opd.settings.devices import Device
from opd.settings.ranges import AtMost
from opd.settings.validation import parts_of, walk
from opd.token_weights.teachers import TeacherBalance
from teacher_service.config import OWN_ENGINE, REMOTE, Backend

SHORT = 10  # updates; the shipped warm-up, which a trial run of fewer steps need not set, too
MOST_PROMPTS = 1 << 20  # of one step, every sample of a group counted
ALL_LINEAR = "all-linear"


def check_settings(config: RunConfig) -> None:
    """Refuse settings that contradict each other; reads the headers of the student's folder and no weights."""
    check_trackers(config.tracker)
    _check_schedule(config)
    _check_prompts_per_step(config)
    _check_bounds(config)
    _check_max_k(config)
    check_devices(config)
    _check_step_tokens(config)
    _check_scheduling(config)
    _check_servers(config)
    if config.learner.lora.r:
        _check_adapters(config)


def settings_notes(config: RunConfig) -> list[str]:
    """Notes on settings that may be unintended."""
    return [*schedule_notes(config), *text_notes(config)]


def text_notes(config: RunConfig) -> list[str]:
    r"""Notes on texts with a backslash and an n in them, which are no line end: overrides know no such escape."""
    return [
        f"note: {name} has a backslash and an n where a line end may be meant, and that is what will be read; a shell "
        f"writes a line end as $'{name}=...\\n...', and YAML between double quotes"
        for name, value in described(config).items()
        if isinstance(value, str) and "\\n" in value
    ]


def schedule_notes(config: RunConfig) -> list[str]:
    """Notes on a learning-rate schedule that may be unintended together with the other settings."""
    learner, notes = config.learner, list[str]()
    if learner.schedule is Schedule.CONSTANT and learner.warmup_steps:
        notes.append(
            f"note: learner.schedule=CONSTANT has no warm-up, so learner.warmup_steps={learner.warmup_steps} does "
            "nothing; CONSTANT_WITH_WARMUP has one"
        )
    if learner.schedule.constant and learner.final_lr_fraction:
        notes.append(
            f"note: learner.schedule={learner.schedule.name} does not fall after the warm-up, so "
            f"learner.final_lr_fraction={learner.final_lr_fraction} does nothing"
        )
    if not any(learning_rate(learner, update, config.steps) for update in range(min(2, config.steps))):
        notes.append(
            "note: the only update of this run is the first of its warm-up, whose rate is 0, so that nothing is "
            "trained; learner.warmup_steps=0 has none"
        )
    return notes


def check_shares(config: RunConfig, training: Survey) -> None:
    """Refuse a balance of teachers that leaves one out although prompts name it: the first step would end the run."""
    for place, term in terms_by_place(config):
        for name, part in term.weights.items():
            if isinstance(part, TeacherBalance) and part.shares:
                for teacher in sorted(training.teachers.keys() - part.shares.keys()):
                    raise ConfigurationError(
                        f"{place}.weights.{name}.shares lacks teacher {teacher!r} ({training.teachers[teacher]}); set "
                        f"{place}.weights.{name}.shares.{teacher}=1"
                    )


def terms_by_place(config: RunConfig) -> list[tuple[str, Term]]:
    """Every term of the method, and where its settings stand."""
    return [
        ("method" if name == MAIN else f"method.terms.{name}", term) for name, term in config.method.every_term.items()
    ]


def _check_schedule(config: RunConfig) -> None:
    warmup, steps = config.learner.warmup_steps, config.steps
    if warmup > max(steps, SHORT):
        raise ConfigurationError(
            f"learner.warmup_steps is {warmup}, but the run has {steps} steps and would never reach learner.lr; set "
            f"learner.warmup_steps={min(SHORT, steps)} or steps={warmup} at least"
        )
    decay = config.learner.decay_steps
    if decay and warmup + decay > steps:
        fits = f"learner.decay_steps={steps - warmup} or " if steps > warmup else ""
        raise ConfigurationError(
            f"learner.decay_steps={decay} and learner.warmup_steps={warmup} are more than the {steps} steps, so that "
            f"the rate would jump from one into the other; set {fits}steps={warmup + decay}"
        )
    if config.max_staleness and config.max_staleness >= steps:
        raise ConfigurationError(
            f"max_staleness is {config.max_staleness}, but the run has {steps} steps, so that all of its text could be "
            f"the untrained student's; set max_staleness={min(1, steps - 1)} or more steps"
        )


def _check_prompts_per_step(config: RunConfig) -> None:
    for root, source in (("prompts", config.prompts), *config.evaluation.sources.items()):
        sizes: dict[str, dict[str, int]] = {}
        for name, _, value in walk(source, root):
            where, _, field = name.rpartition(".")
            if field in ("prompts_per_step", "group_size"):
                sizes.setdefault(where, {})[field] = value
        for where, size in sizes.items():
            count = size.get("prompts_per_step", 1) * size.get("group_size", 1)
            if count > MOST_PROMPTS:
                raise ConfigurationError(
                    f"{where}.prompts_per_step times {where}.group_size are {count} completions a step, of which a run "
                    f"holds at most {MOST_PROMPTS}; set "
                    f"{where}.prompts_per_step={max(1, MOST_PROMPTS // size['group_size'])} or less"
                )


def _parts(config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Every setting of the method and the learner by the name that a user gave it."""
    yield from walk(config.method.rollout, "method.rollout")
    for place, term in terms_by_place(config):
        objective = term.objective
        if isinstance(objective, TruncatedRatio):  # max_ratio put it there
            objective = objective.of
        for name, part in (("scorer", term.scorer), ("weights", term.weights), ("objective", objective)):
            yield from walk(part, f"{place}.{name}")
    yield from walk(config.learner, "learner")


def _check_bounds(config: RunConfig) -> None:
    """Check fields whose annotation has `AtMost`."""
    paths = [config.student.path, *(teacher.path for teacher in config.teachers.values())]
    vocabulary = min(vocabulary_rows(path) for path in paths)
    bounds: Mapping[str, tuple[int, str]] = {
        "vocabulary": (vocabulary, f"the vocabulary has {vocabulary} ids"),
    }
    for name, hint, value in _parts(config):
        for mark in parts_of(hint)[1]:
            if isinstance(mark, AtMost) and value > bounds[mark.fact][0]:
                most, because = bounds[mark.fact]
                raise ConfigurationError(f"{name} is {value}, but {because}; set {name}={most} or less")


def _check_max_k(config: RunConfig) -> None:
    asking = [f"{place}.scorer" for place, term in terms_by_place(config) if TopK in term.scorer.requires]
    asking += ["method.rollout"] if AtIds in config.method.requires else []
    for name, _, value in _parts(config):
        if name.endswith((".k", ".record_topk")) and name.startswith(tuple(asking)) and asking:
            for teacher, its in config.teachers.items():
                if value > its.max_k:
                    at = teacher_key(teacher)
                    raise ConfigurationError(
                        f"{name} is {value}, but {at}.max_k={its.max_k} is the most a teacher answers per "
                        f"token; set {at}.max_k={value}, or {name}={its.max_k}"
                    )


def check_devices(config: RunConfig) -> None:
    """Refuse engines that together take more of a GPU than there is of it."""
    cluster, student = config.cluster, config.student
    users = [("student", student.gpu_memory_utilization, student.replicas, cluster.gpus_per_engine)]
    users += [
        (teacher_key(name), teacher.gpu_memory_utilization, teacher.replicas, gpus_of_teacher(cluster, teacher))
        for name, teacher in config.teachers.items()
        if teacher.backend in OWN_ENGINE
    ]
    for at, share, replicas, devices in users:
        beside = min(replicas, floor(1 / devices)) if 0 < devices < 1 else 1
        if share * beside > 1:
            raise ConfigurationError(
                f"{beside} engines of {devices} devices each share one, but {at}.gpu_memory_utilization={share} is of "
                f"the whole device; set {at}.gpu_memory_utilization={floor(100 / beside) / 100}"
            )
    if cluster.share is Sharing.TIME:  # one of them is awake at a time
        return
    fractions = all(0 < devices < 1 for *_, devices in users)
    total = sum(share * replicas for _, share, replicas, _ in users)
    if fractions and sum(replicas * devices for *_, replicas, devices in users) <= 1 < total:
        raise ConfigurationError(
            f"engines of student and teachers share one device, but their gpu_memory_utilization add up to {total:g}; "
            "set student.gpu_memory_utilization and the teachers' so that they are 1 together"
        )


def _check_step_tokens(config: RunConfig) -> None:
    """Refuse steps of an engine that are too small for vLLM to start."""
    student, on_gpu = config.student, config.student.device is Device.GPU
    least = student.least_step_tokens(on_gpu=on_gpu)
    if student.step_tokens(on_gpu=on_gpu) < least:
        whole = "" if on_gpu else f", and on a processor a whole prompt (student.max_model_len={student.longest})"
        raise ConfigurationError(
            f"student.max_num_batched_tokens={student.max_num_batched_tokens} is too few: a step of an engine has a "
            f"token of each of student.max_num_seqs={student.max_num_seqs} sequences{whole}; set "
            f"student.max_num_batched_tokens={least} at least, or 0"
        )


def _check_scheduling(config: RunConfig) -> None:
    """Refuse to schedule ahead where vLLM does not, or where the next step needs the tokens of the one before it."""
    if not config.student.async_scheduling:
        return
    if config.student.device is not Device.GPU:
        raise ConfigurationError(
            "student.async_scheduling=true plans a step while a GPU computes the one before it, but these engines work "
            "on processors; leave it false"
        )
    if needed(config.method, Role.BLENDED):
        raise ConfigurationError(
            f"student.async_scheduling=true plans a step before the tokens of the one before it are known, which the "
            f"blends of method {config.method.name} read; leave it false"
        )


def _check_servers(config: RunConfig) -> None:
    """Refuse what describes a server for a teacher that is computed here: its weights would be another model's."""
    for key, teacher in config.teachers.items():
        at = teacher_key(key)
        for name, of in (("url", REMOTE), ("model", {Backend.OPENAI}), ("fingerprint", REMOTE)):
            value = getattr(teacher, name)
            if value and teacher.backend not in of:
                able = " or ".join(backend.name for backend in Backend if backend in of)
                raise ConfigurationError(
                    f"{at}.{name}={value} is of a teacher on a server, and does nothing with {at}.backend="
                    f"{teacher.backend.name}; set {at}.backend={able}, or {at}.{name}=''"
                )


def _check_adapters(config: RunConfig) -> None:
    lora, shapes = config.learner.lora, _matrices(config.student.path)
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    everything = ALL_LINEAR in lora.target_modules
    if everything and len(lora.target_modules) > 1:
        raise ConfigurationError(
            f"learner.lora.target_modules has {ALL_LINEAR} and others; set learner.lora.target_modules=[{ALL_LINEAR}], "
            "or name layers only"
        )
    chosen: dict[str, tuple[int, ...]] = {}
    for target in () if everything else lora.target_modules:
        found = {name: shape for name, shape in layers.items() if name == target or name.endswith(f".{target}")}
        if not found:
            last = sorted({name.rpartition(".")[2] for name in layers})
            raise ConfigurationError(
                f"learner.lora.target_modules names {target!r}, but no matrix of the student is called so (it has "
                f"{', '.join(last[:20])}); name some of these, or set learner.lora.target_modules=[{ALL_LINEAR}]"
            )
        if any(".experts." in name for name in found):
            raise ConfigurationError(
                f"learner.lora.target_modules names {target!r}, as matrices of experts are called, which adapters "
                "cannot change; name layers of the attention, such as q_proj, or set "
                f"learner.lora.target_modules=[{ALL_LINEAR}], which is all of these"
            )
        chosen |= found
    layers = {name: shape for name, shape in layers.items() if ".experts." not in name}
    widest = max((min(shape) for shape in (chosen or layers).values()), default=0)
    if widest and lora.r > widest:
        raise ConfigurationError(
            f"learner.lora.r is {lora.r}, but the widest matrix that it adapts has rank {widest}, so that adapters "
            f"would be larger than what they adapt; set learner.lora.r=16, or at most {widest}"
        )


def _matrices(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's matrices that are no embeddings, from the headers of its safetensors."""
    return {
        name: stored.shape
        for name, stored in sorted(read_headers(path, "student").items())
        if len(stored.shape) == 2 and name.endswith(".weight") and not any(e in name for e in ("embed", "wte", "wpe"))
    }
