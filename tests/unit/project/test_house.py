"""The house rules: who imports whom, how long a file may be, what a wheel carries, what the locks pin."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
PACKAGES = ["opd", "weight_sync", "hf", "actors", "learner", "teacher_service", "launch", "demos"]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
HASHED_LOCKS = ["audit", "build", "cpu", "dev", "gpu", "torch-cpu", "vllm-cpu"]
# vLLM's CUDA build asks for other versions of these than the CPU set has.
DIFFERS_ON_GPU = {"torch", "numpy", "apache-tvm-ffi"}


def sources(*folders: str) -> Iterator[tuple[str, str, ast.Module]]:
    """(path from the root, text, syntax tree) of every Python file below the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            yield str(path.relative_to(ROOT)), text, ast.parse(text)


def imports(tree: ast.Module) -> set[str]:
    """The top-level names a module imports, wherever in the file."""
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or ".")
    return {module.split(".")[0] for module in modules}


def pins(lock: str) -> dict[str, str]:
    """Name -> version in a lock, as in {"ray": "2.60.0"}."""
    text = (ROOT / f"requirements/{lock}.lock").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}


def test_import_rules_hold() -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def modules() -> dict[str, set[str]]:
    """Every module of the project that is shipped or measures, and the modules of the project that it imports."""
    names = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
        for folder in [*PACKAGES, "benchmarks"]
        for path in (ROOT / folder).rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        asked: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                asked |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        found[name] = {one for one in asked & names.keys() if one != name and not name.startswith(f"{one}.")}
    return found


def test_no_file_imports_itself_by_a_detour() -> None:
    """Benchmarks too, where import-linter does not look; imports within functions count."""
    graph = modules()
    assert len(graph) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_of_launch_are_joined_by_few_doors() -> None:
    doors = {
        (name.split(".")[1], one.split(".")[1])
        for name, asked in modules().items()
        for one in asked
        if name.startswith("launch.") and one.startswith("launch.")
    }
    assert len([door for door in doors if door[0] != door[1]]) <= 30


