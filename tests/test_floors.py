"""Tests of imports: they run downward only, heavy modules load on use, and `comm` is ours only in the checkout."""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

# Not `evaluate`: lm-evaluation-harness imports Hugging Face's package of that name.
FLOORS = {
    "base": 0,
    "kernels": 1,
    "comm": 2,
    "data": 2,
    "model": 3,
    "dualpipe": 3,
    "score": 4,
    "infer": 5,
    "evaluation": 6,
    "train": 7,
    "planner": 8,
    "verify": 8,
    "launch": 9,
}
BEFORE_RUN = ("planner/", "verify/")
HEAVY = ("deepspeed", "triton", "wandb", "matplotlib")


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yields every module that a source imports, and whether it is imported at module level."""

    def visit(node: ast.AST, top_level: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, top_level
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level, top_level
            for alias in node.names:
                yield f"{node.module}.{alias.name}", top_level
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(node)
            yield from visit(child, top_level and not inside)

    yield from visit(ast.parse(source), True)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def breaches(path: str, source: str) -> list[str]:
    """Returns a file's violations of the import rules."""
    package = path.split("/")[0]
    found = []
    for module, top_level in imports(source):
        other = module.split(".")[0]
        if module.startswith("."):
            found.append(f"{path}: relative import; write the package's name")
        if other in FLOORS and other != package and FLOORS[other] > FLOORS[package]:
            found.append(f"{path}: {package} is below {other}, imports {module}")
        if other in ("tests", "bench"):
            found.append(f"{path}: no source imports tests or programs, imports {module}")
        if {package, other} == {"model", "dualpipe"}:
            found.append(f"{path}: model and dualpipe never import each other, imports {module}")
        if (package, other) == ("infer", "score") and path != "infer/protocol.py":
            found.append(f"{path}: only infer/protocol.py knows scores, imports {module}")
        if package == "model" and other == "comm" and not may_know(path, module):
            found.append(f"{path}: model knows only protocols and pure functions of comm, imports {module}")
        if is_in(module, "torch.distributed") and not may_communicate(path):
            found.append(f"{path}: imports {module}")
        if is_in(module, "hydra", "omegaconf") and package != "launch":
            found.append(f"{path}: imports {module}")
        if top_level and is_in(module, *HEAVY) and not may_be_heavy(path, module):
            found.append(f"{path}: imports {module} at its top, before it is needed")
    return found


def may_know(path: str, module: str) -> bool:
    """Allows the import because `load_hf` returns a model for one process, which needs the local dispatcher."""
    is_home = path == "model/pretrained.py" and is_in(module, "comm.dispatch.local")
    return is_home or is_in(module, "comm.protocol")


def may_communicate(path: str) -> bool:
    # launch/ranks/local.py uses torch's launcher, which is in this package; it opens no process group.
    return path.startswith(("comm/", "train/", "verify/")) or path in (
        "planner/fake_world.py",
        "dualpipe/runtime/execute.py",
        "dualpipe/runtime/torch.py",
        "dualpipe/runtime/torch_checks.py",
        "launch/ranks/local.py",
    )


def may_be_heavy(path: str, module: str) -> bool:
    """Modules for a heavy library, which are themselves imported where they are used."""
    is_kernel = re.fullmatch(r"kernels/\w+/\w+\.py", path) is not None
    return (is_kernel and is_in(module, "triton")) or (path.startswith("train/optim/") and is_in(module, "deepspeed"))


def sources() -> list[Path]:
    return sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))


@pytest.mark.slow
def test_floors_no_file_imports_upward() -> None:
    files = sources()
    assert {path.relative_to(ROOT).parts[0] for path in files} == set(FLOORS)
    broken = [line for path in files for line in breaches(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))]
    assert not broken, "\n".join(broken)


def imported_files() -> dict[str, set[str]]:
    """Returns the files that each file imports when it runs; imports for types alone do not count."""
    files = {path.relative_to(ROOT).as_posix(): path for path in sources()}
    by_module = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in files}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text("utf-8"))
        for_types = {id(part) for node in ast.walk(tree) if is_type_checking(node) for part in ast.walk(node)}
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in for_types]
        modules = [m for node in nodes for m in (node.module, *(f"{node.module}.{a.name}" for a in node.names)) if m]
        graph[name] = {by_module[module] for module in modules if module in by_module} - {name}
    return graph


