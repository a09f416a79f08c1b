"""Backends of teachers: one file each, all with the protocol `opd.ports.LogprobTeacher`."""

from teacher_service.config import Backend


def backend(chosen: Backend) -> type:
    """The class behind a backend's name, made with `(config, store)`; remote ones take the token, too."""
    match chosen:
        case Backend.TORCH:
            from teacher_service.backends.torch_forward import TorchTeacher

            return TorchTeacher
        case Backend.VLLM:
            from teacher_service.backends.vllm_scoring import HiddenTeacher

            return HiddenTeacher
        case Backend.VLLM_LOGPROBS:
            from teacher_service.backends.vllm_scoring import PromptLogprobsTeacher

            return PromptLogprobsTeacher
        case Backend.HTTP:
            from teacher_service.backends.http import HttpTeacher

            return HttpTeacher
        case Backend.OPENAI:
            from teacher_service.backends.openai import OpenAITeacher

            return OpenAITeacher
