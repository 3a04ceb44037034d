"""Where there are no CPU kernels, pictures are the same, and `sdc doctor` says why there are none."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.metrics import psnr
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.workshop.cache import StageCache
from sdc.engines.kernels.build import build_kernels
from sdc.engines.processor import CPUINFO
from sdc.engines.targets import parse_targets

PROGRAM = textwrap.dedent(
    """
    import json, logging, sys
    import numpy as np
    from sdc.compiler.cli.doctor import describe
    from sdc.compiler.doctor import diagnose
    from sdc.engines import load

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    with load(sys.argv[1], "cpu") as pipeline:
        # Attention over 1024 tokens is large enough for the kernels, that of 32x32 pixels is not.
        options = dict(steps=3, guidance_scale=1.9, seed=3, height=128, width=128)
        plan = pipeline.plan("a photo of a red sneaker on a white background", **options)
        np.save(sys.argv[2], pipeline.decode(pipeline.denoise(plan)))
    print(next(line for line in describe(diagnose()) if line.startswith("Kernels")))
    """
)


@dataclass(frozen=True)
class Drawn:
    """A picture, what doctor says of kernels, and what was logged."""

    picture: np.ndarray
    doctor: str
    log: str


@pytest.fixture(scope="module")
def bundle(kernels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    request = ExportRequest(Source("tiny"), PrecisionRequest("bf16"), parse_targets("cpu"), folder / "bundle")
    export_bundle(request, cache=StageCache(folder / "cache"))
    return folder / "bundle"


@pytest.fixture(scope="module")
def with_kernels(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    drawn = draw(bundle, tmp_path_factory.mktemp("with"), {})
    assert drawn.doctor.endswith(": built")
    assert "attentions run in the CPU kernels" in drawn.log
    return drawn.picture


def draw(bundle: Path, folder: Path, variables: dict[str, str], *, before: tuple[str, ...] = ()) -> Drawn:
    """Draw in a process of its own, with other environment variables, started by a command in front of it."""
    picture = folder / "picture.npy"
    ran = subprocess.run(
        [*before, sys.executable, "-c", PROGRAM, str(bundle), str(picture)],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)} | variables,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return Drawn(np.load(picture), ran.stdout.strip(), ran.stderr)


def check_same(drawn: Drawn, with_kernels: np.ndarray, reason: str) -> None:
    """The picture is as near to the one with kernels as bf16 goes, and was drawn without; doctor says why."""
    assert "attentions run in the CPU kernels" not in drawn.log
    assert not np.array_equal(drawn.picture, with_kernels)
    assert psnr(drawn.picture, with_kernels, data_range=2.0) > 45
    assert f"none: {reason}" in drawn.doctor


def failing_compiler(folder: Path) -> str:
    """A PATH with a compiler that only tells its version."""
    folder.mkdir()
    compiler = folder / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "error: none today" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    return str(folder)


def test_switched_off(bundle, with_kernels, tmp_path):
    check_same(draw(bundle, tmp_path, {"SDC_KERNELS": "0"}), with_kernels, "they are switched off by SDC_KERNELS=0")


def test_without_a_compiler(bundle, with_kernels, tmp_path):
    drawn = draw(bundle, tmp_path, {"PATH": str(tmp_path)})
    check_same(drawn, with_kernels, "there is no C++ compiler (c++, g++, clang++) on the PATH")


def test_compiler_fails(bundle, with_kernels, tmp_path):
    path = failing_compiler(tmp_path / "bin")
    drawn = draw(bundle, tmp_path, {"PATH": path, "SDC_CACHE": str(tmp_path / "cache")})
    check_same(drawn, with_kernels, f"{path}/c++ failed: error: none today")


def test_library_is_damaged_and_cannot_be_built_again(bundle, with_kernels, tmp_path, monkeypatch):
    path = failing_compiler(tmp_path / "bin")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("SDC_CACHE", str(tmp_path / "cache"))
    assert "none today" in str(build_kernels())
    (folder,) = (tmp_path / "cache" / "kernels").iterdir()
    (folder / "libsdc_kernels.so").write_bytes(b"\x7fELF")
    (folder / "libsdc_kernels.sha256").write_text("0" * 64)
    check_same(draw(bundle, tmp_path, {}), with_kernels, f"{path}/c++ failed: error: none today")


def test_processor_without_avx512_bf16(bundle, with_kernels, tmp_path):
    """Another /proc/cpuinfo is mounted over this machine's, for one process alone."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.read_text().replace(" avx512_bf16", ""))
    mount = f'mount --bind {cpuinfo} {CPUINFO} && exec "$@"'
    before = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if subprocess.run([*before, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody mount in a namespace of one's own")
    check_same(draw(bundle, tmp_path, {}, before=before), with_kernels, "the processor has no avx512_bf16")
