"""Every setting with hostile values: `python -m tests.fuzz.overrides [count=2000] [seed=0]`.

A line is one override of a field that some shipped configuration reaches. It must end in one sentence, or in a plan
whose settings are all legal by the table below, which knows nothing of the annotations that the product checks by.
"""

import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from launch.config.composition.compose import groups
from launch.config.run_config import RunConfig, run_config
from launch.plan.plan import make_plan
from learner.schedule import Schedule
from opd.errors import OpdError
from opd.settings.auto import Auto
from opd.settings.validation import walk
from tests.method_needs import NEEDS

SHOP = ["experiment=shop"]
ENSEMBLE = [
    "teachers.before.path=${assets:shop/student}",
    "method.scorer.shares.default=3",
    "method.scorer.shares.before=1",
]
VOCABULARY, WINDOW, WIDTH = 64, 128, 96  # of the shop models

Rule = Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    return lambda v: type(v) is int and low <= v <= high


def real(low: float, high: float, *, zero: bool = False) -> Rule:
    return lambda v: type(v) is float and math.isfinite(v) and (low <= v <= high or (zero and v == 0))


def text(pattern: str = r"[^\x00-\x1f]*") -> Rule:
    return lambda v: type(v) is str and re.fullmatch(pattern, v) is not None


def members(rule: Rule, least: int = 0) -> Rule:
    return lambda v: type(v) in (list, tuple) and len(v) >= least and all(rule(m) for m in v)


def named(rule: Rule, least: int = 0) -> Rule:
    return lambda v: (
        isinstance(v, Mapping) and len(v) >= least and all(type(k) is str and rule(m) for k, m in v.items())
    )


def part(*modules: str) -> Rule:
    return lambda v: type(v).__module__.startswith(modules) and not isinstance(v, type)


yes: Rule = lambda v: type(v) is bool  # noqa: E731
one: Rule = lambda v: isinstance(v, Enum)  # noqa: E731
SECONDS, SOME = real(1, 30 * 24 * 3600), whole(1, 10**9)
FEW, SEED, SHARE = whole(1, 10**5), whole(0, 2**64), real(0, 1)
LINE, NAME = text(), text(r"[A-Za-z0-9][\w.=,+-]*")
DIRECTIONS = ("FullReverseKL", "FullForwardKL", "JensenShannon", "SkewedReverseKL", "SkewedForwardKL")

