"""Imports point down, and the brain never sees torch: DESIGN section 5, as a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "holdfast"

BASE = {"errors", "config"}
BRAIN = BASE | {"wire", "kv", "core"}
# The layer of a module is its top folder or file, except where a file is named. A layer may import
# itself and what is listed here; ROOF may import everything but is imported by nobody below it.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "sizing": BASE | {"gpu_work"},
    # The table of splits (ops/kernels/decode_config) and of buckets (wire/envelope): no torch.
    "gpu_work": BASE | {"ops", "wire"},
    # The driver's calls by ctypes: keeper and probe have no torch, and both wings are told devices.
    "cuda_driver": {"errors"},
    "wire": BASE,
    "kv": BASE | {"wire"},
    "core": BASE | {"wire", "kv"},
    "local": BRAIN,
    "api": BRAIN,
    # The simulator drives the very state machine that the supervisor does.
    "sim": BRAIN | {"api", "proc.lifecycle"},
    "ops": BASE,
    # ops/checksum and ops/sampler are twins of wire's definitions and take their constants there.
    "model": BASE | {"ops"},
    "device": BASE | {"ops", "model", "wire", "cuda_driver"},
    "proc": BASE | {"wire", "sizing", "core", "cuda_driver", "proc.lifecycle"},
    "proc.lifecycle": BASE | {"wire"},
    "proc.keeper": BASE | {"wire", "cuda_driver", "proc"},
    "proc.core": BRAIN | {"proc"},
    "proc.api": BRAIN | {"api", "proc"},
    "proc.worker": BASE
    | {"ops", "model", "device", "wire", "cuda_driver", "proc", "proc.lifecycle"},
}
# These files of proc are processes of their own, each in its own wing; the rest of proc is plumbing
# that all of them share, so it must not reach a wing's inside. The lifecycle is pure: no plumbing.
ROLES = {"keeper", "core", "api", "worker", "supervisor", "lifecycle"}
ROOF = {"__init__", "__main__", "cli", "llm", "replay", "bench", "drill", "proc.supervisor"}
# model/spec reads config.json and nothing else; it is torch-free so that `plan` starts at once.
TORCH_FREE_EXCEPTIONS = {"holdfast.model.spec"}
TORCH_LAYERS = {"ops", "model", "device", "proc.worker"}
TORCH = {"torch", "triton", "flashinfer", "transformers"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append((".".join(parts), path))
    return found


def layer(module: str) -> str:
    """'holdfast.kv.ledger' -> 'kv'; the roles of proc are layers of their own."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    if parts[0] == "proc" and len(parts) > 1 and parts[1] in ROLES:
        return f"proc.{parts[1]}"
    return parts[0]


def imports(module: str, path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import that runs, wherever in the file it stands."""
    tree = ast.parse(path.read_text(), str(path))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found.extend((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(module.split(".")[: -node.level] + ([base] if base else []))
            # `from holdfast.wire import plan` may name a module: resolve it where it is one.
            for name in node.names:
                inner = PACKAGE.parent / Path(*base.split("."), name.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.append((node.lineno, f"{base}.{name.name}" if is_module else base))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_imports_point_down(module: str, path: Path) -> None:
    own = layer(module)
    if own in ROOF:
        return
    assert own in ALLOWED, f"{module}: layer {own!r} has no rule in tests/test_imports.py"
    for line, target in imports(module, path):
        if target.split(".")[0] != "holdfast" or target == "holdfast":
            continue
        other = layer(target)
        allowed = other == own or other in ALLOWED[own]
        assert allowed, f"{path}:{line}: {own} may not import {other} ({target})"


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_torch_is_imported_only_on_the_device_side(module: str, path: Path) -> None:
    if layer(module) in TORCH_LAYERS and module not in TORCH_FREE_EXCEPTIONS:
        return
    inside_functions = _lines_inside_functions(path)
    for line, target in imports(module, path):
        if target.split(".")[0] not in TORCH:
            continue
        # The roof may reach torch late, inside a function, so that --help and plan stay quick.
        late = layer(module) in ROOF and line in inside_functions
        assert late, f"{path}:{line}: {module} imports {target}"


def _lines_inside_functions(path: Path) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
    return lines


def test_the_brain_imports_with_torch_blocked() -> None:
    brain = [
        name.removesuffix(".__init__")
        for name, _ in modules()
        if layer(name) not in TORCH_LAYERS
        and name.removesuffix(".__init__") not in ("holdfast.__main__",)
    ]
    brain += sorted(TORCH_FREE_EXCEPTIONS)
    script = (
        "import sys\n"
        f"for name in {sorted(TORCH)!r}:\n"
        "    sys.modules[name] = None\n"
        "import importlib\n"
        f"for name in {brain!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_holdfast_does_not_import_torch_and_is_quick_to_name_its_exports() -> None:
    script = (
        "import sys, holdfast\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(sorted(n for n in dir(holdfast) if not n.startswith('_')), holdfast.__version__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LLM" in done.stdout and "SamplingParams" in done.stdout
