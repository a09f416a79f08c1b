"""Model card of an exported student, from its run directory alone."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf.digest import model_digest
from launch.artifacts.evaluation_point import MAIN, EvaluatedModel, EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.untrusted_files import read_yaml
from launch.config.settings import place_of
from launch.config.shipped_files import first_sentence, option_files
from launch.config.typed import construct
from launch.plan.environment import package_versions
from launch.plan.hub import HubInput, recorded_in
from opd.errors import OpdError
from opd.evaluation.estimates import LEVEL
from opd.method.method import Method

_LICENSE = (
    "None is stated here. The terms of the base model, of the teacher and of the data say what may be done with this "
    "model; read them before publishing it, and add `license:` to the head of this file."
)
_MEASURES = ("greedy", "mean_at_k", "pass_at_k", "k", "reverse_kl", "length_mean", "truncation_rate")
_HEADINGS = ("greedy accuracy", "mean@k", "pass@k", "k", "reverse KL", "mean length", "truncated")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Facts of a student: `hub` has its inputs that have names there, `step` the training step that it is of."""

    name: str
    step: int
    settings: Mapping[str, Any]
    hub: Mapping[str, HubInput]
    method: str
    promise: str
    points: Sequence[EvaluationPoint]
    on_sets: Sequence[EvaluationPoint]
    command: str
    versions: Mapping[str, str]
    versions_of: str


def facts_of(directory: RunDirectory, step: int | None) -> CardFacts:
    """Facts of the student of a run after `step`, None = as it ended.

    Raises:
        DataError: a file of the run is damaged.
    """
    data = RunData.read(directory)
    settings = read_yaml(directory.config, "give the directory of a run")
    done = data.summary.steps if data.summary is not None else max((p.step for p in data.student), default=0)
    at = done if step is None else step
    points = [point for point in data.by_set.get(MAIN, ()) if point.step <= at]
    return CardFacts(
        name=directory.name,
        step=at,
        settings=settings,
        hub=recorded_in(directory.path),
        method=_method(settings),
        promise=_promise(settings),
        points=[*points, *([data.teacher_on[MAIN]] if MAIN in data.teacher_on else [])],
        on_sets=[
            *(found[-1] for of in data.by_set.values() if (found := [p for p in of if p.set and p.step <= at])),
            *(point for name, point in data.teacher_on.items() if name),
        ],
        command=directory.command.read_text().strip() if directory.command.exists() else "",
        versions=data.summary.versions if data.summary is not None else package_versions(),
        versions_of="of the run" if data.summary is not None else "where it was exported",
    )


def _method(settings: Mapping[str, Any]) -> str:
    name = str(settings.get("method", {}).get("name", ""))
    file = option_files("")["method"].get(name)
    return f"`{name}`: {first_sentence(file)}" if file is not None else f"`{name}`, a method of its author's own"


def _promise(settings: Mapping[str, Any]) -> str:
    """Promise of the objectives: the divergence whose gradient theirs is on average, as `opd certify` checks."""
    try:
        method = construct(Method, settings.get("method"), "method", settings.get("allow_targets") or [])
    except OpdError:
        return "a part of the method is not at hand where this was exported, so it is not known here"
    terms = method.every_term
    promises = {name: str(getattr(term.objective, "promise", "none declared")) for name, term in terms.items()}
    if len(terms) == 1:
        return next(iter(promises.values()))
    return " + ".join(f"{name}: {terms[name].coefficient} * {promise}" for name, promise in promises.items())


def card(facts: CardFacts) -> str:
    """The card in Markdown, with the head that the hub reads."""
    models = {key: one for key, one in facts.hub.items() if not key.endswith("prompts.path") and ".sources." not in key}
    data = sorted({_repository(one) for key, one in facts.hub.items() if key not in models})
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["on-policy-distillation", "opd"]}
    if "student.path" in models:
        head |= {"base_model": _repository(models["student.path"]), "base_model_relation": "finetune"}
    if data:
        head["datasets"] = data
    lines = ["---", *yaml.safe_dump(head, sort_keys=False, allow_unicode=True).splitlines(), "---", ""]
    lines += [f"# {facts.name}", "", "A student trained by on-policy distillation with `opd`.", ""]
    lines += _table(("", ""), _facts(facts).items())
    lines += [part for note in facts.settings.get("notes") or () for part in ("", str(note))]
    lines += ["", "## Measured", "", *_measured(facts)]
    lines += ["", "## To repeat it", "", *_repeat(facts), "", "## License", "", _LICENSE]
    lines += ["", f"## Versions ({facts.versions_of})", "", *_table(("package", "version"), facts.versions.items())]
    return "\n".join(lines) + "\n"


def _repository(one: HubInput) -> str:
    return one.pinned.partition("@")[0].partition(":")[0]


def _facts(facts: CardFacts) -> Mapping[str, str]:
    settings = facts.settings
    teachers = {"teacher": settings.get("teacher"), **{f"teachers.{n}": t for n, t in _mapping(settings, "teachers")}}
    learner, lora = settings.get("learner") or {}, (settings.get("learner") or {}).get("lora") or {}
    adapters = f", adapters of rank {lora['r']} merged into it" if lora.get("r") else ""
    return {
        "run": facts.name,
        "base model": _model(facts, "student.path", settings.get("student")) + adapters,
        **{key: _model(facts, f"{key}.path", given) for key, given in teachers.items()},
        "method": facts.method,
        "promise of its gradient": f"`{facts.promise}`",
        **{place: _prompts(facts, place, node) for place, node in _sources(settings)},
        "steps": f"{facts.step} of {settings.get('steps')}",
        "learning rate": f"{learner.get('lr')} ({learner.get('schedule') or 'default schedule'})",
        "seed": str(settings.get("seed")),
    }


def _mapping(settings: Mapping[str, Any], key: str) -> Sequence[tuple[str, Any]]:
    return list((settings.get(key) or {}).items())


def _sources(settings: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """Prompt sources by their settings, those of a mixture one by one."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    evaluation = settings.get("evaluation") or {}
    for place, node in (
        ("prompts", settings.get("prompts")),
        ("evaluation.prompts", evaluation.get("prompts")),
        *((place_of(name), (one or {}).get("prompts")) for name, one in (evaluation.get("sets") or {}).items()),
    ):
        if place != "prompts" and node is None:
            continue
        inner = (node or {}).get("sources")
        mixed = [(f"{place}.sources.{name}", one) for name, one in inner.items()] if isinstance(inner, Mapping) else []
        found += mixed or [(place, node or {})]
    return found


def _model(facts: CardFacts, key: str, given: Any) -> str:
    """Name of a model on the hub, or else the digest of its weights."""
    if key in facts.hub:
        return f"`{facts.hub[key].pinned}`"
    path = str((given or {}).get("path", ""))
    url = (given or {}).get("url")
    digest = model_digest(path) if Path(path).is_dir() else ""
    known = f"xxh3-128 of its weights {digest}" if digest else "its weights are not at hand where this was exported"
    return f"`{Path(path).name}`, a folder of its author's ({known})" + (", served elsewhere" if url else "")


def _prompts(facts: CardFacts, place: str, node: Mapping[str, Any]) -> str:
    if f"{place}.path" in facts.hub:
        return f"`{facts.hub[f'{place}.path'].pinned}`"
    if path := node.get("path"):
        return f"`{Path(str(path)).name}`, a file or folder of its author's"
    return f"`{str(node.get('_target_', '')).rpartition('.')[2] or 'unknown'}`, made as they are needed"


def _measured(facts: CardFacts) -> Sequence[str]:
    """Evaluations as they were written down; of a student between two of them that it was not measured."""
    students = [point for point in facts.points if point.examinee is EvaluatedModel.STUDENT]
    shown = [students[0], *([students[-1]] if len(students) > 1 else [])] if students else []
    shown += [point for point in facts.points if point.examinee is EvaluatedModel.TEACHER]
    if not shown:
        return _on_sets(facts) or ["Nothing was measured."]
    rows = [(_whose(point), *(_number(point, name) for name in _MEASURES)) for point in shown]
    lines = list(_table(("", *_HEADINGS), rows))
    if not students or students[-1].step != facts.step:
        lines += ["", f"The student after step {facts.step}, which this is, was not measured itself."]
    return [
        *lines,
        "",
        "On the held-out prompts named above, graded by the run. Reverse KL is in nats per token of the model's own "
        "answers; k samples are drawn at temperature 1.",
        *(["", *_on_sets(facts)] if facts.on_sets else []),
    ]


def _on_sets(facts: CardFacts) -> Sequence[str]:
    """Newest evaluations on named sets with intervals and samplers; empty without any."""
    rows = [
        (point.set, _whose(point), name, f"{e.value:.4g}", f"{e.low:.4g} to {e.high:.4g}", _sampler(point))
        for point in facts.on_sets
        for name, e in point.estimates.items()
    ]
    heads = ("set", "model", "measure", "value", f"{LEVEL:.0%} interval", "problems, samples, temperature, top-p")
    return [*_table(heads, rows)] if rows else []


def _sampler(point: EvaluationPoint) -> str:
    return f"{point.problems}, {point.k}, {point.temperature:g}, {point.top_p:g}"


def _whose(point: EvaluationPoint) -> str:
    return "teacher" if point.examinee is EvaluatedModel.TEACHER else f"student after step {point.step}"


def _number(point: EvaluationPoint, name: str) -> str:
    value = point.as_json()[name]
    return "not measured" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _repeat(facts: CardFacts) -> Sequence[str]:
    if not facts.command:
        return ["The command was not recorded."]
    kept = [part for part in shlex.split(facts.command) if not part.startswith(("run_name=", "output_dir=", "resume="))]
    return ["```", shlex.join(kept), "```"]


def _table(heads: Sequence[str], rows: Any) -> Sequence[str]:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