# The last rule that matches a name counts.
RULES: Sequence[tuple[str, Rule]] = (
    (r"(student|learner|cluster|hardware|tracker|evaluation|method|learner\.lora)", lambda v: hasattr(v, "__slots__")),
    (r"stop_after", lambda v: hasattr(v, "__slots__")),
    (r"stop_after\.(tokens|flops|cpu_s)", lambda v: v == 0 or real(1e-3, 1e30)(v)),
    (r"evaluation\.parts", whole(0, 10_000)),
    (r"evaluation\.sets", named(lambda v: hasattr(v, "maj_at"))),
    (r"evaluation\.sets\.\w+", lambda v: hasattr(v, "maj_at")),
    (r"evaluation\.sets\.\w+\.samples", whole(1, 10_000)),
    (r"evaluation\.sets\.\w+\.samples_between", whole(0, 10_000)),
    (r"evaluation\.sets\.\w+\.temperature", real(1e-3, 1e3, zero=True)),
    (r"evaluation\.sets\.\w+\.top_p", real(1e-4, 1)),
    (r"evaluation\.sets\.\w+\.max_tokens", whole(1, WINDOW)),
    (r"evaluation\.sets\.\w+\.(greedy|random_subset)", yes),
    (r"evaluation\.sets\.\w+\.(pass_at|maj_at)", members(whole(1, 10_000))),
    (r"evaluation\.sets\.\w+\.(every|subset|reverse_kl_prompts)", whole(0, 10**9)),
    (r"run_name", text(r"([A-Za-z0-9][\w.=,+-]*)?")),
    (r"output_dir|student\.path|teachers\.\w+\.path", text(r"[^\x00-\x1f]+")),
    (r"checkpoint_best", text(r"(\w+/)?\w*")),
    (r"resume|text|tracker\.(entity|group)", lambda v: v is None or type(v) is str),
    (r"notes|tracker\.tags|resume_changes", members(text())),
    (r"overrides(\[\d+\])?", lambda v: type(v) in (str, tuple)),
    (r"teachers", named(lambda v: hasattr(v, "backend"), 1)),
    (r"graders", named(lambda v: hasattr(v, "grade"), 1)),
    (r"graders\.\w+", lambda v: hasattr(v, "grade")),
    (r"environments", named(lambda v: hasattr(v, "step"))),
    (r"(.*\.)?seed", SEED),
    (r"steps|checkpoint_keep|tracker\.(print|samples)_every", SOME),
    (r"checkpoint_every|checkpoint_keep_every|evaluation\.every", whole(0, 10**9)),
    (r"max_tokens|evaluation\.max_tokens|method\.rollout(\.\w+)?\.max_tokens", whole(1, WINDOW)),
    (r"max_staleness", whole(0, 99)),
    (r"max_ratio|method\.objective(\.of)*\.max_ratio", real(1, 10**9, zero=True)),
    (r"max_buffer_bytes|.*kv_cache_bytes|cluster\.replay_log_bytes|learner\.publish_chunk_bytes", whole(0, 2**60)),
    (r"checkpoint_minutes", real(0, 10**6)),
    (r"cluster\.elastic|tracker\.(tensorboard|mlflow)", yes),
    (r"grace_s", real(0, 30 * 24 * 3600)),
    (r"deterministic|doctor\w*|trace|dry_run|learner\.(deterministic|offload_optimizer)", yes),
    (r"evaluation\.(teacher|on_start)", yes),
    (r"learner\.gradient_checkpointing", lambda v: v is Auto.AUTO or yes(v)),
    (
        r"student\.(enforce_eager|async_scheduling)|method\.scorer\.(scale_by_std|length_normalized|own_reward|later|normalized)",
        yes,
    ),
    (
        r"weight_update|cluster\.(layout|share)|.*\.(device|dtype|backend|mode|schedule|placement|transport|loss_kernel)|"
        r".*\.(signal|outside|coin)",
        one,
    ),
    (r"(.*\.)?deadline_s|.*(start|turn)_deadline_s", SECONDS),
    (r"teachers\.\w+\.(connect_s|read_s|backoff_s)", real(1e-4, 30 * 24 * 3600)),
    (
        r".*\.(replicas|ranks|tensor_parallel|max_num_seqs|max_k|max_consecutive_failures|head_chunk|mixup_every)",
        whole(1, 10**9),
    ),
    (r"(student|teachers\.\w+)\.(replicas|tensor_parallel|max_consecutive_failures)|learner\.ranks", whole(1, 10**4)),
    (r"student\.stop", members(text(r"[^\0]{1,1000}"))),
    (r"student\.max_model_len", lambda v: v is Auto.AUTO or whole(101, 10**8)(v)),
    (r"teachers\.\w+\.max_model_len", lambda v: v == 0 or whole(101, 10**8)(v)),
    (r"teachers\.\w+\.max_batch_tokens", whole(101, 10**8)),
    (r"learner\.tokens_per_microbatch", lambda v: v is Auto.AUTO or whole(101, 10**8)(v)),
    (r"learner\.head_chunk", whole(0, 10**8)),
    (r"student\.max_num_batched_tokens", lambda v: v == 0 or whole(256, 10**8)(v)),
    (r".*gpu_memory_utilization", real(0.005, 1)),
    (r"teachers\.\w+\.(url|model|fingerprint)", LINE),
    (r"teachers\.\w+\.url", text(r"(https?://.+)?")),
    (r"teachers\.\w+\.retries", whole(0, 10**4)),
    (r"teachers\.\w+\.score_kinds", members(text(r"\w+(\.\w+)+"))),
    (r"teachers\.\w+\.mixup|learner\.final_lr_fraction|method\.rollout\.fraction|method\.scorer\.discount", SHARE),
    (r"learner\.lr", real(1e-15, 1)),
    (r"learner\.beta[12]", lambda v: real(0, 1)(v) and v < 1),
    (r"learner\.eps", real(1e-20, 0.1)),
    (r"learner\.weight_decay", real(0, 1)),
    (r"learner\.grad_clip", real(1e-9, 1e9, zero=True)),
    (r"learner\.(warmup|decay)_steps", whole(0, 100)),
    (r"learner\.zero_stage", lambda v: v is Auto.AUTO or whole(0, 3)(v)),
    (r"learner\.overlap_k|method\.rollout(\.student|\.of)?\.record_topk", whole(0, VOCABULARY)),
    (r"method\.scorer\.k|method\.objective(\.of)*\.k|method\.objective(\.of)*\.support\.k", whole(1, VOCABULARY)),
    (r"learner\.sentinel_tolerance", real(1e-9, 10, zero=True)),
    (r"learner\.max_skipped_steps", whole(0, 1000)),
    (r"learner\.lora\.r", whole(0, 10**5)),
    (r"learner\.lora\.lora_alpha", real(1e-6, 1e6)),
    (r"learner\.lora\.target_modules", members(text(r"\S.*"), 1)),
    (r"cluster\.address|tracker\.project|.*prompts(\.sources\.\w+)?\.teacher", text(r"\S.*")),
    (r"cluster\.(cpus_per_actor|gpus_per_engine)", lambda v: real(0, 4096)(v) and (v <= 1 or v == int(v))),
    (r"cluster\.gpus_per_(learner|teacher)", real(0, 1)),
    (r"cluster\.gpu_memory_gib", real(1, 4096, zero=True)),
    (r"cluster\.restarts", whole(0, 10**6)),
    (r"cluster\.hedge_quantile", lambda v: real(0, 1)(v) and v < 1),
    (r"hardware\.\w+", real(1, 1e24, zero=True)),
    (r"tracker\.samples|.*prompts(\.sources\.\w+)?\.problems", whole(0, 10**8)),
    (r"evaluation\.(samples|reverse_kl_prompts)|.*\.prompts_per_step|.*\.group_size", FEW),
    (r"evaluation\.prompts", lambda v: v is None or part("opd.prompts.", "demos.prompts.")(v)),
    (r"prompts|(evaluation\.)?prompts\.sources\.\w+", part("opd.prompts.", "demos.prompts.")),
    (r"(evaluation\.)?prompts\.sources", named(part("opd.prompts.", "demos.prompts."), 1)),
    (r".*prompts(\.sources\.\w+)?\.(chat|drop_last_answer|shuffle|skip_long|stream)", yes),
    (r".*prompts(\.sources\.\w+)?\.(teacher_)?(system|few_shot)", lambda v: v is None or type(v) is str),
    (r".*prompts(\.sources\.\w+)?\.(teacher_)?template_kwargs", named(lambda _: True)),
    (r".*prompts(\.sources\.\w+)?\.(teacher_)?template_kwargs\..*", lambda _: True),
    (r".*prompts(\.sources\.\w+)?\.teacher_chat_template", one),
    (r".*prompts(\.sources\.\w+)?\.(map|filter)", text()),
    (r"(evaluation\.)?prompts\.weights", named(real(1e-9, 1e9))),
    (r"(evaluation\.)?prompts\.prompts_per_step", whole(0, 10**5)),
    (r"(evaluation\.)?prompts\.teachers", named(text(r"\S.*"))),
    (r"method\.name", NAME),
    (r"method\.rollout(\.student|\.fixed)?", part("opd.rollouts.")),
    (r"method\.rollout\.of", part("opd.rollouts.")),
    (r"method\.rollout\.teacher", lambda v: v is None or type(v).__module__.startswith("opd.rollouts.")),
    (r"method\.rollout\.at_least", real(0, 1e6)),
    (r"method\.rollout\.cut", yes),
    (r"method\.rollout\.repetition", real(1, 1e6, zero=True)),
    (r"method\.rollout\.solved_at_most", SHARE),
    (r"method\.rollout\.shown", part("opd.rollouts.contexts")),
    (r"method\.rollout\.shown\.threshold", real(1e-6, 1)),
    (r"method\.rollout\.shown\.(longest|room|free)", SOME),
    (r"method\.rollout\.shown\.(solution|template)", text(r"[^\x00]*\{completion\}[^\x00]*")),
    (r"method\.rollout\.shown\.feedback", text(r"[^\x00]*\{feedback\}[^\x00]*")),
    (r"method\.scorer(\.reader)?", part("opd.scorers.")),
    (r"method\.objective", part("opd.objectives.")),
    (r"method\.objective(\.of)+", lambda v: type(v).__name__ in DIRECTIONS or hasattr(v, "promise")),
    (r"method\.objective(\.of)*\.support", lambda v: type(v).__module__ == "opd.method.promises" and hasattr(v, "k")),
    (r"method\.(objective|scorer)\.shape", part("opd.method.shapes")),
    (r"method\.(objective|scorer)\.shape\.limit", real(1e-9, 1e9)),
    (r"method\.(objective|scorer)\.shape\.alpha|method\.objective\.below", lambda v: real(0, 1)(v) and v > 0),
    (r"method\.(objective|scorer)\.shape\.mixture", real(1e-9, 0.5, zero=True)),
    (r"method\.(objective|scorer)\.shape\.below", one),
    (r"method\.objective\.(teacher|student)_power", lambda v: callable(v) or SHARE(v)),
    (r"method\.objective\.(teacher|student)_power\.(first|last)", real(-1e6, 1e6)),
    (r"method\.objective\.(teacher|student)_power\.steps", whole(0, 10**9)),
    (r"method\.objective\.advantage", lambda v: v != 0 and real(-1e3, 1e3)(v)),
    (r"method\.update", part("opd.updates.")),
    (r"method\.normalizer", part("opd.loss.packing")),
    (r"method\.weights", named(part("opd.token_weights."))),
    (r"method\.terms", named(lambda v: type(v).__name__ == "Term")),
    (r"method\.coefficient", lambda v: callable(v) or real(-1e6, 1e6)(v)),
    (r"method\.coefficient\.(first|last)", real(-1e6, 1e6)),
    (r"method\.coefficient\.steps", whole(0, 10**9)),
    (r"method\.coefficient\.at", SHARE),
    (r"method\.rollout(\.\w+)?\.temperature", real(1e-3, 1e3, zero=True)),
    (r"method\.rollout(\.\w+)?\.top_p", real(1e-4, 1)),
    (r"method\.rollout\.budget", lambda v: callable(v) or real(0, 1e6)(v)),
    (r"method\.rollout\.budget\.(first|last)", real(-1e6, 1e6)),
    (r"method\.rollout\.budget\.steps", whole(0, 10**9)),
    (r"method\.rollout\.teacher", text(r"[^\x00-\x1f]*")),
    (r"method\.scorer\.shares", named(real(-1e9, 1e9), 1)),
    (r"method\.scorer\.contexts", named(one)),
    (r"method\.scorer\.(epsilon|reward_scale)|method\.normalizer\.divisor", real(1e-15, 1e15)),
    (r"method\.objective(\.of)*\.(alpha|beta)", lambda v: real(1e-9, 1 - 1e-9)(v) or v == 0),
    (r"method\.objective(\.of)*\.beta", real(1e-9, 1 - 1e-9)),
    (r"method\.objective(\.of)*\.clip_(low|high)", real(1e-9, 1000)),
    (r"method\.objective(\.of)*\.coefficient", real(1e-9, 1e9)),
    (r"method\.objective(\.of)*\.(forward_weight|long_weight)", real(0, 1e6)),
    (r"method\.scorer\.threshold", real(0, 100)),
    (r"method\.scorer\.judge", text(r"\S.*")),
    (r"method\.scorer\.(before|after|yes|no)", text(r"[^\x00]*")),
    (r"method\.scorer\.base", text(r"\S.*")),
    (r"method\.scorer\.probes", named(text(r"[^\x00]*"), 1)),
    (r"method\.objective\.relaxation", real(0, 1e9)),
    (r"method\.scorer\.(loss|cost|transport)", part("opd.scorers.")),
    (r"method\.scorer\.window", whole(1, 10**8)),
    (r"method\.scorer\.fraction", real(1e-6, 1)),
    (r"method\.scorer\.quantile", SHARE),
    (r"method\.scorer\.least", real(0, 0.5)),
    (r"method\.scorer\.temperature", real(1e-3, 1e3, zero=True)),
    (r"method\.scorer\.transport\.regularization", real(1e-4, 100)),
    (r"method\.scorer\.transport\.tolerance", real(1e-12, 1)),
    (r"method\.scorer\.transport\.iterations", whole(1, 10**6)),
    (r"method\.objective\.weight", real(0, 1000)),
    (r"method\.objective(\.of)*\.threshold", real(-1e6, 100)),
    (r"method\.objective(\.of)*\.corrected", yes),
    (r"method\.objective(\.of)*\.temperature", real(1e-3, 1e3)),
    (r"method\.weights\.\w+\.count", whole(0, 10**9)),
    (r"method\.objective(\.of)*\.samples", whole(1, 10**6)),
    (r"method\.weights\.\w+\.token_ids", members(whole(0, 10**9))),
    (r"method\.weights\.\w+\.tokens", members(text(r".*"))),
    (r"method\.weights\.\w+\.(shares)", named(real(1e-9, 1e9))),
    (r"method\.weights\.\w+\.by", part("opd.token_weights.")),
    (r"method\.weights\.\w+\.by\.reading", part("opd.loss.readings")),
    (r"method\.weights\.\w+\.by(\.reading)?\.k", whole(1, VOCABULARY)),
    (r"method\.weights\.\w+(\.by)?\.(per_teacher|lowest)", yes),
    (r"method\.weights\.\w+(\.by)?\.(scope|signal)", one),
    (r"method\.weights\.\w+\.by\.(low|high)|method\.weights\.\w+\.drop", SHARE),
    (r"method\.weights\.\w+\.fraction", real(1e-6, 1)),
    (r"method\.weights\.\w+\.per_trajectory", whole(0, 10**6)),
    (r"method\.weights\.\w+\.(teacher|student)", real(0, 1000)),
    (r"method\.weights\.\w+\.filters", named(part("opd.token_weights."))),
    (r"method\.update\.trials", whole(0, 100)),
    (r"method\.update\.stride", real(0, 1000)),
    (r"method\.update\.period", whole(1, 10**6)),
    (r"method\.update\.fraction", real(1e-3, 1)),
    (r"method\.update\.parameters", lambda v: text(r"[^\x00]+")(v) and bool(re.compile(v))),
    (r"method\.update\.metric", text(r"[A-Za-z][\w/]*")),
    (r"method\.update\.accept_equal", yes),
    (r"method\.(weights|terms\.\w+\.weights)\.\w+\.source", one),
    (r"method\.update\.origin|method\.scorer\.base_reads|method\.objective\.reward", one),
    (r"method\.objective\.(center|agree)", yes),
)

