"""UNets of other families, exported as the test runs: the same sites by every exporter, equal to what was exported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from equality import apply_proven
from reduced_networks import Network, sd2_unet, sdxl_unet

from sdc.compiler.trace.exporters import EXPORTERS, export_with
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes

SITES = {
    sd2_unet: {"Attention": 12, "GroupNormalization": 31, "LayerNormalization": 18, "Gelu": 6},
    sdxl_unet: {"Attention": 36, "GroupNormalization": 31, "LayerNormalization": 54, "Gelu": 18},
}

NORMS_WITH_SILU = 25
"""Of the 31; the other six begin a transformer each."""


def feeds(network: Network, *, batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(4)
    sizes = {"B": batch, "H": height, "W": width}
    drawn = {
        name: generator.standard_normal(
            [
                sizes[network.free[name][axis]] if axis in network.free.get(name, {}) else size
                for axis, size in enumerate(value.shape)
            ],
            dtype=np.float32,
        )
        for name, value in network.inputs.items()
    }
    return drawn | {"timestep": np.array([873.0], np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("make", SITES)
@pytest.mark.parametrize("exporter", ["torchscript-17", "dynamo-18", "dynamo-23"])
def test_sites_and_equality(make: Callable[[], Network], exporter: str, tmp_path: Path) -> None:
    network = make()
    path = tmp_path / "model.onnx"
    outputs = list(network.outputs)
    export_with(EXPORTERS[exporter], network.module, network.inputs, outputs, path, free=network.free)
    model = ir.external_data.load_to_model(ir.load(path))
    raised = model.clone()
    run_passes(canonical_passes(), raised)
    found = Counter(node.op_type for node in raised.graph)
    assert {name: found[name] for name in SITES[make]} == SITES[make]
    sizes = [feeds(network, batch=3, height=8, width=12), feeds(network, batch=1, height=4, width=20)]
    apply_proven(canonical_passes(), model.clone(), sizes)
    apply_proven((*canonical_passes(), *fusion_passes()), model, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("make", SITES)
@pytest.mark.parametrize("exporter", ["torchscript-17-fp16", "dynamo-18-fp16", "dynamo-23-fp16"])
def test_sites_in_float16(make: Callable[[], Network], exporter: str, tmp_path: Path) -> None:
    network = make()
    path = tmp_path / "model.onnx"
    export_with(EXPORTERS[exporter], network.module, network.inputs, list(network.outputs), path, free=network.free)
    model = ir.load(path)
    run_passes((*canonical_passes(), *fusion_passes()), model)
    fused = Counter(node.op_type for node in model.graph)
    assert fused["MultiHeadAttention"] == SITES[make]["Attention"]
    assert fused["BiasGeGlu"] == SITES[make]["Gelu"]
    layer_norms = fused["LayerNormalization"] + fused["AddLayerNorm"] + fused["BiasAddLayerNorm"]
    assert layer_norms == SITES[make]["LayerNormalization"]
    with_silu = fused["GroupNormSilu"] + fused["AddGroupNormSilu"] + fused["ConcatGroupNormSilu"]
    assert with_silu == NORMS_WITH_SILU
    assert with_silu + fused["AddGroupNorm"] == SITES[make]["GroupNormalization"]
