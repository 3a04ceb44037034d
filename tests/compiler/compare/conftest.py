"""Graphs that passes are compared on: a small one written by hand, and a real export."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_passes import SPEC
from small_denoiser import make_denoiser

from sdc.compiler.build.built import save_onnx
from sdc.compiler.compare.exported import ExportedGraph, exported_graph
from sdc.compiler.stages import Source
from sdc.compiler.workshop.cache import StageCache
from sdc.compiler.workshop.progress import Silent
from sdc.engines.targets import TARGETS


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    save_onnx(make_denoiser(), path)
    return ExportedGraph(SPEC, path, "a small network")


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> StageCache:
    return StageCache(tmp_path_factory.mktemp("cache") / "stages")


@pytest.fixture(scope="session")
def decoder(minimal_folder: Path, stages: StageCache) -> ExportedGraph:
    """A real export with norms and attention."""
    source = Source(str(minimal_folder))
    return exported_graph(source, "vae_decoder", TARGETS["cpu"], cache=stages, progress=Silent())