def circle_of(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.slow
def test_no_files_and_no_folders_import_each_other_in_a_circle() -> None:
    graph = imported_files()
    assert circle_of(graph) == []
    folders: dict[str, set[str]] = {}
    for name, others in graph.items():
        folder = "/".join(name.split("/")[:-1][:2])
        inner = {"/".join(other.split("/")[:-1][:2]) for other in others if other.split("/")[0] == name.split("/")[0]}
        if "/" in folder:
            folders.setdefault(folder, set()).update(other for other in inner - {folder} if "/" in other)
    assert circle_of(folders) == []


def lifted_tops(graph: dict[str, set[str]]) -> list[str]:
    """Returns the files at the top of a package that one of its subfolders imports and that import a subfolder."""
    inner = {
        (name, other) for name, others in graph.items() for other in others if name.split("/")[0] == other.split("/")[0]
    }
    imported = {other for name, other in inner if name.count("/") > 1 and other.count("/") == 1}
    return sorted({name for name, other in inner if name in imported and other.count("/") > 1})


@pytest.mark.slow
def test_what_a_subfolder_imports_from_the_top_imports_no_subfolder() -> None:
    graph = imported_files()
    assert lifted_tops(graph) == []
    graph["train/errors.py"].add("train/files/run_files.py")
    assert lifted_tops(graph) == ["train/errors.py"]


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Returns every file that a file imports, directly or through others."""
    found = set[str]()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


@pytest.mark.slow
def test_no_run_imports_what_is_before_a_run() -> None:
    files = reached(imported_files(), "launch/train.py")
    assert "train/core/step.py" in files
    assert not [name for name in files if name.startswith(BEFORE_RUN)]


def test_an_import_through_other_files_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "a"}, "c": set(), "d": {"a"}}
    assert reached(graph, "a") == {"a", "b", "c"}


def test_a_circle_is_found() -> None:
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
    assert circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.slow
def test_triton_is_imported_only_where_a_kernel_is_compiled() -> None:
    modules = "model.transformer, model.precision.fp8_linears, infer.engines.local, train.run"
    code = f"import sys, {modules}; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("comm/a.py", "import model.config"),
        ("comm/a.py", "from train import config"),
        ("model/a.py", "from dualpipe.ir import Op"),
        ("dualpipe/a.py", "def f():\n    from model import block"),
        ("model/a.py", "from comm import layout"),
        ("model/a.py", "from comm.groups import Groups"),
        ("model/a.py", "from comm.dispatch.local import LocalDispatcher"),
        ("model/a.py", "from comm.context_group import GatherContext"),
        ("model/pretrained.py", "from comm.dispatch.all_to_all import AllToAllDispatcher"),
        ("model/a.py", "import torch.distributed as dist"),
        ("dualpipe/simulation.py", "from torch import distributed"),
        ("score/a.py", "from infer.protocol import Sample"),
        ("infer/a.py", "from score.score import Problem"),
        ("infer/a.py", "from evaluation.protocol import Record"),
        ("train/a.py", "from planner import layouts"),
        ("train/a.py", "from bench.blocks import Workload"),
        ("train/a.py", "from omegaconf import OmegaConf"),
        ("train/a.py", "import deepspeed"),
        ("train/a.py", "try:\n    import wandb\nexcept ImportError:\n    pass"),
        ("data/a.py", "from . import config"),
    ],
)
def test_floors_a_breach_is_found(path: str, source: str) -> None:
    assert len(breaches(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/a.py", "from comm.protocol import Dispatcher"),
        ("model/a.py", "from comm.protocol import ALONE, ContextGroup"),
        ("train/a.py", "from model.config import ModelConfig\nfrom torch import distributed as dist"),
        ("infer/protocol.py", "from score.score import Problem"),
        ("train/a.py", "def f():\n    import wandb"),
        ("dualpipe/runtime/execute.py", "from torch import distributed"),
        ("launch/a.py", "from hydra import compose"),
    ],
)
def test_floors_a_downward_import_is_allowed(path: str, source: str) -> None:
    assert breaches(path, source) == []


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_commands_import_no_torch_before_their_input_is_checked() -> None:
    code = """
        import sys
        import launch.convert, launch.generate, launch.sample, launch.train, launch.schedule, launch.submit
        from launch.config.run import check, compose_run
        from launch.config.compose import user_errors
        check(compose_run(["experiment=quickstart"]))
        user_errors()
        print([name for name in ("torch", "deepspeed", "wandb", "matplotlib") if name in sys.modules])
    """
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_comm_of_the_checkout_is_ours() -> None:
    done = run_python("import comm.protocol; print(comm.__file__)", ROOT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "comm" / "__init__.py"


def test_comm_of_jupyter_is_unchanged_everywhere_else(tmp_path: Path) -> None:
    """Installing this project next to ipykernel must not change any import outside the checkout."""
    pytest.importorskip("ipykernel_launcher")
    done = run_python("import ipykernel.comm, comm; print(comm.__file__); print(comm.create_comm)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(ROOT / "comm"))
    found = run_python(f"import importlib.util as u; print([u.find_spec(name) for name in {list(FLOORS)}])", tmp_path)
    assert found.returncode == 0, found.stderr
    assert not [package for package in FLOORS if f"{ROOT}/{package}/" in found.stdout]


def test_jupyter_starts_a_kernel_in_the_checkout() -> None:
    """The kernel's launcher removes the working folder from the path; a plain `import ipykernel` finds our `comm`."""
    pytest.importorskip("ipykernel_launcher")
    command = [sys.executable, "-m", "ipykernel_launcher", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
