"""The stage that builds a UNet gives its shards in its place, for every backend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_deepcache_export import make_unet
from test_hoisting import SIZES, SPEC, recipe

from sdc.compiler.build import build_engine
from sdc.compiler.deepcache import divide_unet
from sdc.compiler.sharding import shard_component
from sdc.compiler.stages import build_stage
from sdc.engines.errors import InputError, PassError
from sdc.engines.specs import ComponentSpec, DimensionRange
from sdc.engines.targets import TARGETS
from sdc.engines.wiring import check_wiring
from sdc.passes.base import run_passes
from sdc.passes.pipeline import lowering_passes


@pytest.mark.parametrize(("hoist", "deepcache"), [(True, None), (False, None), (True, 1)])
def test_stage_builds_shards_in_the_place_of_the_unet(tmp_path: Path, hoist: bool, deepcache: int | None) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    asked = replace(recipe(source, hoist=hoist), deepcache=deepcache, shards=3)
    result = build_stage(asked, TARGETS["ort-cpu"], out)
    json.dumps(result)
    shards = [f"unet_shard_{index}" for index in range(3)]
    beside = [*(["unet_shallow"] if deepcache else []), *(["unet_prompt", "unet_timestep"] if hoist else [])]
    assert list(result["engines"]) == [*shards, *beside]
    assert not (out / "unet").exists()
    specs = {name: ComponentSpec.from_json(engine["spec"]) for name, engine in result["engines"].items()}
    specs["unet"] = ComponentSpec.from_json(result["spec"])
    check_wiring(specs, place="here")
    for name, engine in result["engines"].items():
        assert all((out / name / file).is_file() for file in engine["files"])
        assert isinstance(engine["memory"], dict)
    (report,) = result["engines"]["unet_shard_0"]["passes"]["sharding"]
    weights = [each["weight_bytes"] for each in report["details"]["shards"]]
    assert max(weights) < 1.2 * sum(weights) / 3
    assert list(result["engines"]["unet_shard_1"]["passes"]) == ["lowering"]


def test_what_crosses_has_sizes_that_follow_from_the_unets() -> None:
    shards, _ = shard_component(make_unet(), 4)
    crossing = {tensor for shard in shards for tensor in shard.spec.outputs if tensor.name != "out_sample"}
    assert crossing
    for shard in shards:
        for tensor in (*shard.spec.inputs, *shard.spec.outputs):
            assert all(isinstance(size, int) or size in shard.spec.dimensions for size in tensor.shape)
        assert {name: each for name, each in shard.spec.dimensions.items() if name in SIZES}.items() <= SIZES.items()
    sizes = {size for tensor in crossing for size in tensor.shape}
    assert {"H/2", "H/4"} <= sizes
    found = {name: each for shard in shards for name, each in shard.spec.dimensions.items()}
    assert found["H/4"] == DimensionRange(2, 2, 4, 1)


def test_cuts_avoid_sizes_that_no_interface_can_have() -> None:
    """With an odd width, what is between the lower levels cannot cross."""
    odd = replace(SPEC, dimensions={**SIZES, "W": DimensionRange(8, 8, 16, 1)})
    shards, _ = shard_component(make_unet(spec=odd), 2)
    assert all(isinstance(size, int) or size in SIZES for tensor in shards[0].spec.outputs for size in tensor.shape)


def test_more_shards_than_places_are_refused_with_the_greatest_number() -> None:
    with pytest.raises(
        InputError, match=r"500 shards were asked for, and .* can be cut into 2 to \d+; choose a number"
    ):
        shard_component(make_unet(), 500)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_plans_of_shards(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    (unet, *_), _ = divide_unet(make_unet(precision), hoist=True, deepcache=None)
    shards, _ = shard_component(unet, 2)
    for shard in shards:
        run_passes(lowering_passes("tensorrt_rtx"), shard.model)
        built = build_engine(shard, TARGETS["sm89"], tmp_path / shard.spec.name)
        assert (tmp_path / shard.spec.name / built.files[0]).stat().st_size > 1000


def test_a_unet_that_can_be_cut_nowhere_is_refused() -> None:
    unet = make_unet()
    for node in unet.model.graph:
        for value in node.outputs:
            value.shape = None
    with pytest.raises(PassError, match="can be cut nowhere"):
        shard_component(unet, 2)
