"""The stage that builds a UNet gives DeepCache's shallow one too, for every backend and at every level."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from test_hoisting import SIZES, SPEC, load_graph, recipe

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.deepcache import cache_component, divide_unet
from sdc.compiler.stages import build_stage
from sdc.engines.errors import ExportError, InputError
from sdc.engines.specs import ComponentSpec, DimensionRange
from sdc.engines.targets import TARGETS
from sdc.engines.wiring import check_wiring
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes


def make_unet(precision: str = "fp32", spec: ComponentSpec = SPEC) -> Component:
    unet = Component(spec, load_graph("unet"))
    run_passes((*canonical_passes(), *fusion_passes("unet"), *precision_passes(precision)), unet.model)
    return unet


@pytest.mark.parametrize("hoist", [True, False])
def test_stage_builds_the_shallow_unet_beside_the_whole_one(tmp_path: Path, hoist: bool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    result = build_stage(replace(recipe(source, hoist=hoist), deepcache=1), TARGETS["ort-cpu"], out)
    json.dumps(result)
    parts = ["unet_prompt", "unet_timestep"] if hoist else []
    assert list(result["engines"]) == ["unet", "unet_shallow", *parts]
    specs = {name: ComponentSpec.from_json(engine["spec"]) for name, engine in result["engines"].items()}
    check_wiring(specs, place="here")
    assert specs["unet"].outputs[-1] == specs["unet_shallow"].inputs[-1]
    assert specs["unet_shallow"].outputs == SPEC.outputs
    for name, engine in result["engines"].items():
        assert all((out / name / file).is_file() for file in engine["files"])
        assert isinstance(engine["memory"], dict)
    (report,) = result["engines"]["unet"]["passes"]["deepcache"]
    assert report["details"]["depth"] == 1
    assert 0 < report["details"]["shallow_macs"] < 0.4 * report["details"]["full_macs"]
    assert list(result["engines"]["unet_shallow"]["passes"]) == ["lowering"]


def test_multiply_adds_of_the_shallow_unet_by_hand() -> None:
    """At depth 0: the first and the last convolution, the last block's, its shortcut, and one transformer."""
    (_, shallow), report = cache_component(make_unet(), 0)
    pixels, tokens = 2 * 8 * 8, 2 * 77
    convolutions = 9 * (4 * 64 + 128 * 64 + 64 * 64 + 64 * 4) + 128 * 64
    linear = 2 * 64 * 64 + (3 * 64 * 64 + 64 * 64) + (64 * 64 + 64 * 64) + 64 * 512 + 256 * 64
    attention = 2 * 64 * (64 + 77)
    text = 2 * 64 * 64
    embedding = 2 * (64 * 256 + 256 * 256 + 256 * 64)
    assert report.details is not None
    expected = pixels * (convolutions + linear + attention) + tokens * text + embedding
    assert report.details["shallow_macs"] == expected
    assert shallow.spec.name == "unet_shallow"


def test_a_component_that_is_not_divided_stays_alone() -> None:
    unet = make_unet()
    components, reports = divide_unet(unet, hoist=False, deepcache=None)
    assert components == (unet,)
    assert reports == {}


@pytest.mark.parametrize("depth", [0, 4, 8])
def test_tensorrt_builds_plans_of_both(tmp_path: Path, depth: int) -> None:
    pytest.importorskip("tensorrt_rtx")
    components, _ = divide_unet(make_unet("fp16"), hoist=True, deepcache=depth)
    for component in components[:2]:
        run_passes(lowering_passes("tensorrt_rtx"), component.model)
        built = build_engine(component, TARGETS["sm89"], tmp_path / component.spec.name)
        assert (tmp_path / component.spec.name / built.files[0]).stat().st_size > 1000


@pytest.mark.parametrize("backend", ["onnxruntime_cuda", "openvino"])
def test_deep_features_cross_in_float32(backend: str) -> None:
    components, _ = divide_unet(make_unet("fp16"), hoist=True, deepcache=0)
    for component in components[:2]:
        run_passes(lowering_passes(backend), component.model)
    deep = [next(value for value in values if value.name == "deep.0") for values in
            (components[0].model.graph.outputs, components[1].model.graph.inputs)]  # fmt: skip
    assert deep[0].dtype == ir.DataType.FLOAT
    assert deep[1].dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16), "CUDA sessions feed narrower inputs"


def test_sizes_that_are_no_whole_fraction_are_refused() -> None:
    odd = {**SIZES, "W": DimensionRange(8, 8, 16, 1)}
    with pytest.raises(
        ExportError, match=r"the size floor\(W/2 - 1/2\) \+ 1, which is no whole fraction of one of B, H"
    ):
        cache_component(make_unet(spec=replace(SPEC, dimensions=odd)), 4)
    cache_component(make_unet(spec=replace(SPEC, dimensions=odd)), 0)


def test_a_depth_that_the_unet_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="this UNet has 9 skip connections; choose a depth from 0 to 8"):
        cache_component(make_unet(), 9)
