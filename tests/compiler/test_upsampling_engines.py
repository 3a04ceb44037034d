"""The small model's OpenVINO engines upsample by phases: no doubled image is left, and outputs are the same."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import measure_table

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.stages import MODEL_NAME, Recipe, build_stage, typed_component
from sdc.compiler.workshop.cache import Entry
from sdc.engines.processor import exact_weight_bits
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.macs import count_macs
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes
from sdc.passes.precision.correct_bias import CorrectBias
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.range_rules import RangeRule

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from exported_graphs import INPUTS, feed, load_graph

TARGET = TARGETS["cpu"]
DIMENSIONS = {"B": DimensionRange(1, 2, 4), "H": DimensionRange(4, 8, 16, 4), "W": DimensionRange(4, 12, 16, 4)}
OUTPUTS = {
    "unet": TensorSpec("out_sample", "float32", ("B", 4, "H", "W")),
    "vae_decoder": TensorSpec("sample", "float32", ("B", 3, "4*H", "4*W")),
}
UPSAMPLERS = 2
"""Of both networks."""


def spec_of(name: str) -> ComponentSpec:
    inputs = tuple(TensorSpec(each, "float32", shape) for each, shape in INPUTS[name].items())
    return ComponentSpec(name, inputs, (OUTPUTS[name],), DIMENSIONS)


def recipe(name: str, folder: Path, precision: str = "fp32", **options: bool | int) -> Recipe:
    folder.mkdir()
    ir.save(load_graph(name), folder / MODEL_NAME)
    return Recipe(spec_of(name), Entry(folder, {}, {}), fuse=True, precision=precision, table=None, **options)


def fused(name: str) -> ir.Model:
    model = load_graph(name)
    run_passes((*canonical_passes(), *fusion_passes(name)), model)
    return model


def run_engine(component: Component, folder: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the engine of a typed component gives, in float32 around integers."""
    run_passes(lowering_passes(TARGET.backend), component.model)
    built = build_engine(component, TARGET, folder)
    files = tuple(folder / file for file in built.files)
    source = EngineSource(component.spec, TARGET.backend, files, {"inference_precision": "f32"})
    with open_session(source, threads=1) as session:
        return session.run(feeds)


def kinds_of(path: Path) -> Counter[str]:
    """The operators of an engine's file."""
    return Counter(node.attrib["type"] for node in ElementTree.parse(path).getroot().iterfind("layers/layer"))


@pytest.mark.parametrize(
    ("name", "precision"), [("unet", "bf16"), ("unet", "w8"), ("vae_decoder", "fp32"), ("vae_decoder", "fp16")]
)
def test_stage_builds_engines_without_upsampled_images(name: str, precision: str, tmp_path: Path) -> None:
    result = build_stage(recipe(name, tmp_path / "source", precision), TARGET, tmp_path)
    engine = result["engines"][name]
    (report,) = (each for each in engine["passes"]["precision"] if each["name"] == "upsample-by-phases")
    assert (report["matched"], report["skipped"]) == (UPSAMPLERS, ())
    kinds = kinds_of(tmp_path / name / engine["files"][0])
    assert (kinds["Interpolate"], kinds["DepthToSpace"]) == (0, UPSAMPLERS)
    steps = [step[0] for step in engine["memory"]["steps"]]
    assert (steps.count("Resize"), steps.count("DepthToSpace")) == (0, UPSAMPLERS)


@pytest.mark.parametrize("cut", [{"shards": 3}, {"deepcache": 0}])
def test_shards_and_the_shallow_unet_are_cut_from_it(cut: dict[str, int], tmp_path: Path) -> None:
    result = build_stage(recipe("unet", tmp_path / "source", hoist=True, **cut), TARGET, tmp_path / "out")
    kinds = [kinds_of(tmp_path / "out" / name / each["files"][0]) for name, each in result["engines"].items()]
    assert sum(each["Interpolate"] for each in kinds) == 0
    assert sum(each["DepthToSpace"] for each in kinds) == UPSAMPLERS  # both in the deep layers


def test_other_targets_keep_their_upsamplers(tmp_path: Path) -> None:
    for number, backend in enumerate(("onnxruntime", "onnxruntime_cuda", "tensorrt_rtx", None)):
        component, reports = typed_component(recipe("vae_decoder", tmp_path / str(number)), backend)
        assert sum(node.op_type == "Resize" for node in component.model.graph) == UPSAMPLERS
        assert "upsample-by-phases" not in [each["name"] for each in reports["precision"]]


TAPS = {"unet": 128**2 * 4 * 6 + 96**2 * 8 * 12, "vae_decoder": 128**2 * 16 * 24 + 64**2 * 32 * 48}
"""Multiply-adds of one tap of the upsamplers' convolutions, for one latent of 8 x 12."""


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_outputs_and_work_in_float32(name: str, tmp_path: Path) -> None:
    feeds = feed(name, batch=2)
    outputs, work = [], []
    for backend in (None, TARGET.backend):
        component = Component(spec_of(name), fused(name))
        run_passes(precision_passes("fp32", backend=backend), component.model)
        work.append(count_macs(component.model, {"B": 2, "H": 8, "W": 12}).total)
        (output,) = run_engine(component, tmp_path / str(backend), feeds).values()
        outputs.append(output.astype(np.float64))
    plain, phased = outputs
    assert 0 < np.abs(phased - plain).max() < 1e-5 * np.abs(plain).max()
    assert work[0] - work[1] == 2 * (9 - 4) * TAPS[name]


def test_integers_are_as_near_to_float32(tmp_path: Path) -> None:
    """The error of epsilon, of the UNet in int8 with and without the pass."""
    feeds = feed("unet", batch=2)
    model = fused("unet")
    (exact,) = run_engine(Component(spec_of("unet"), model.clone()), tmp_path / "exact", feeds).values()
    table = measure_table(model, feeds)
    errors = {}
    for backend in (None, TARGET.backend):
        quantise = (InsertQdq(table, rule=RangeRule("max", symmetric=False, weight_bits=exact_weight_bits())),)
        passes = precision_passes(
            "int8", quantise=quantise, correct=(CorrectBias(table),), remainder="fp32", backend=backend
        )
        component = Component(spec_of("unet"), model.clone())
        reports = run_passes(passes, component.model)
        matched = sum(each.matched for each in reports if each.name == "upsample-by-phases")
        assert matched == (UPSAMPLERS if backend else 0)
        (output,) = run_engine(component, tmp_path / str(backend), feeds).values()
        errors[backend] = float(np.sqrt(np.square(output - exact).mean() / np.square(exact).mean()))
    # Two of 130 layers are rounded otherwise: what differs is chance.
    assert 0 < errors[TARGET.backend] < 1.05 * errors[None]
