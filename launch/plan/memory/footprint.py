"""Memory of one process of a run, phase by phase: arithmetic alone.

Bytes of activations are those that `torch.autograd` keeps for the backward pass, layer by layer, as the learner's own
model makes them (packed attention, transformers' norms and experts); `tests/unit/plan/test_footprint.py` counts them.
What only a GPU can tell (a CUDA context, captured graphs) is a constant that was never measured here.
"""

from dataclasses import dataclass, fields
from enum import Enum
from functools import reduce
from typing import assert_never

from launch.plan.memory.shapes import ModelShape

CONTEXT = 1 << 29  # of a process on a GPU: CUDA's context and its libraries' kernels and workspaces (not measured)
GRAPHS = 1 << 30  # captured graphs of an engine, and a sixteenth of its weights (not measured)
BUCKET = 500_000_000  # elements of DeepSpeed's buckets, or the model (`learner.engine`)
LIVE = 1_000_000_000  # parameters that ZeRO-3 has whole at the same time, or the model
PADDED = 1.4  # slots a token of packed attention, at most (what `opd.loss.packed_attention` allows of wasted work)
WHOLE, CHOSEN = 12, 4
"""Float32 blocks of `rows x vocabulary` alive at once in the loss, if it reads whole distributions (counted: reverse KL
9, forward KL 8, Jensen-Shannon 12) or given tokens alone."""


