"""What the wheel holds: the import package `sdc` and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE_DATA_LIMIT_BYTES = 25_000_000


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """File names in the wheel with their sizes in bytes."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_the_wheel_holds_only_sdc(wheel_names: dict[str, int]) -> None:
    tops = {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name}
    assert tops == {"sdc"}
    assert "sdc/__init__.py" not in wheel_names, "sdc is a namespace package"


def test_every_module_and_data_file_is_in_the_wheel(wheel_names: dict[str, int]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "compiler", "passes", "engines"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    missing = {f"sdc/{name}" for name in tracked if name} - set(wheel_names)
    assert not missing


def test_the_trained_model_is_small(wheel_names: dict[str, int]) -> None:
    size_bytes = sum(size for name, size in wheel_names.items() if name.startswith("sdc/compiler/models/"))
    assert 0 < size_bytes <= PACKAGE_DATA_LIMIT_BYTES