WORDS = "abc '' '[/b]' '[red]x' null true false yes nan inf -inf 'ü☃' '../../x' /dev/null '${' ${steps} ${nope} ??? -"
NUMBERS = (
    "0 1 -1 -0.0 2.5 -2.5 1e3 1e9 1e308 -1e308 1e400 1e-320 5e-324 0.001 1.0000001 64.5 100000 1000000000 1_000 0x10"
)
NESTED = (
    "[] [1] [[1]] [a,1] [[[[[[]]]]]] {} {a:1} {a:{b:[1,{c:null}]}} {_target_:7} {_target_:os.system} {_target_:opd.}"
)
CLASSES = (
    *(
        "types.Prompt",
        "packing.Constant",
        "divergences.Union",
        "objectives.sampled.Likelihood",
        "weights.length.SkipTruncated",
    ),
    *("updates.optimizer.OptimizerStep", "scorers.teacher.SampledTokens", "rollouts.student.StudentRollout"),
)
HOSTILE = (
    *f"{WORDS} {NUMBERS} {NESTED}".split(),
    *(f"{{_target_:opd.{name}}}" for name in CLASSES),
    *("99999999999999999999", "-99999999999999999999", "'" + "9" * 500 + "'", "9" * 5000, "'x\ny'", "'a b'"),
    *("[" * 60 + "]" * 60, "{" + ",".join(f"k{i}:{i}" for i in range(50)) + "}"),
)
PARTS = (
    "opd.token_weights.length.SkipTruncated",
    "opd.token_weights.teachers.TeacherBalance",
    "opd.prompts.mixed.MixedPrompts",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What is asked: a shipped configuration and one hostile override."""

    base: tuple[str, ...]
    override: str


@dataclass(slots=True, kw_only=True)
class Figures:
    """How the lines ended; `wrong` has those that must not be."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def __str__(self) -> str:
        names = ("planned", "refused", "tracebacks", "nonsense")
        said = ", ".join(f"{self.ends[n]} {n}" for n in names)
        return f"{sum(self.ends.values())} tried: {said}; slowest {self.slowest[0]:.1f} s ({self.slowest[1][:80]})"


def bases() -> list[tuple[str, ...]]:
    """Every method that is shipped, two tasks with two teachers, adapters, a cluster."""
    own = {**NEEDS, "ensemble_reverse_kl": ENSEMBLE}
    every = [(*SHOP, f"method={m}", *own.get(m, ())) for m in groups()["method"]]
    more = (
        ["experiment=two_teachers"],
        [*SHOP, "evaluation_sets=[shop_cool]"],
        [*SHOP, "learner=lora"],
        [*SHOP, "cluster=multi_node"],
    )
    return [*every, *(tuple(o) for o in more)]


def lines(count: int, seed: int, chosen: Sequence[tuple[str, ...]] | None = None) -> list[Line]:
    """Every field of every base at least once before any comes again, values drawn."""
    draw = random.Random(f"overrides/{seed}")
    places: dict[str, list[tuple[str, ...]]] = {}
    for base in chosen or bases():
        for name, _, _ in walk(run_config(base), ""):
            places.setdefault(name.replace("teachers.default", "teacher"), []).append(base)
    for name in [name for name in places if name == "text" or name.startswith("overrides")]:
        places.pop(name)
    names: list[str] = []
    while len(names) < count:
        again = sorted(places)
        draw.shuffle(again)
        names += again
    made = []
    for name in names[:count]:
        value = draw.choice(HOSTILE)
        kind = draw.random()
        override = (
            f"{name}._target_={draw.choice(PARTS)}" if kind < 0.02 else f"~{name}" if kind < 0.03 else f"{name}={value}"
        )
        made.append(Line(base=draw.choice(places[name]), override=override))
    return made


def nonsense(config: RunConfig) -> str:
    """The first setting that no rule allows; "" if all are legal."""
    for name, _, value in walk(config, ""):
        as_main = re.sub(r"^method\.terms\.\w+\.", "method.", name)  # a term has the fields of a method
        as_main = re.sub(r"^evaluation\.sets\.\w+\.prompts", "evaluation.prompts", as_main)
        rules = [rule for pattern, rule in RULES if re.fullmatch(pattern, as_main)]
        if not rules:
            return f"no rule says what {name} may be"
        if not rules[-1](value):
            return f"{name}={value!r}"
    warm, lora = config.learner.warmup_steps, config.learner.lora
    if warm > max(config.steps, 10) or (config.max_staleness and config.max_staleness >= config.steps):
        return f"warm-up {warm} or staleness {config.max_staleness} of {config.steps} steps"
    decay, stable = config.learner.decay_steps, config.learner.schedule is Schedule.WARMUP_STABLE_DECAY
    if stable != bool(decay) or (decay and warm + decay > config.steps):
        return f"decay {decay} after warm-up {warm} of {config.steps} steps under {config.learner.schedule.name}"
    return f"rank {lora.r} of matrices {WIDTH} wide" if lora.r > WIDTH else ""


def rewritten(line: Line, config: RunConfig) -> str:
    """A number that is not what was written."""
    name, _, value = line.override.partition("=")
    given = {n.replace("teachers.default", "teacher"): v for n, _, v in walk(config, "")}.get(name)
    if isinstance(given, bool) or not isinstance(given, int | float) or not re.fullmatch(r"-?[\d.]+(e-?\d+)?", value):
        return ""
    return "" if given == float(value) else f"{line.override} became {given!r}"


def ended(line: Line) -> tuple[str, str]:
    """How a line ends, and what is wrong with that."""
    asked = f"{' '.join(line.base)} {line.override}"[:300]
    try:
        config = make_plan(run_config([*line.base, line.override])).config
    except OpdError as error:
        said = str(error)
        fine = "\n" not in said and 20 < len(said) < 1500 and "Traceback" not in said
        return ("refused", "") if fine else ("tracebacks", f"{asked}: no sentence: {said[:300]!r}")
    except Exception as error:  # noqa: BLE001  # that is what is looked for
        return "tracebacks", f"{asked}: {type(error).__name__}: {str(error)[:200]}"
    found = nonsense(config) or rewritten(line, config)
    return ("nonsense", f"{asked}: {found}") if found else ("planned", "")


def run(made: Sequence[Line]) -> Figures:
    """All lines, one after another in this process."""
    figures = Figures()
    for line in made:
        began = time.monotonic()
        end, wrong = ended(line)
        figures.ends[end] += 1
        figures.wrong += [wrong] if wrong else []
        figures.slowest = max(figures.slowest, (time.monotonic() - began, line.override))
    return figures


def main(arguments: Sequence[str]) -> int:
    """Print the figures; 1 if a line ended in a traceback or in nonsense."""
    given = dict(argument.split("=", 1) for argument in arguments)
    figures = run(lines(int(given.get("count", 2000)), int(given.get("seed", 0))))
    print("\n".join([*figures.wrong, str(figures)]))
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
