"""Who may import whom, and which calls nobody may make: read from the syntax trees, without importing anything."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted((ROOT / "ogls").rglob("*.py"))

# Each room, and those that it may import from. Text and tensors are two columns without an arrow between them.
TEXT, TENSORS = ["records", "system", "tasks"], ["records", "system", "loss"]
STEP = [*TEXT, *TENSORS, "lessons", "policy", "rollout", "methods", "algorithm"]
ROOMS = {
    "records": [],
    "system": ["records"],
    "tasks": TEXT,
    "loss": TENSORS,
    "lessons": [*TEXT, "lessons"],
    "policy": [*TENSORS, "policy"],
    "rollout": [*TEXT, "lessons", "policy", "rollout"],
    "methods": [*TEXT, *TENSORS, "lessons", "policy", "methods"],
    "algorithm": STEP,
    "planner": STEP,
    "module": [*STEP, "data", "planner"],
    "data": STEP,
    "testing": TENSORS,
    "tracking": [*TEXT, "tracking"],
    "callbacks": ["records", "system", "tracking", "callbacks"],
    "sweep": ["records", "system", "tracking", "callbacks", "sweep"],
    "sharded": ["policy"],
    "training": ["system", "data", "module", "tracking", "callbacks", "sharded"],
    "export": ["policy", "tracking", "callbacks"],
    "generate": ["records", "system", "lessons", "tracking", "export"],
    "serve": ["system", "rollout", "cli"],
    "help": [""],
    "cli": [*STEP, "module", "data", "tracking", "callbacks", "training", "sharded", "export", "generate", "help"],
    "": [],  # `import ogls` loads what it gives when it is asked for
}
LIBRARIES = {  # and the rooms that may use them
    "lightning": {"module", "data", "callbacks", "tracking", "training", "sharded", "cli"},
    "torch": {
        "system",
        "loss",
        "policy",
        "rollout",
        "methods",
        "algorithm",
        "module",
        "data",
        "callbacks",
        "testing",
        "sharded",
        "serve",
    },
    "vllm": {"rollout"},
    "triton": {"loss", "policy"},
    "mlflow": {"tracking"},
    "optuna": {"sweep"},
    "transformers": {"policy"},
    "peft": {"policy"},
}
IN_VLLM = {"rollout.file_transfer"}  # which vLLM imports
LAZY = {"vllm", "mlflow", "transformers", "peft", "datasets", "reasoning_gym", "math_verify"}  # slow to import


def name(path: Path) -> str:
    """`ogls/rollout/engine.py` -> `rollout.engine`; a package's `__init__.py` -> the package."""
    parts = path.relative_to(ROOT / "ogls").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, lazy: bool) -> set[str]:
    """Modules imported by a file, those for type checkers aside; with `lazy`, also those imported inside functions."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if for_types or (not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            skipped |= set(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path, lazy: bool = True) -> set[str]:
    """The project's modules that a file imports."""
    known = {name(p) for p in PRODUCT}
    wanted = {i.removeprefix("ogls.") for i in imports(path, lazy) if i.startswith("ogls.")}
    return {i if i in known else i.rpartition(".")[0] for i in wanted}


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_imports_go_one_way(path: Path) -> None:
    own = room(name(path))
    assert {room(module) for module in ours(path)} <= {*ROOMS[own], own}
    for library in {module.partition(".")[0] for module in imports(path, lazy=True)} & LIBRARIES.keys():
        assert own in LIBRARIES[library], f"{library} in {own}"
    if name(path) not in IN_VLLM:
        assert not {module.partition(".")[0] for module in imports(path, lazy=False)} & LAZY


def test_no_cyclic_imports() -> None:
    TopologicalSorter({name(path): ours(path, lazy=False) - {name(path)} for path in PRODUCT}).prepare()


def test_the_step_fits_on_a_page() -> None:
    assert len((ROOT / "ogls" / "algorithm.py").read_text().splitlines()) <= 200


FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN |= {
    *{"marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "cloudpickle.load", "pd.read_pickle"},
    *{"torch.hub.load", "torch.package.PackageImporter", "runpy.run_path", "os.popen", "pickle.Unpickler"},
    "sympify",
    "sympy.sympify",
    "parse_expr",
    "sympy.parse_expr",
    "os.system",
    "torch.jit.load",
    "joblib.load",
}


# The verifier that the parent process itself sends down a socket pair before any text is graded; run.py of a trial.
EXCEPTIONS = {("ogls/tasks/grading_worker.py", "pickle.load"), ("ogls/system/attached.py", "runpy.run_path")}
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("ogls", "experiments", "analysis", "sweeps")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@pytest.mark.fault("model text executed")
@pytest.mark.parametrize("file", SOURCES)
def test_nothing_runs_or_unpickles_what_it_reads(file: str) -> None:
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom):  # or a call would not show where its function is from
            assert node.module not in UNSAFE, f"{file}:{node.lineno}: from {node.module} import"
        if isinstance(node, ast.Import):
            assert not any(a.asname and a.name in UNSAFE for a in node.names), f"{file}:{node.lineno}: renamed"
        if not isinstance(node, ast.Call):
            continue
        called, where = ast.unparse(node.func), f"{file}:{node.lineno}"
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in FORBIDDEN or (file, called) in EXCEPTIONS, f"{where}: {called}"
        assert options.get("shell") != "True", f"{where}: a shell"
        assert options.get("trust_remote_code", "False") == "False", f"{where}: code from a model's repository"
        if called == "torch.load":
            assert options.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"
        assert options.get("allow_pickle", "False") == "False", f"{where}: numpy's pickles"
