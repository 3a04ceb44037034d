"""Ablation and bisection of a UNet that work is hoisted out of, and of its int8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import pytest

from sdc.compiler import hoisting
from sdc.compiler.compare import ablation as ablation_module
from sdc.compiler.compare.ablation import Ablation, AblationRow, ablate
from sdc.compiler.compare.ablation_page import ablation_page
from sdc.compiler.compare.bisection import bisect_passes
from sdc.compiler.compare.exported import ExportedGraph, exported_graph
from sdc.compiler.compare.pass_report import format_ablation
from sdc.compiler.compare.variants import HOIST, Phase, all_phases
from sdc.compiler.component import Component
from sdc.compiler.stages import Source
from sdc.compiler.workshop.cache import StageCache
from sdc.compiler.workshop.progress import Silent
from sdc.engines.errors import InputError
from sdc.engines.targets import TARGETS
from sdc.passes.base import Pass, PassReport, run_passes


@dataclass(frozen=True)
class Together(Pass):
    """Several passes as one, which has one row."""

    passes: tuple[Pass, ...]
    name: ClassVar[str] = "together"

    def rewrite(self, model: ir.Model) -> PassReport:
        run_passes(self.passes, model)
        return PassReport(self.name, 1)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before the precision is one row of an ablation."""

    def phases(*args: Any, **options: Any) -> tuple[Phase, ...]:
        *before, precision, lowering = all_phases(*args, **options)
        together = Together(tuple(each for phase in before for each in phase.passes))
        return (Phase("before", (together,)), precision, lowering)

    monkeypatch.setattr(ablation_module, "all_phases", phases)


def hoisted_row(found: Ablation) -> AblationRow:
    assert found.rows[-1].passes[-1] == HOIST
    return found.rows[-1]


@pytest.fixture(scope="module")
def unet(minimal_folder: Path, stages: StageCache) -> ExportedGraph:
    """A UNet with a calibration, as `sdc export` makes it."""
    source = Source(str(minimal_folder))
    return exported_graph(source, "unet", TARGETS["cpu"], precision="int8", cache=stages, progress=Silent())


@pytest.mark.usefixtures("few_rows")
def test_the_last_row_is_the_engine_of_each_step(unet: ExportedGraph) -> None:
    found = ablate(replace(unet, table=None), TARGETS["ort-cpu"], rounds=1, threads=1)
    last, before = hoisted_row(found), found.rows[-2]
    assert last.relative_rms is not None
    assert last.relative_rms < 1e-5
    assert last.nodes < before.nodes
    assert last.execution is not None
    assert before.execution is not None
    assert last.execution.count < before.execution.count
    assert list(last.beside_seconds or {}) == ["unet_prompt", "unet_timestep"]
    assert all(row.beside_seconds is None for row in found.rows[:-1])
    assert "unet_timestep" in format_ablation(found)
    assert "once a timestep" in ablation_page(found)
    assert set(found.to_json()["rows"][-1]["beside_seconds"]) == {"unet_prompt", "unet_timestep"}


def test_what_is_wrong_in_a_hoisted_engine_shows(unet: ExportedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hoisting.hoist_component

    def break_part(component: Component) -> object:
        components, report = real(component)
        for node in components[2].model.graph:
            if node.op_type == "Gemm":
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
        return components, report

    monkeypatch.setattr("sdc.compiler.compare.judge.hoist_component", break_part)
    phases = all_phases("unet", "fp32", TARGETS["ort-cpu"])
    found = bisect_passes(unet, phases, TARGETS["ort-cpu"], threads=1, hoist=True)
    assert found.broken == HOIST
    assert found.steps[-1].error > 1e-3


def test_a_sound_unet_keeps_the_tolerance_hoisted_too(unet: ExportedGraph) -> None:
    found = bisect_passes(unet, all_phases("unet", "fp32", TARGETS["cpu"]), TARGETS["cpu"], threads=1, hoist=True)
    assert found.broken is None
    assert [step.name for step in found.steps[-3:]] == ["engine: cpu", HOIST, "engine: cpu, hoisted"]


@pytest.mark.usefixtures("few_rows")
def test_int8_is_compared_with_the_exported_graph(unet: ExportedGraph) -> None:
    found = ablate(unet, TARGETS["cpu"], precision="int8", rounds=1, threads=1)
    errors = {row.passes[-1]: row.relative_rms or 0.0 for row in found.rows[1:]}
    assert 1e-4 < errors["precision: insert-qdq"] < 0.1
    assert 1e-4 < errors[HOIST] < 0.1
    phases = all_phases("unet", "int8", TARGETS["cpu"], table=unet.table)
    strict = bisect_passes(unet, phases, TARGETS["cpu"], threads=1, hoist=True)
    assert strict.broken == "precision: insert-qdq"
    kept = bisect_passes(unet, phases, TARGETS["cpu"], tolerance=0.5, threads=1, hoist=True)
    assert kept.broken is None


def test_int8_without_a_calibration_is_refused(graph: ExportedGraph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 quantising passes"):
        ablate(graph, TARGETS["cpu"], precision="int8")
    cache = StageCache(tmp_path / "cache")
    for model, component, message in (
        (str(graph.path), "unet", "cannot be calibrated"),
        ("tiny", "vae_decoder", "unet alone"),
    ):
        with pytest.raises(InputError, match=message):
            exported_graph(Source(model), component, TARGETS["cpu"], precision="int8", cache=cache, progress=Silent())
