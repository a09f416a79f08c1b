"""A teacher inside the student's engine: both models read the same tokens, and a request may sample from their blend.

To vLLM the two are one model. Each layer of either has a key-value cache of its own, and both share the tables of
blocks, the scheduler and the prefix cache, so the student's and the teacher's logits of a token are always those of the
same context. vLLM's own sampler draws from the blend, and its log-probabilities are the blend's.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.transformers_utils.config import get_config
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorOfRows
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorOfSlots

from actors.config import InnerTeacher, StudentConfig
from actors.engine_thread import BUDGET
from hf.folder import text_config
from hf.stop_tokens import read_ends
from opd.rollouts.trust_region import blended, with_one_end

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ARCHITECTURE = "OpdStudentWithTeacher"
_OWN = "opd_inner_teacher"
_TEACHER = "teacher."  # prefix of its weights


class _Step(threading.local):
    """Message between model and sampler of an engine, within a step; one thread drives one engine."""

    teacher: Tensor | None = None  # the teacher's logits of the rows that the model was asked for last
    wanted = True  # whether any running request is blended


_STEP = _Step()


def arguments(config: StudentConfig, inner: InnerTeacher, ends: Sequence[int]) -> dict[str, Any]:
    """vLLM's engine arguments for a student with a teacher inside; `ends` end the student's texts."""
    named = read_ends(config.path).by_file
    own = named.get("tokenizer_config.json") or next(iter(named.values()))
    return {
        "hf_overrides": {"architectures": [ARCHITECTURE]},
        "logits_processors": [BlendProcessor],
        # The model's forward pass has a branch, which a captured graph would not have.
        "enforce_eager": True,
        "additional_config": {
            _OWN: {
                "path": inner.path,
                "student": text_config(config.path, "student")["architectures"],
                "ends": sorted({*ends, *read_ends(inner.path, "teacher").ids}),
                "end": own[0],
            }
        },
    }


def _own(vllm_config: "VllmConfig") -> Mapping[str, Any]:
    """Settings that `arguments` hands to model and sampler."""
    given: Any = vllm_config.additional_config
    return given[_OWN]


class StudentWithTeacher(nn.Module):
    """Student and teacher as one model of vLLM, whose logits are the student's.

    Hidden states are both models', side by side. The teacher's logits are left for `BlendProcessor`. Published weights
    are those of `student`; the teacher's come with the checkpoint and stay.
    """

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        own, config = _own(vllm_config), vllm_config.model_config.hf_config
        self.student: Any = init_vllm_registered_model(
            vllm_config, prefix=maybe_prefix(prefix, "student"), hf_config=config, architectures=own["student"]
        )
        self.teacher: Any = init_vllm_registered_model(
            vllm_config,
            prefix=maybe_prefix(prefix, "teacher"),
            hf_config=get_config(own["path"], trust_remote_code=False),
        )
        self._width = vllm_config.model_config.get_hidden_size()
        self.secondary_weights = [DefaultModelLoader.Source(own["path"], revision=None, prefix=_TEACHER)]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The student's embeddings."""
        return self.student.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of both; of the student alone where no running request is blended."""
        mine = self.student(input_ids, positions, intermediate_tensors, inputs_embeds)
        if not _STEP.wanted:
            return mine
        return torch.cat([mine, self.teacher(input_ids, positions, intermediate_tensors, inputs_embeds)], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The student's logits."""
        mine, its = hidden_states[:, : self._width], hidden_states[:, self._width :]
        _STEP.teacher = self.teacher.compute_logits(its.contiguous()) if its.shape[-1] else None
        return self.student.compute_logits(mine.contiguous())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load both checkpoints, one after the other."""
        loaded: set[str] = set()
        for theirs, part in groupby(weights, key=lambda named: named[0].startswith(_TEACHER)):
            model, prefix = (self.teacher, _TEACHER) if theirs else (self.student, "student.")
            names = model.load_weights((name.removeprefix(_TEACHER) if theirs else name, x) for name, x in part)
            loaded |= {prefix + name for name in names}
        return loaded


class Asked(NamedTuple):
    """A blend that a running request asks for."""

    budget: float
    temperature: float


def asked(params: "SamplingParams") -> Asked | None:
    """The blend that a request asks for."""
    extra: Mapping[str, Any] = params.extra_args or {}
    return Asked(budget=extra[BUDGET], temperature=params.temperature) if BUDGET in extra else None


class BlendProcessor(ProcessorOfRows, ProcessorOfSlots):
    """Logits processor that puts the blend in place of the student's logits, for requests that ask for one.

    Both of vLLM's model runners have an interface of their own: the older one (CPUs) tells which request stands in
    which row, the newer one (GPUs) which slot a row belongs to. Rows of other requests are not touched.
    """

    def __init__(self, vllm_config: "VllmConfig", *_of_the_runner: Any) -> None:
        own = _own(vllm_config)
        self._ends, self._end = own["ends"], own["end"]
        self._asked: dict[int, Asked] = {}

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Nothing: the engine has checked its requests."""

    def is_argmax_invariant(self) -> bool:
        """It is not."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows, before a forward pass (older runner)."""
        process_dict_updates(self._asked, batch_update, lambda params, *_: asked(params))
        _STEP.wanted = bool(self._asked)

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Fill a slot (newer runner); whether the request is blended."""
        blend = asked(sampling_params)
        if blend is None:
            self._asked.pop(req_idx, None)
        else:
            self._asked[req_idx] = blend
        return blend is not None

    def apply_staged_writes(self) -> None:
        """Say, before a forward pass, whether a slot may hold a blended request (newer runner).

        A slot that such a request has left counts until another takes it.
        """
        _STEP.wanted = bool(self._asked)

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Logits whose softmax, at each request's temperature, is what it samples from."""
        slots = range(len(logits)) if ctx is None else ctx.idx_mapping_np.tolist()
        blends = {row: self._asked[slot] for row, slot in enumerate(slots) if slot in self._asked}
        if not blends:
            return logits
        teacher = _STEP.teacher
        if teacher is None or teacher.shape != logits.shape or len(slots) != len(logits):
            raise RuntimeError(
                f"the engine's logits {tuple(logits.shape)} of {len(slots)} requests are not in the same rows as its "
                f"teacher's {None if teacher is None else tuple(teacher.shape)}; install the vLLM of requirements/"
            )
        rows = torch.tensor(list(blends), device=logits.device)
        budget, temperature = (logits.new_tensor(x, dtype=torch.float64) for x in zip(*blends.values(), strict=True))
        scale = temperature[:, None]
        p, q = (with_one_end(x[rows].double() / scale, self._ends, self._end) for x in (logits, teacher))
        logits[rows] = (blended(p, q, budget).logprobs * scale).to(logits.dtype)
        return logits


ModelRegistry.register_model(ARCHITECTURE, StudentWithTeacher)
