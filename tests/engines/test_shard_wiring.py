"""Manifests whose shards do not make up the UNet are refused, with what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdc.engines.errors import BundleError
from sdc.engines.manifest import read_manifest
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec, is_shard_name, shard_name
from sdc.engines.wiring import check_wiring, shards_of

SIZES = {"B": DimensionRange(1, 2, 6), "H": DimensionRange(4, 8, 16, 4)}
SAMPLE = TensorSpec("sample", "float32", ("B", 4, "H", 8))
STATES = TensorSpec("encoder_hidden_states", "float32", ("B", 77, 64))
RESULT = TensorSpec("out_sample", "float32", ("B", 4, "H", 8))
ONE, TWO = (TensorSpec(f"shard.{index}", "float32", ("B", 9, "H", 8)) for index in range(2))
UNET = ComponentSpec("unet", (SAMPLE, STATES), (RESULT,), SIZES)
SPECS = {
    "unet": UNET,
    "unet_shard_0": ComponentSpec("unet_shard_0", (SAMPLE,), (ONE,), SIZES),
    "unet_shard_1": ComponentSpec("unet_shard_1", (STATES, ONE), (TWO,), SIZES),
    "unet_shard_2": ComponentSpec("unet_shard_2", (ONE, TWO), (RESULT,), SIZES),
}


def change(index: int, **changes: Any) -> dict[str, ComponentSpec]:
    name = shard_name(index)
    return {**SPECS, name: replace(SPECS[name], **changes)}


def without(*names: str) -> dict[str, ComponentSpec]:
    return {name: spec for name, spec in SPECS.items() if name not in names}


def test_shards_are_in_the_order_of_their_numbers() -> None:
    check_wiring(SPECS, place="here")
    eleven = {shard_name(index): replace(UNET, name=shard_name(index)) for index in (10, 9, *range(9))}
    assert [spec.name for spec in shards_of(eleven)] == [shard_name(index) for index in range(11)]
    assert shards_of({"unet": UNET}) == ()


@pytest.mark.parametrize("name", ["unet", "unet_shard_", "unet_shard_01", "unet_shard_x", "unet_shard_-1", "shard_1"])
def test_other_names_are_no_shards(name: str) -> None:
    assert not is_shard_name(name)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (without("unet"), "unet_shard_0 has no unet to serve"),
        (without("unet_shard_1"), "the unet is in 2 shards, and unet_shard_1 is missing"),
        (without("unet_shard_1", "unet_shard_2"), "the unet is in 1 shards, and unet_shard_1 is missing"),
        (change(0, inputs=(SAMPLE, TWO)), "nothing provides the input 'shard.1' of unet_shard_0"),
        (
            change(1, inputs=(STATES, replace(ONE, shape=("B", 5, "H", 8)))),
            r"unet_shard_1 takes shard.0 as float32 \['B', 5, 'H', 8\], with unet_shard_0 it is float32 \['B', 9, 'H'",
        ),
        (change(1, outputs=(TWO, ONE)), "unet_shard_1 gives shard.0, which unet_shard_0 has too"),
        (change(1, outputs=(TWO, SAMPLE)), "unet_shard_1 gives sample, which unet has too"),
        (change(2, outputs=()), "no shard gives the out_sample that the unet gives"),
        (change(2, outputs=(replace(RESULT, shape=("B", 3, "H", 8)),)), "no shard gives the out_sample"),
        (
            change(2, dimensions={**SIZES, "B": DimensionRange(1, 1, 2)}),
            "unet_shard_2 and the unet take other ranges of B",
        ),
    ],
)
def test_shards_that_do_not_make_up_the_unet_are_refused(specs: Mapping[str, ComponentSpec], message: str) -> None:
    with pytest.raises(BundleError, match=f"here: {message}.*export the bundle again"):
        check_wiring(specs, place="here")


def test_a_target_without_one_of_the_shards_is_refused(
    small_bundle: Path, edit_manifest: Callable[[Callable[[dict[str, Any]], None]], None]
) -> None:
    def cut(manifest: dict[str, Any]) -> None:
        unet = manifest["components"]["unet"]
        crossing = ["shard.0", "float32", ["B", 6, "H", "W"]]
        parts = [(unet["inputs"], [crossing]), ([crossing], unet["outputs"])]
        for index, (inputs, outputs) in enumerate(parts):
            name = shard_name(index)
            described = {"name": name, "inputs": inputs, "outputs": outputs, "dimensions": unet["dimensions"]}
            manifest["components"][name] = described
        for target in manifest["targets"].values():
            target["engines"] = {shard_name(index): target["engines"]["unet"] for index in range(2)}

    edit_manifest(cut)
    manifest = read_manifest(small_bundle / "sdc.json")
    assert [spec.name for spec in shards_of(manifest.components)] == ["unet_shard_0", "unet_shard_1"]
    edit_manifest(lambda manifest: manifest["targets"]["cpu"]["engines"].pop("unet_shard_1"))
    with pytest.raises(BundleError, match=r"targets\.cpu has no engine for unet_shard_1, which belongs to its unet"):
        read_manifest(small_bundle / "sdc.json")
