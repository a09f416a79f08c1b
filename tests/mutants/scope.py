"""What is mutated, by area, and which test files are asked."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREAS = {
    "objectives": ["opd/objectives/*.py", "opd/divergences.py", "opd/weights/*.py", "opd/method.py"],
    "loss": ["opd/logits.py", "opd/tally.py", "opd/routing.py", "opd/scorers/*.py"],
    "packing": ["opd/packing.py", "opd/attention.py"],
    "loop": ["opd/loop.py", "opd/rollouts/*.py", "opd/seeds.py"],
    "buffer": ["opd/pipeline.py", "opd/collecting.py"],
    "ledger": ["opd/ledger.py"],
    "learner": [
        "learner/training.py", "learner/engine.py", "learner/config.py", "learner/fragments.py",
        "learner/checkpoint.py", "learner/model.py", "learner/lora.py",
    ],
    "publishing": [
        "learner/publishing.py", "opd/delivery.py", "opd/manifest.py", "opd/checksum.py", "opd/adapters.py",
        "opd/shared_memory.py", "opd/sentinel.py",
    ],
    "teacher service": [
        "teacher_service/alignment.py", "teacher_service/reading.py", "teacher_service/wire.py",
        "teacher_service/server.py", "teacher_service/remote.py", "teacher_service/fingerprint.py",
        "teacher_service/packed_model.py", "teacher_service/backends/http.py", "teacher_service/backends/openai.py",
        "teacher_service/backends/torch_forward.py",
    ],
}  # fmt: skip
PACKAGES = ("opd", "learner", "teacher_service")
_MEANT = [
    "tests/unit/test_completions.py", "tests/unit/test_learner_config.py", "tests/contract/test_teachers.py",
    "tests/contract/test_faults.py",
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
    core = {path.removesuffix(".py").replace("/", ".") for paths in sources(root).values() for path in paths}
    found = []
    for path in [*sorted(root.glob("tests/unit/test_*.py")), *sorted(root.glob("tests/integration/test_*.py"))]:
        modules = _imports(path)
        if path.name not in _WITHOUT and modules & core and not any(m.split(".")[0] in _OTHER for m in modules):
            found.append(str(path.relative_to(root)))
    return [*found, *_MEANT]


def _imports(path: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found
