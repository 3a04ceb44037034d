"""The stage that builds a UNet gives the engines beside it too, for every backend."""

import json
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.hoisting import hoist_component
from sdc.compiler.stages import MODEL_NAME, Recipe, build_stage
from sdc.compiler.workshop.cache import Entry
from sdc.engines.errors import ExportError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from exported_graphs import INPUTS, load_graph

SIZES = {"B": DimensionRange(1, 2, 4), "H": DimensionRange(8, 8, 16, 4), "W": DimensionRange(8, 8, 16, 4)}
SPEC = ComponentSpec(
    "unet",
    tuple(TensorSpec(name, "float32", shape) for name, shape in INPUTS["unet"].items()),
    (TensorSpec("out_sample", "float32", ("B", 4, "H", "W")),),
    SIZES,
)


def recipe(folder: Path, *, hoist: bool) -> Recipe:
    ir.save(load_graph("unet"), folder / MODEL_NAME)
    return Recipe(SPEC, Entry(folder, {}, {}), fuse=True, precision="fp32", table=None, hoist=hoist)


@pytest.mark.parametrize("hoist", [True, False])
def test_stage_builds_all_engines_of_a_unet_in_folders_of_their_names(tmp_path: Path, hoist: bool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    result = build_stage(recipe(source, hoist=hoist), TARGETS["ort-cpu"], out)
    json.dumps(result)
    names = ["unet", "unet_prompt", "unet_timestep"] if hoist else ["unet"]
    assert list(result["engines"]) == names
    for name, engine in result["engines"].items():
        assert engine["spec"]["name"] == name
        assert all((out / name / file).is_file() for file in engine["files"])
    unet = result["engines"]["unet"]
    assert ("hoisting" in unet["passes"]) == hoist
    assert (ComponentSpec.from_json(unet["spec"]) == SPEC) != hoist
    if hoist:
        (report,) = unet["passes"]["hoisting"]
        # 22 keys and values of 2 x 77 tokens: every multiply-add of the prompt's engine, by its widths.
        widths = [shape[-1] for _, _, shape in result["engines"]["unet_prompt"]["spec"]["outputs"]]
        assert report["details"]["prompt"]["macs"] == 2 * 77 * 64 * sum(widths)
        assert result["engines"]["unet_timestep"]["spec"]["dimensions"] == {}
        assert list(result["engines"]["unet_prompt"]["passes"]) == ["lowering"]


def test_tensorrt_builds_a_plan_of_each(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    unet = Component(SPEC, load_graph("unet"))
    run_passes((*canonical_passes(), *fusion_passes("unet"), *precision_passes("fp16")), unet.model)
    components, _ = hoist_component(unet)
    assert len(components) == 3
    for component in components:
        run_passes(lowering_passes("tensorrt_rtx"), component.model)
        built = build_engine(component, TARGETS["rtx"], tmp_path / component.spec.name)
        assert (tmp_path / component.spec.name / built.files[0]).stat().st_size > 1000


def test_refuses_a_free_size_that_nobody_knows() -> None:
    model = load_graph("unet")
    run_passes((*canonical_passes(), *fusion_passes("unet")), model)
    key = next(
        node
        for node in model.graph
        if node.op_type == "MatMul"
        and node.outputs[0].shape == ("B", 77, 64)
        and node.inputs[0] is not None
        and node.inputs[0].name == "encoder_hidden_states"
    )
    key.outputs[0].shape = ir.Shape(["B", "T", 64])
    with pytest.raises(ExportError, match=r"with the shape \['B', 'T', 64\], and nothing says how large T"):
        hoist_component(Component(SPEC, model))