def test_pages_name_files_tests_and_modules_that_exist() -> None:
    """What has moved, moves in the pages too; the log and the changelog tell of other days."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = {f"/{name}" for name in listed if (ROOT / name).is_file()}
    known, missing = set(modules()), list[str]()
    rooms = {name.split(".")[0] for name in known} - {"learner", "benchmarks"}  # settings and pages have these names
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text() if page.name != "log.md" else ""
        for path, test in re.findall(r"`([\w./-]+\.py)(?:::(\w+))?", text):
            found = [name for name in files if name.endswith(f"/{path}")]
            has = not test or any(re.search(rf"(def|class) {test}", (ROOT / name[1:]).read_text()) for name in found)
            missing += [f"{page.name}: {path} {test}"] if not found or not has else []
        for name in re.findall(rf"`((?:{'|'.join(rooms)})(?:\.\w+)+)`", text):
            parts = name.split(".")
            here = any(".".join(parts[:n]) in known for n in range(2, len(parts) + 1))
            missing += [] if here else [f"{page.name}: {name}"]
    assert not missing, missing


def test_the_library_imports_nothing_but_torch_numpy_and_digests() -> None:
    allowed = sys.stdlib_module_names | {"opd", "torch", "numpy", "jaxtyping", "xxhash"}
    strangers = {f"{path} imports {name}" for path, _, tree in sources("opd") for name in imports(tree) - allowed}
    assert not strangers


def test_the_metadata_names_what_the_code_imports() -> None:
    extras = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    declared = {canonicalize_name(Requirement(text).name) for text in [*PROJECT["dependencies"], *extras]}
    # Also where the CPU build is installed, and without a kernel that only GPUs have.
    distributions = packages_distributions() | {"vllm": ["vllm"], "liger_kernel": ["liger-kernel"]}
    known = sys.stdlib_module_names | {*PACKAGES}
    missing = {
        f"{path} imports {name}"
        for path, _, tree in sources(*PACKAGES)
        for name in imports(tree) - known
        if not declared & {canonicalize_name(found) for found in distributions.get(name, [])}
    }
    assert not missing


def test_files_and_functions_stay_short() -> None:
    long = []
    for path, text, tree in sources(*PACKAGES):
        if (lines := len(text.splitlines())) > 400:
            long.append(f"{path} has {lines} lines; 400 are allowed")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
                long.append(f"{path}: {node.name} has {lines} lines; 60 are allowed")
    assert not long, "\n".join(long)


def test_every_module_says_what_it_is_for() -> None:
    folders = [*PACKAGES, "benchmarks", "scripts", "tests"]
    silent = [path for path, _, tree in sources(*folders) if not ast.get_docstring(tree)]
    assert not silent


def test_the_wheel_names_every_package() -> None:
    tree = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for package in [*PACKAGES]
        for path in (ROOT / package).rglob("__init__.py")
    }
    listed = tomllib.loads(PYPROJECT)["tool"]["setuptools"]["packages"]
    assert set(listed) == tree | {"launch.assets", "launch.conf"}


def test_the_cpu_build_of_vllm_stays_out_of_the_metadata() -> None:
    assert "vllm-cpu" not in PYPROJECT


def test_one_version_of_vllm_and_of_torch() -> None:
    extra = [f"vllm=={pins('vllm-cpu')['vllm-cpu']}", f"liger-kernel=={pins('gpu')['liger-kernel']}"]
    assert PROJECT["optional-dependencies"]["gpu"] == extra
    assert pins("torch-cpu") == {"torch": "2.13.0+cpu"}
    assert pins("gpu")["torch"] == "2.13.0"


def test_cpu_and_gpu_run_the_same_versions() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert different <= DIFFERS_ON_GPU


def test_the_locks_satisfy_the_metadata() -> None:
    locked = pins("cpu") | pins("torch-cpu") | pins("dev")
    tried = [text for name, extra in PROJECT["optional-dependencies"].items() if name != "gpu" for text in extra]
    for text in [*PROJECT["dependencies"], *tried]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), text


@pytest.mark.parametrize("lock", HASHED_LOCKS)
def test_every_pin_has_a_hash(lock: str) -> None:
    lines = (ROOT / f"requirements/{lock}.lock").read_text().splitlines()
    for pin, following in zip(lines, [*lines[1:], ""], strict=True):
        if "==" in pin:
            assert pin.endswith(" \\") and following.startswith("    --hash=sha256:"), pin


READS_MODELS = {"from_pretrained", "load_file", "safe_open"}
MODEL_FILES = {"config.json", "model.safetensors", "model.safetensors.index.json", "*.safetensors"}
READ_OUTSIDE_HF = {
    "demos/recipes/evaluate_task.py": {"from_pretrained"},  # a recipe is a page of plain transformers
    "demos/recipes/pretrain.py": {"model.safetensors"},  # it has just written it
    "learner/checkpoints/checkpoint.py": {"safe_open"},  # the learner's own shards
    "teacher_service/backends/torch_forward.py": {"load_file"},  # what a teacher that follows the student has saved
}


def reads_of_models(tree: ast.Module) -> set[str]:
    """What opens a model folder in a module: calls into safetensors and transformers, and names of files."""
    found = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found |= {name} & READS_MODELS
            case ast.Constant(value=str(text)):
                found |= {text} & MODEL_FILES
    return found


def test_model_folders_are_opened_in_hf_alone() -> None:
    rooms = [package for package in PACKAGES if package != "hf"]
    found = {path: reads for path, _, tree in sources(*rooms) if (reads := reads_of_models(tree))}
    assert found == READ_OUTSIDE_HF


# What makes a test fail by chance, or only after others: the forms of it that a reader can see.

WAITS = {"tests/processes.py"}  # whose waits have deadlines
SETS_VARIABLES = {"tests/command.py", "tests/small_learner.py", "tests/mutants/trials.py"}  # and puts them back
CHANGES = {"update", "setdefault", "pop", "clear"}


def polls(tree: ast.Module) -> Iterator[int]:
    """Lines of loops that sleep until something holds."""
    for loop in (node for node in ast.walk(tree) if isinstance(node, ast.While)):
        for node in ast.walk(loop):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep"):  # no coroutine's
                yield loop.lineno


def changed_variables(tree: ast.Module) -> Iterator[int]:
    """Lines of functions that change the environment of their process. (What a module sets holds for all tests.)"""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (node for function in functions for node in ast.walk(function)):
        match node:
            case ast.Assign(targets=[ast.Subscript(value=changed)]) | ast.AugAssign(target=changed):
                name = changed
            case ast.Delete(targets=[ast.Subscript(value=changed)]):
                name = changed
            case ast.Call(func=ast.Attribute(value=changed, attr=attr)) if attr in CHANGES:
                name = changed
            case _:
                continue
        if ast.unparse(name) == "os.environ":
            yield node.lineno


@pytest.mark.parametrize(
    ("text", "waits", "sets"),
    [
        ("while not path.exists():\n    time.sleep(0.1)", [1], []),
        ("for _ in range(9):\n    time.sleep(0.1)", [], []),
        ("os.environ['A'] = '1'", [], []),
        ("def f():\n    os.environ['A'] = '1'\n    os.environ |= more", [], [2, 3]),
        ("def f():\n    del os.environ['A']\n    os.environ.setdefault('A', '1')\n    os.environ.get('A')", [], [2, 3]),
    ],
)
def test_what_fails_by_chance_is_seen(text: str, waits: list[int], sets: list[int]) -> None:
    tree = ast.parse(text)
    assert (list(polls(tree)), sorted(changed_variables(tree))) == (waits, sets)


def test_tests_wait_with_a_deadline_and_leave_the_environment_as_it_was() -> None:
    found = list[str]()
    for file in sorted((ROOT / "tests").rglob("*.py")):
        path, text = str(file.relative_to(ROOT)), file.read_text()
        if "while " in text and path not in WAITS and "/fuzz/" not in path and "/mutants/" not in path:
            found += [f"{path}:{line} polls; use tests.processes.wait_until" for line in polls(ast.parse(text))]
        if "os.environ" in text and path not in SETS_VARIABLES:
            lines = changed_variables(ast.parse(text))
            found += [f"{path}:{line} sets a variable; use monkeypatch.setenv" for line in lines]
    assert not found, "\n".join(found)
