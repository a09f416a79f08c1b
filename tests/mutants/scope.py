"""What is mutated, by area, and which test files are asked."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREAS = {
    "objectives": ["opd/objectives/*.py", "opd/method/promises.py", "opd/token_weights/*.py", "opd/method/method.py"],
    "loss": ["opd/loss/chunked.py", "opd/loss/metric_sums.py", "opd/loss/per_teacher.py", "opd/scorers/*.py"],
    "packing": ["opd/loss/packing.py", "opd/loss/packed_attention.py"],
    "loop": ["opd/loop/train.py", "opd/rollouts/*.py"],
    "buffer": ["opd/loop/staleness.py", "opd/loop/rollout_buffer.py"],
    "ledger": ["opd/loop/ledger.py"],
    "learner": [
        "learner/training.py", "learner/engine.py", "learner/config.py", "learner/checkpoints/optimizer_shards.py",
        "learner/checkpoints/checkpoint.py", "learner/model.py", "learner/lora.py", "learner/snapshots.py",
    ],
    "publishing": [
        "learner/publishing.py", "weight_sync/receiver.py", "weight_sync/manifest.py", "weight_sync/checksum.py",
        "weight_sync/lora.py", "weight_sync/shared_memory.py", "weight_sync/sentinel.py",
    ],
    "teacher service": [
        "teacher_service/control_question.py", "teacher_service/scoring.py", "teacher_service/frames.py",
        "teacher_service/server.py", "teacher_service/retries.py", "teacher_service/server_identity.py",
        "hf/packed_model.py", "hf/digest.py", "teacher_service/backends/http.py", "teacher_service/backends/openai.py",
        "teacher_service/backends/torch_forward.py",
    ],
}  # fmt: skip
PACKAGES = ("opd", "weight_sync", "hf", "learner", "teacher_service")
OF_ALL = ("tests/unit/project/test_defaults.py",)  # about every module, which it imports by its name
_MEANT = [
    "tests/unit/loop/test_completions.py", "tests/unit/engines/test_learner_config.py",
    "tests/contract/test_teachers.py",
    "tests/contract/test_faults.py",
    *OF_ALL,
]  # fmt: skip
_WITHOUT = ("test_house.py", "test_certificate.py")  # slow, and proves the whole product at once
_OTHER = ("ray", "vllm", "actors", "launch")  # a test file that imports one of these is about something else


def sources(root: Path) -> dict[str, list[str]]:
    """Area -> files, as paths from the root."""
    return {
        area: sorted(str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern))
        for area, patterns in AREAS.items()
    }


def askable(root: Path) -> list[str]:
    """Unit tests, those of learner and teacher in one process, and the contract: what is about the core alone."""
    core = {module_of(path) for paths in sources(root).values() for path in paths}
    found = []
    for path in [*sorted(root.glob("tests/unit/**/test_*.py")), *sorted(root.glob("tests/integration/**/test_*.py"))]:
        modules = imports(path)
        if path.name not in _WITHOUT and modules & core and not any(m.split(".")[0] in _OTHER for m in modules):
            found.append(str(path.relative_to(root)))
    return [*found, *_MEANT]


def module_of(path: str) -> str:
    """The dotted name of a file: `opd.loop.ledger` of `opd/loop/ledger.py`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it; none of a file that is not there."""
    return _imports(path.read_text()) if path.exists() else set()


@cache
def _imports(text: str) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found
