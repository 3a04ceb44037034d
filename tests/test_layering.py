"""The arrows of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "peft", "accelerate", "polygraphy"}
BACKENDS = {"openvino", "onnxruntime", "tensorrt_rtx", "tensorrt", "cuda"}
FORBIDDEN = {
    "engines": {"sdc.passes", "sdc.compiler", *HEAVY},
    "passes": {"sdc.compiler", "torch", "diffusers", "transformers", *BACKENDS},
    "compiler": set(),
}


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether the import stands at the top level."""
    tree = ast.parse(path.read_text(), str(path))
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield name, id(node) in top_level


def under(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"no Python file in {room}/"
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_what_they_may(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(room)
        for name, _ in imports_of(path)
        if under(name, FORBIDDEN[room])
    ]
    assert not wrong


def test_passes_know_only_the_errors_of_the_runtime() -> None:
    allowed = ("sdc.passes", "sdc.engines.errors")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files("passes")
        for name, _ in imports_of(path)
        if name.startswith("sdc.") and not name.startswith(allowed)
    ]
    assert not wrong


def test_backends_are_imported_by_their_own_session_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files("engines")
        for name, top_level in imports_of(path)
        if under(name, BACKENDS) and (top_level and path.parent.name != "sessions")
    ]
    assert not wrong


def test_the_runtime_loads_no_compiler_library() -> None:
    program = (
        "import sys, sdc.engines, sdc.engines.pipeline, sdc.engines.bundle, sdc.compiler.cli.run\n"
        f"print(sorted({HEAVY | BACKENDS!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_export_leaves_torch_to_its_workers() -> None:
    """The process that gives the stages out lives as long as the export; torch would cost it seconds and 200 MB."""
    program = "import sys, sdc.compiler.compile, sdc.compiler.cli.export\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
