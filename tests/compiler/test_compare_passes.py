"""Ablation and bisection over the passes of a small network, with passes broken on purpose."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_denoiser

from sdc.compiler import hoisting
from sdc.compiler.build import BuiltEngine, build_engine
from sdc.compiler.build.built import save_onnx
from sdc.compiler.cli import compare as command
from sdc.compiler.compare import ablation as ablation_module
from sdc.compiler.compare.ablation import Ablation, AblationRow, ablate
from sdc.compiler.compare.ablation_page import ablation_page
from sdc.compiler.compare.bisection import bisect_passes
from sdc.compiler.compare.exported import ExportedGraph, exported_graph
from sdc.compiler.compare.judge import relative_error
from sdc.compiler.compare.pass_report import format_ablation, format_bisection, join_names
from sdc.compiler.compare.structure import StructureDigests
from sdc.compiler.compare.variants import HOIST, Phase, all_phases, build_variants, target_independent_phases
from sdc.compiler.component import Component
from sdc.compiler.stages import MODEL_NAME, Source
from sdc.compiler.workshop.cache import StageCache
from sdc.compiler.workshop.progress import Silent
from sdc.engines.errors import ExportError, InputError, PassError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS, Target
from sdc.passes.base import Pass, PassReport, run_passes

SIDE = DimensionRange(4, 6, 16)
SPEC = ComponentSpec(
    "unet",
    (
        TensorSpec("sample", "float32", ("B", 3, "H", "W")),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("encoder_hidden_states", "float32", ("B", 5, 7)),
    ),
    (TensorSpec("out_sample", "float32", ("B", 3, "H", "W")),),
    {"B": DimensionRange(1, 2, 4), "H": SIDE, "W": SIDE},
)


@dataclass(frozen=True)
class ChangeEpsilon(Pass):
    """Broken: norms forget their epsilon."""

    name: ClassVar[str] = "change-epsilon"

    def rewrite(self, model: ir.Model) -> PassReport:
        for node in model.graph:
            if node.op_type == "GroupNormalization":
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.3)
        return PassReport(self.name, 1)


@dataclass(frozen=True)
class ForgetInput(Pass):
    """Broken: the graph is not valid afterwards."""

    name: ClassVar[str] = "forget-input"

    def rewrite(self, model: ir.Model) -> PassReport:
        node = next(node for node in model.graph if node.op_type == "Conv")
        node.replace_input_with(1, None)
        return PassReport(self.name, 1)


@dataclass(frozen=True)
class Refuse(Pass):
    """A pass that cannot do its work."""

    name: ClassVar[str] = "refuse"

    def rewrite(self, model: ir.Model) -> PassReport:  # noqa: ARG002
        raise PassError("nothing of the kind here")


@dataclass(frozen=True)
class Rename(Pass):
    """Changes names and nothing else."""

    name: ClassVar[str] = "rename"

    def rewrite(self, model: ir.Model) -> PassReport:
        for index, node in enumerate(model.graph):
            node.name = f"other_{index}"
            for value in node.outputs:
                if not value.is_graph_output():
                    value.name = f"other_value_{index}"
        return PassReport(self.name, 1)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    save_onnx(make_denoiser(), path)
    return ExportedGraph(SPEC, path, "a small network")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> StageCache:
    return StageCache(tmp_path_factory.mktemp("cache") / "stages")


@pytest.fixture(scope="module")
def decoder(minimal_folder: Path, stages: StageCache) -> ExportedGraph:
    """A real export with norms and attention."""
    source = Source(str(minimal_folder))
    return exported_graph(source, "vae_decoder", TARGETS["cpu"], cache=stages, progress=Silent())


@pytest.mark.parametrize("target", ["cpu", "ort-cpu"])
def test_sound_passes_keep_the_tolerance(decoder: ExportedGraph, target: str) -> None:
    found = bisect_passes(decoder, all_phases("vae_decoder", "fp32", TARGETS[target]), TARGETS[target], threads=1)
    assert found.broken is None
    assert found.not_run is None
    assert found.steps[0].name == "canonical: inline-functions"
    assert found.steps[-1].name == f"engine: {target}"
    assert 0 < found.steps[-1].error <= 1e-5
    assert [step.name for step in found.steps].count("fusion: fuse-attention") == 1
    assert "keep the relative error within 1e-05" in format_bisection(found)


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_broken_pass_is_named(graph: ExportedGraph, place: int) -> None:
    """Wherever it stands; what follows is not looked at."""
    sound = target_independent_phases("unet", "fp32")[0]
    phases = [Phase("canonical", (*sound.passes[:place], ChangeEpsilon(), *sound.passes[place:]))]
    found = bisect_passes(graph, phases, TARGETS["ort-cpu"], threads=1)
    assert found.broken == "canonical: change-epsilon"
    assert len(found.steps) == place + 1
    assert found.steps[-1].error > 1e-3
    assert all(step.error <= 1e-5 for step in found.steps[:-1])
    assert "broken: canonical: change-epsilon" in format_bisection(found)


def test_a_generous_tolerance_lets_it_pass(graph: ExportedGraph) -> None:
    found = bisect_passes(graph, [Phase("x", (ChangeEpsilon(),))], TARGETS["ort-cpu"], tolerance=100.0, threads=1)
    assert found.broken is None
    assert found.steps[0].error > 1e-3


@pytest.mark.parametrize(("broken", "message"), [(ForgetInput(), "Conv"), (Refuse(), "nothing of the kind")])
def test_a_graph_that_does_not_run_is_broken(graph: ExportedGraph, broken: Pass, message: str) -> None:
    found = bisect_passes(graph, [Phase("x", (Rename(), broken, Rename()))], TARGETS["ort-cpu"], threads=1)
    assert found.broken == f"x: {broken.name}"
    assert len(found.steps) == 2
    assert message in (found.steps[-1].failure or "")
    assert message in format_bisection(found)
    assert found.to_json()["steps"][1]["error"] is None


def test_an_engine_that_differs_is_named(graph: ExportedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is sound, and its backend makes something else of it."""

    def build_another(component: Component, target: Target, folder: Path) -> BuiltEngine:
        ChangeEpsilon().run(component.model)
        return build_engine(component, target, folder)

    monkeypatch.setattr("sdc.compiler.compare.judge.build_engine", build_another)
    found = bisect_passes(graph, [Phase("x", (Rename(),))], TARGETS["cpu"], threads=1)
    assert found.broken == "engine: cpu"
    assert [step.error > 1e-3 for step in found.steps] == [False, True]


def test_an_engine_that_cannot_be_built_is_named(graph: ExportedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> BuiltEngine:
        raise ExportError("OpenVINO refuses the graph")

    monkeypatch.setattr("sdc.compiler.compare.judge.build_engine", refuse)
    found = bisect_passes(graph, [], TARGETS["cpu"], threads=1)
    assert found.broken == "engine: cpu"
    assert "OpenVINO refuses the graph" in format_bisection(found)


def test_an_engine_that_cannot_run_here_is_left_out(decoder: ExportedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdc.compiler.compare.bisection.runnable", lambda _: "there is no GPU")
    found = bisect_passes(decoder, all_phases("vae_decoder", "fp32", TARGETS["rtx"]), TARGETS["rtx"], threads=1)
    assert found.not_run == "there is no GPU"
    assert found.broken is None
    assert found.steps[-1].name == "lowering: check-operators"
    assert "was not run: there is no GPU" in format_bisection(found)


def test_a_tolerance_of_nothing_is_refused(graph: ExportedGraph) -> None:
    with pytest.raises(InputError, match="must be positive"):
        bisect_passes(graph, [], TARGETS["cpu"], tolerance=0.0)


def test_a_source_that_does_not_run_is_refused(tmp_path: Path) -> None:
    model = make_denoiser()
    ForgetInput().run(model)
    save_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="cannot run a broken one"):
        bisect_passes(ExportedGraph(SPEC, tmp_path / "model.onnx", "a broken one"), [], TARGETS["ort-cpu"], threads=1)


def test_relative_errors_have_closed_forms() -> None:
    wanted = {"x": np.array([2.0, -4.0]), "y": np.array([0.0])}
    assert relative_error(wanted, {"x": np.array([2.0, -3.0]), "y": np.array([0.0])}) == 0.25
    assert relative_error(wanted, {"x": wanted["x"], "y": np.array([0.5])}) == 0.5
    assert relative_error(wanted, {"x": wanted["x"]}) == float("inf")
    assert relative_error(wanted, {"x": np.array([2.0]), "y": wanted["y"]}) == float("inf")
    assert relative_error(wanted, {"x": np.array([2.0, np.nan]), "y": wanted["y"]}) == float("inf")
    assert relative_error({"x": np.array([np.nan, 1.0])}, {"x": np.array([5.0, 9.0])}) == float("inf")


def test_only_passes_that_change_the_lowered_graph_get_a_row(graph: ExportedGraph, tmp_path: Path) -> None:
    phases = [Phase("x", (Rename(), ChangeEpsilon(), Rename(), ChangeEpsilon()))]
    found = build_variants(graph, phases, TARGETS["ort-cpu"], tmp_path)
    assert [row.passes for row in found.rows] == [(), ("x: rename", "x: change-epsilon")]
    assert found.idle == ("x: rename", "x: change-epsilon")
    assert all(row.source is not None and row.engine_bytes > 0 for row in found.rows)


def test_what_runs_nowhere_is_not_built(graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdc.compiler.compare.variants.runnable", lambda _: "there is no GPU")
    found = build_variants(graph, [Phase("x", (ChangeEpsilon(),))], TARGETS["rtx"], tmp_path)
    assert [row.source for row in found.rows] == [None, None]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["cpu", "ort-cpu"])
def test_an_ablation_has_a_row_for_each_fusion(decoder: ExportedGraph, target: str) -> None:
    found = ablate(decoder, TARGETS[target], rounds=3, threads=1)
    assert found.shapes == {"latent_sample": (1, 5, 10, 10)}
    assert found.rows[0].passes == ()
    assert found.rows[0].relative_rms == 0
    assert found.rows[0].timing is not None
    assert found.rows[0].timing.ratio == 1
    named = [name for row in found.rows for name in row.passes] + list(found.idle)
    phases = target_independent_phases("vae_decoder", "fp32")
    assert named == [f"{phase.name}: {each.name}" for phase in phases for each in phase.passes]
    assert any(row.passes[-1].startswith("fusion: ") for row in found.rows[1:])
    for row in found.rows:
        assert row.execution is not None
        assert row.execution.count > 10
        assert row.relative_rms is not None
        assert row.relative_rms < 1e-5
        assert row.psnr_db is not None
        assert row.psnr_db > 80
        assert (row.peak_memory_bytes or 0) > 20e6
    text = format_ablation(found)
    assert "as exported" in text
    value = found.to_json()
    assert [row["kernels"] for row in value["rows"]] == [
        sum(row["execution"]["kernels"].values()) for row in value["rows"]
    ]


def test_engines_that_do_not_fit_together_take_turns_in_memory(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = build_variants(graph, [Phase("x", (ChangeEpsilon(),))], TARGETS["ort-cpu"], tmp_path).rows
    feeds = {
        "sample": np.ones((2, 3, 6, 6), np.float32),
        "timestep": np.ones(1, np.float32),
        "encoder_hidden_states": np.ones((2, 5, 7), np.float32),
    }
    opened: list[int] = []
    together: list[int] = []
    real = ablation_module.open_session

    class Counted:
        def __init__(self, session: object) -> None:
            self.session = session

        def __enter__(self) -> object:
            opened.append(1)
            together.append(sum(opened))
            return self.session

        def __exit__(self, *_: object) -> None:
            opened.append(-1)

    monkeypatch.setattr(ablation_module, "open_session", lambda source, threads: Counted(real(source, threads=threads)))
    for factor, most, times in ((0, 2, 2), (1 << 40, 1, 6)):
        opened.clear()
        together.clear()
        monkeypatch.setattr(ablation_module, "MEMORY_OF_ENGINE", factor)
        seconds = ablation_module._time(variants, [feeds] * 2, rounds=3, threads=1)
        assert seconds.shape == (3, 2)
        assert (seconds > 0).all()
        assert (max(together), len(together), sum(opened)) == (most, times, 0)


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


def test_names_say_the_phase_once() -> None:
    assert join_names(["canonical: a", "canonical: b", "fusion: c"]) == "canonical: a, b, fusion: c"


def test_digests_see_what_is_computed_and_no_names() -> None:
    digests = StructureDigests()
    model, renamed, other = make_denoiser(), make_denoiser(), make_denoiser()
    wanted = digests.digest(model)
    Rename().run(renamed)
    assert digests.digest(renamed) == wanted
    assert digests.digest(model.clone()) == wanted
    ChangeEpsilon().run(other)
    assert digests.digest(other) != wanted
    assert digests.digest(make_denoiser(seed=6)) != wanted
    swapped = make_denoiser()
    node = next(node for node in swapped.graph if node.op_type == "Attention")
    key, value = node.inputs[1:3]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)
    assert digests.digest(swapped) != wanted


def test_a_lone_file_is_taken_as_it_is(graph: ExportedGraph, tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "cache")
    found = exported_graph(Source(str(graph.path)), "unet", TARGETS["cpu"], cache=cache, progress=Silent())
    assert found.path == graph.path
    assert [each.name for each in found.spec.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert not cache.root.exists()
    for source, component, message in (("nothing.onnx", "unet", "not found"), ("tiny", "vae", "unknown component")):
        with pytest.raises(InputError, match=message):
            exported_graph(Source(source), component, TARGETS["cpu"], cache=cache, progress=Silent())


def test_the_graph_of_a_checkpoint_is_exported_once(
    minimal_folder: Path, decoder: ExportedGraph, stages: StageCache
) -> None:
    assert decoder.path.name == MODEL_NAME
    assert decoder.spec.name == "vae_decoder"
    written = decoder.path.stat().st_mtime_ns
    source = Source(str(minimal_folder))
    again = exported_graph(source, "vae_decoder", TARGETS["ort-cpu"], cache=stages, progress=Silent())
    assert again == decoder
    assert again.path.stat().st_mtime_ns == written


def test_commands(
    minimal_folder: Path,
    decoder: ExportedGraph,
    stages: StageCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SDC_CACHE", str(stages.root.parent))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out, report = tmp_path / "out.json", tmp_path / "out.html"
    common = ["--model", str(minimal_folder), "--component", "vae_decoder", "--target", "ort-cpu"]
    common += ["--threads", "1", "--json", str(out)]
    assert command.run(parser.parse_args(["--ablate", *common, "--rounds", "1", "--report", str(report)])) == 0
    assert "ratio to the first row" in capsys.readouterr().out
    assert "What every pass is worth" in report.read_text()
    assert len(json.loads(out.read_text())["rows"]) >= 2
    assert command.run(parser.parse_args(["--bisect", *common])) == 0
    assert "keep the relative error within 1e-05" in capsys.readouterr().out
    assert json.loads(out.read_text())["broken"] is None
    assert command.run(parser.parse_args(["--bisect", *common, "--tolerance", "1e-12"])) == 0
    assert "broken: " in capsys.readouterr().out