class Phase(Enum):
    """Phase of a run, as far as memory differs."""

    START = "start"  # models are read and divided; others hold then what they rest with
    REST = "rest"  # others work
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"  # forward and backward
    STEP = "step"  # of the optimizer
    PUBLISH = "publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a process: what it holds through all phases first, then what one of them needs besides."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    graphs: int = 0
    context: int = 0
    heads: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """Sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        named = ((field.name, getattr(self, field.name) / 2**30) for field in fields(self))
        return " + ".join(f"{name} {gib:.2f}" for name, gib in named if gib >= 0.005) or "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRole:
    """A rollout engine of `bytes_each` per parameter, on each of its `parallel` GPUs.

    A step reads `step_tokens` tokens.
    `reserved` are the bytes that vLLM takes in all (0: what it needs), `cache` those of its key-value cache (0: what is
    left of `reserved`, a sequence of `longest` tokens at least). `inner`: parameters of a teacher within. `copies` of
    the weights are held beside them while new ones come.
    """

    model: ModelShape
    bytes_each: int
    longest: int
    sequences: int
    step_tokens: int
    on_gpu: bool
    parallel: int = 1
    cache: int = 0
    reserved: int = 0
    graphs: bool = True
    inner: int = 0
    copies: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRole:
    """A scoring teacher that reads `tokens` in a forward pass and has logits of `rows` of them at once.

    `reserved` are the bytes that vLLM takes on each of its `parallel` GPUs, if that runs it; `head` those of an output
    matrix beside it, on the first of them.
    """

    model: ModelShape
    bytes_each: int
    tokens: int
    rows: int
    on_gpu: bool
    reserved: int = 0
    parallel: int = 1
    head: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerRole:
    """A learner rank of `ranks` that reads `tokens` in a micro-batch and has logits of `rows` of them at once.

    `heads`: bytes of the teachers' output matrices; `whole`: the loss reads whole distributions. `adapters`: nothing
    else is trained (their own state, a percent or so of the model's, is not counted). `offloaded`: masters and moments
    are in host memory through a step. `chunk`: bytes of a piece of published weights, of which `copies` are held on the
    GPU.
    """

    model: ModelShape
    bytes_each: int
    stage: int
    ranks: int
    tokens: int
    rows: int
    on_gpu: bool
    whole: bool = True
    checkpointed: bool = False
    adapters: bool = False
    offloaded: bool = False
    fused: bool = False
    heads: int = 0
    chunk: int = 0
    copies: int = 0


Role = EngineRole | TeacherRole | LearnerRole


def footprint(role: Role, phase: Phase) -> Footprint:
    """Bytes of one process of `role` in `phase`."""
    match role:
        case EngineRole():
            return _engine(role, phase)
        case TeacherRole():
            return _teacher(role, phase)
        case LearnerRole():
            return _learner(role, phase)
        case _:
            assert_never(role)


def peak(role: Role) -> Footprint:
    """The largest footprint of a role over all phases; torch's allocator keeps what one of them took."""
    return reduce(lambda a, b: b if b.total > a.total else a, [footprint(role, phase) for phase in Phase])


def asleep(role: Role) -> Footprint:
    """Bytes that a process keeps on its GPU while it sleeps (`launch.services.turns`)."""
    rest = footprint(role, Phase.REST)
    frozen = isinstance(role, LearnerRole) and role.adapters and role.stage == 3  # DeepSpeed does not move them
    return Footprint(weights=rest.weights if frozen else 0, graphs=rest.graphs, context=rest.context)


def parked(role: Role) -> int:
    """Bytes of host memory that hold what a process on a GPU gives up while it sleeps.

    Keys and values are not kept, and the weights of engines are those that were published last.
    """
    if not role.on_gpu:
        return 0
    rest, held = footprint(role, Phase.REST), asleep(role)
    kept = rest.weights + rest.gradients + rest.optimizer + rest.heads + rest.buffers
    return kept - held.weights


def on_host(role: Role) -> int:
    """Bytes of host memory that a process on a GPU holds through all phases: an optimizer that is offloaded."""
    return _optimizer_in_host(role) if isinstance(role, LearnerRole) and role.offloaded and role.on_gpu else 0


def layer_bytes(model: ModelShape, width: int, tokens: int, slots: int, *, sparse: bool) -> int:
    """Bytes that one layer keeps for the backward pass, at `width` bytes a number.

    `slots` counts the tokens of the padded view that attention reads.
    """
    h, q, k = model.width, model.query, model.key

    def norm(columns: int, rows: int) -> int:  # its input in float32, that divided by its root mean square, the root
        return (4 + width) * columns + 4 * rows

    norms = 2 * norm(h, 1) + (norm(q + k, model.heads + model.kv_heads) if model.normed else 0)
    if sparse:
        router = 4 * model.experts + 8 * model.chosen + 24 * model.chosen  # probabilities, choices, permutations
        visits = model.chosen * width * (2 * h + 4 * model.expert + 1)
        mlp = router + visits
    else:
        mlp = 4 * width * model.inner  # gate, its activation, up, their product
    # Inputs of the projections (after each norm, and of the output); in slots: queries, keys, values, output, sums.
    return tokens * (norms + width * (2 * h + q) + mlp) + slots * (width * (2 * q + 2 * k) + 4 * model.heads)


def activation_bytes(model: ModelShape, width: int, tokens: int, slots: int, *, checkpointed: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass; with `checkpointed` layers their inputs alone."""
    tables = 2 * width * model.head_dim * tokens  # of rotary positions, for all layers
    ends = tokens * ((4 + width) * model.width + 4 + 16)  # the last norm, ids and places
    if checkpointed:
        return model.layers * width * model.width * tokens + tables + ends
    dense = model.layers - model.sparse
    layers = [layer_bytes(model, width, tokens, slots, sparse=sparse) for sparse in (False, True)]
    return dense * layers[0] + model.sparse * layers[1] + tables + ends


def pass_bytes(model: ModelShape, width: int, tokens: int) -> int:
    """The most bytes alive in one layer of a forward pass that keeps nothing, or of gradients in a backward pass."""
    inside = max(3 * model.inner, model.chosen * (3 * model.expert + 2 * model.width) if model.experts else 0)
    rotated = 5 * model.query + 2 * model.key
    return tokens * width * (max(inside, rotated) + 4 * model.width + 2 * model.head_dim)


def cache_bytes(model: ModelShape, width: int, tokens: int) -> int:
    """Bytes of keys and values of `tokens` tokens."""
    return 2 * model.layers * model.key * width * tokens


def _engine(role: EngineRole, phase: Phase) -> Footprint:
    model, width = role.model, role.bytes_each
    weights = (model.weights(width) + role.inner * width) // role.parallel
    least = cache_bytes(model, width, role.longest) // role.parallel
    graphs = (GRAPHS + weights // 16) if role.graphs and role.on_gpu else 0
    # A step reads so many tokens and samples for so many sequences; vLLM keeps room for both while it rests, too.
    logits = 3 * 4 * role.sequences * model.vocabulary
    forward = pass_bytes(model, width, role.step_tokens) // role.parallel
    held = Footprint(
        weights=weights,
        graphs=graphs,
        context=CONTEXT if role.on_gpu else 0,
        activations=forward if role.on_gpu or phase is Phase.GENERATE else 0,
        logits=logits if role.on_gpu or phase is Phase.GENERATE else 0,
    )
    cache = role.cache // role.parallel or max(least, role.reserved - held.total)
    return _with(held, cache=cache, buffers=role.copies * weights if phase is Phase.PUBLISH else 0)


def _teacher(role: TeacherRole, phase: Phase) -> Footprint:
    model, width = role.model, role.bytes_each
    scoring = phase is Phase.SCORE
    logits = 3 * 4 * role.rows * model.vocabulary if scoring or role.reserved else 0
    weights = model.weights(width) // role.parallel
    held = Footprint(
        weights=weights,
        graphs=(GRAPHS + weights // 16) if role.reserved else 0,
        context=CONTEXT if role.on_gpu else 0,
        activations=pass_bytes(model, width, role.tokens) // role.parallel if scoring or role.reserved else 0,
        logits=0 if role.head else logits,
    )
    if role.reserved:
        held = _with(held, cache=max(0, role.reserved - held.total))
    if not role.head:
        return held
    # vLLM's workers are processes of their own where there are several; hidden states become logits in the actor's.
    another = CONTEXT if role.on_gpu and role.parallel > 1 else 0
    return _with(held, context=held.context + another, heads=role.head, logits=logits)


def _learner(role: LearnerRole, phase: Phase) -> Footprint:
    model, width, stage = role.model, role.bytes_each, role.stage
    trained = 0 if role.adapters else model.parameters
    shared = {number: role.ranks if stage >= number else 1 for number in (1, 2, 3)}  # among how many, by stage
    bucket = width * min(BUCKET, trained) if stage else 0
    gathered = width * min(LIVE, model.parameters) if stage == 3 else 0
    optimizer = (8 + 4 * (stage > 0)) * trained // shared[1]  # ZeRO has masters in float32, too
    if role.offloaded:
        optimizer = 0 if role.on_gpu else _optimizer_in_host(role)
    held = Footprint(
        weights=width * model.parameters // shared[3],
        gradients=_gradients(role, phase, trained),
        optimizer=optimizer,
        context=CONTEXT if role.on_gpu else 0,
        heads=role.heads,
        buffers=bucket if stage == 3 else _staged(role, trained),
    )
    if phase is Phase.START:
        return _starting(role, held)
    if phase is Phase.TRAIN:
        buffers = _buckets(role) * bucket + gathered + _staged(role, trained)
        if role.offloaded and role.on_gpu and stage == 3:  # the host's sum of a gradient is added to on the GPU
            buffers += 4 * min(model.largest, trained) // role.ranks
        return _with(held, **_training(role), buffers=buffers)
    if phase is Phase.STEP:
        temporary = 0 if role.offloaded else _stepping(role, trained // shared[1])
        return _with(held, buffers=temporary + bucket + _staged(role, trained))
    if phase is Phase.PUBLISH:
        copies = role.copies * width * model.parameters
        return _with(held, buffers=held.buffers + (role.chunk if stage == 3 else 0) + copies)
    return held


def _gradients(role: LearnerRole, phase: Phase, trained: int) -> int:
    """Bytes of gradients that outlive their backward pass."""
    stage, own = role.stage, trained // role.ranks
    if not role.offloaded:
        # Without ZeRO and under ZeRO-2 they are given up after a step; ZeRO-1 and 3 have one flat tensor for ever.
        accumulated = phase in (Phase.TRAIN, Phase.STEP) or stage in (1, 3)
        return accumulated * 4 * (own if stage > 1 else trained)
    if stage == 3 or phase not in (Phase.TRAIN, Phase.STEP):  # ZeRO-3 adds them up in host memory
        return 0
    flat = 4 * own * (role.bytes_each == 2)  # DeepSpeed's sum of bfloat16 gradients, which goes to the host in one
    if phase is Phase.STEP:
        return flat
    return flat + 4 * trained if stage == 1 else 4 * own


def _buckets(role: LearnerRole) -> int:
    """DeepSpeed's buckets in a backward pass, and the gradients that are to go into them."""
    narrow = role.bytes_each == 2
    if role.offloaded and role.stage == 1:
        return 3 if narrow else 2  # in bfloat16 one of float32
    if role.offloaded and role.stage == 2 and not narrow:
        return 1
    return 1 + (role.stage > 1 or not narrow)


def _staged(role: LearnerRole, trained: int) -> int:
    """Bytes through which ZeRO-1 and 2 move gradients to host memory."""
    return role.bytes_each * min(role.model.largest, trained) if role.offloaded and role.stage < 3 else 0


def _optimizer_in_host(role: LearnerRole) -> int:
    """Bytes of masters, moments, gradients and DeepSpeed's buffers of a rank in host memory.

    torch rounds pinned memory, which all but the moments may be in, up to a power of two.
    """
    trained, width, stage = 0 if role.adapters else role.model.parameters, role.bytes_each, role.stage
    own, largest = trained // role.ranks, min(role.model.largest, trained)
    if stage == 3:  # sums of gradients and what the update reads; masters are not pinned
        pinned, plain = [4 * own, 4 * own], 12 * own
    else:
        pinned, plain = [4 * own, 4 * own, width * own, width * largest], 8 * own
        if stage == 2 and width > 2:  # sums over micro-batches, parameter by parameter
            plain += 4 * own
    return plain + sum(1 << (size - 1).bit_length() if size and role.on_gpu else size for size in pinned)


def _starting(role: LearnerRole, held: Footprint) -> Footprint:
    """Bytes of a rank that starts: no moments yet, and under ZeRO-3 no weights but its own part (and once a layer).

    ZeRO-2 (in float32 ZeRO-1, too) copies all weights into a flat tensor, and has zeros for gradients once. A GPU
    without room for that copy has it made on the host, so there it is not counted.
    """
    trained = 0 if role.adapters else role.model.parameters
    part = 4 * trained // role.ranks
    if role.offloaded and role.on_gpu:  # masters are made on the host
        return held
    if role.stage != 2 and (role.stage != 1 or role.bytes_each < 4):
        return _with(held, optimizer=part if role.stage else 0)
    return _with(held, gradients=part, optimizer=part, buffers=0 if role.on_gpu else role.bytes_each * trained)


def _training(role: LearnerRole) -> dict[str, int]:
    """Activations and logits of a micro-batch, at the end of its forward pass or in its backward pass."""
    model, width = role.model, role.bytes_each
    slots = int(PADDED * role.tokens)
    kept = activation_bytes(model, width, role.tokens, slots, checkpointed=role.checkpointed)
    kinds = {False, True} if 0 < model.sparse < model.layers else {model.sparse > 0}
    again = max(layer_bytes(model, width, role.tokens, slots, sparse=kind) for kind in kinds) * role.checkpointed
    # The gradient of the hidden states, and that of the matrix, in float32 until it is whole and then in its own.
    matrix = 0 if role.adapters else model.vocabulary * model.width
    states = width * role.tokens * model.width
    blocks = (WHOLE if role.whole else CHOSEN) * 4 * role.rows * model.vocabulary
    loss = blocks + (4 + width) * matrix + states
    backward = again + pass_bytes(model, width, role.tokens)
    return {"activations": kept + backward, "logits": max(loss - backward, width * matrix + states)}


def _stepping(role: LearnerRole, shard: int) -> int:
    """Temporaries of an update: two numbers a parameter in an optimizer that is not fused.

    One besides under ZeRO-3, and in float32 a flat copy of gradients under any.
    """
    if not role.stage:
        return 0 if role.fused else 8 * min(role.model.largest, shard)
    part = min(shard, LIVE) if role.stage == 3 else shard
    return (8 * (not role.fused) + 4 * (role.stage == 3 or role.bytes_each > 2)) * part


def _with(held: Footprint, **more: int) -> Footprint:
    known = {field.name: getattr(held, field.name) for field in fields(held)}
    return Footprint(**(known | more))
