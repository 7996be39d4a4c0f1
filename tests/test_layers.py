"""The arrow of imports: kernels <- ops <- passes <- the rest; LEAVES below all; Triton only in kernels."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RANKS = {"kernels": 0, "ops": 1, "passes": 2}
LEAVES = {"bounds", "errors", "plan", "timings"}
REST = 3

# sympy comes with torch and speaks for its symbolic shapes; mpmath, its arithmetic, comes with it.
CORE = {"torch", "packaging", "sympy", "mpmath", "sparsify"}
EXTRAS = {
    "exporters/decoder.py": {"transformers"},
    "exporters/onnx.py": {"onnx", "onnx_ir", "onnxruntime", "google"},
    "exporters/onnx_translate.py": {"onnx", "onnx_ir", "onnxscript"},
    "exporters/tensorrt.py": {"onnx_ir", "onnxscript"},
    "exporters/tensorrt_segments.py": {"torch_tensorrt"},
    "cli.py": {"typer", "rich", "transformers"},
    "models/loading.py": {"transformers", "safetensors"},
    "models/tasks.py": {"numpy", "tokenizers"},
}

SOURCES = {
    path.relative_to(ROOT / "sparsify").as_posix(): ROOT / "sparsify" / path.relative_to(ROOT / "sparsify")
    for folder in ("", "ops", "passes", "kernels", "models", "calibration", "exporters")
    for path in sorted((ROOT / "sparsify" / folder).glob("*.py"))
}


def imported(path: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether as soon as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = set(tree.body)
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write sparsify.<module>"
            assert node.module is not None
            if node.module in ("sparsify", "sparsify.kernels"):
                found += [(f"{node.module}.{alias.name}", node in at_once) for alias in node.names]
            else:
                found.append((node.module, node in at_once))
    return found


def with_importers(names: set[str]) -> set[str]:
    """These kernel files, and those that import one of them as soon as they are imported themselves."""
    modules = {"sparsify." + name.removesuffix(".py").replace("/", ".") for name in names}
    found = names | {name for name, path in SOURCES.items() if name.startswith("kernels/")
                     and any(at_once and module in modules for module, at_once in imported(path))}
    return found if found == names else with_importers(found)


LAUNCHERS = with_importers({name for name, path in SOURCES.items() if name.startswith("kernels/")
                            and any(module.split(".")[0] == "triton" for module, _ in imported(path))})
"""The files that launch Triton kernels: only they import it, and nothing imports them before a CUDA op runs."""


def rank(module: str) -> int:
    """Layer of a module of sparsify, by its dotted or slashed name without `sparsify.`."""
    return RANKS.get(module.replace("/", ".").split(".")[0], REST)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name):
    own = name.removesuffix(".py")
    for module, _ in imported(SOURCES[name]):
        if not module.startswith("sparsify."):
            continue
        target = module.removeprefix("sparsify.").split(".")[0]
        if target in LEAVES or target.startswith("__"):
            continue
        assert own not in LEAVES, f"{name} is a leaf and imports {module}"
        assert rank(target) <= rank(own), f"{name} imports {module}, which is above it"


@pytest.mark.parametrize("name", SOURCES)
def test_only_declared_packages_are_imported(name):
    allowed = CORE | set(sys.stdlib_module_names) | EXTRAS.get(name, set())
    allowed |= {"triton"} if name in LAUNCHERS else set()
    foreign = {module.split(".")[0] for module, _ in imported(SOURCES[name])} - allowed
    assert not foreign, f"{name} imports {sorted(foreign)}"


def test_there_are_launchers():
    assert {"kernels/attend.py", "kernels/hopper.py"} <= LAUNCHERS  # the second by what it imports
    assert not {"kernels/native.py", "kernels/rule.py"} & LAUNCHERS


@pytest.mark.parametrize("name", sorted(set(SOURCES) - LAUNCHERS))
def test_launchers_are_imported_when_a_cuda_op_runs_not_before(name):
    modules = {launcher.removesuffix(".py").replace("/", ".") for launcher in LAUNCHERS}
    early = [module for module, at_once in imported(SOURCES[name])
             if at_once and module.removeprefix("sparsify.") in modules]
    assert not early


def test_import_sparsify_is_cheap():
    code = "import sys, sparsify; print(*{'torch', 'triton', 'transformers', 'typer', 'numpy'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []
