"""Ablation and bisection over the passes of a small network, with passes broken on purpose."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from broken_passes import SPEC, ChangeEpsilon, ForgetInput, Refuse, Rename
from small_denoiser import make_denoiser

from sdc.compiler.build import BuiltEngine, build_engine
from sdc.compiler.build.built import save_onnx
from sdc.compiler.cli import compare as command
from sdc.compiler.compare.bisection import bisect_passes
from sdc.compiler.compare.exported import ExportedGraph, exported_graph
from sdc.compiler.compare.judge import relative_error
from sdc.compiler.compare.pass_report import format_bisection, join_names
from sdc.compiler.compare.structure import StructureDigests
from sdc.compiler.compare.variants import Phase, all_phases, phases_before_lowering
from sdc.compiler.component import Component
from sdc.compiler.stages import MODEL_NAME, Source
from sdc.compiler.workshop.cache import StageCache
from sdc.compiler.workshop.progress import Silent
from sdc.engines.errors import ExportError, InputError, TargetError
from sdc.engines.targets import TARGETS, Target
from sdc.passes.base import Pass


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
    sound = phases_before_lowering("unet", "fp32")[0]
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


def test_operators_for_a_gpu_cannot_be_bisected_on_the_cpu(decoder):
    target = TARGETS["ort-cuda"]
    with pytest.raises(TargetError, match=r"no kernels for operators of 'ort-cuda'; bisect for ort-cpu"):
        bisect_passes(decoder, all_phases("vae_decoder", "fp32", target), target, threads=1)
