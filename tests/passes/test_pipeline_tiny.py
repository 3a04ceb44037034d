"""The whole pipeline on the small model's four networks: counts, golden operator lists, equality at several sizes."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, relative_error, run_model
from exported_graphs import INPUTS, feed, load_graph

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import PassReport, run_passes
from sdc.passes.macs import count_macs
from sdc.passes.pipeline import (
    BACKENDS,
    canonical_passes,
    fusion_passes,
    lowering_passes,
    precision_passes,
)
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.raising.raise_silu import RaiseSilu

FP16 = 5e-3
"""Hundreds of operators in a row, each of which rounds to 2^-11."""

SIZES = [{}, {"batch": 1, "height": 4, "width": 20}]

FUSED = {
    "unet": {
        "AddGroupNorm": 11,
        "AddGroupNormSilu": 23,
        "BiasAdd": 11,
        "BiasAddLayerNorm": 22,
        "BiasGeGlu": 11,
        "ConcatGroupNormSilu": 9,
        "GroupNormSilu": 3,
        "ImageFromTokens": 11,
        "MultiHeadAttention": 22,
        "Silu": 2,
        "TokensFromImage": 11,
    },
    "vae_decoder": {
        "AddGroupNorm": 1,
        "AddGroupNormSilu": 9,
        "GroupNormSilu": 14,
        "ImageFromTokens": 1,
        "MultiHeadAttention": 1,
        "TokensFromImage": 1,
    },
    "vae_encoder": {
        "AddGroupNorm": 1,
        "AddGroupNormSilu": 6,
        "GroupNormSilu": 11,
        "ImageFromTokens": 1,
        "MultiHeadAttention": 1,
        "TokensFromImage": 1,
    },
    "text_encoder": {"BiasAddLayerNorm": 4, "MultiHeadAttention": 2, "QuickGelu": 2},
}
STANDARD = {
    "unet": {"Conv": 73, "MatMul": 110, "Gemm": 19, "GroupNormalization": 0, "LayerNormalization": 11, "Gelu": 0},
    "vae_decoder": {"Conv": 29, "MatMul": 4, "GroupNormalization": 0},
    "vae_encoder": {"Conv": 23, "MatMul": 4, "GroupNormalization": 0},
    "text_encoder": {"MatMul": 12, "LayerNormalization": 1, "Sigmoid": 0},
}
FORMS = {
    "unet": {"concat": 9, "conv": 3, "conv_time_embedding_add": 17, "skip_add": 6},
    "vae_decoder": {"conv": 14, "skip_add": 9},
    "vae_encoder": {"conv": 11, "skip_add": 6},
    "text_encoder": {},
}
NODES = {"unet": 388, "vae_decoder": 68, "vae_encoder": 54, "text_encoder": 42}
SIZE_ARITHMETIC = {
    "Shape",
    "Concat",
    "Reshape",
    "Expand",
    "Split",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Mul",
    "Add",
    "Div",
}


@cache
def answer(component: str) -> dict[str, np.ndarray]:
    """What an untouched network gives for `feed(component)`."""
    return run_model(load_graph(component), feed(component))


def fuse(component: str, model: ir.Model) -> dict[str, PassReport]:
    return {report.name: report for report in run_passes((*canonical_passes(), *fusion_passes(component)), model)}


@pytest.mark.parametrize("component", INPUTS)
def test_every_site_is_fused_and_the_graph_computes_the_same(component: str) -> None:
    model = load_graph(component)
    passes = (*canonical_passes(), *fusion_passes(component))
    reports = apply_proven(passes, model, [feed(component, **size) for size in SIZES])
    counts = Counter(node.op_type for node in model.graph if node.domain == "sdc")
    assert counts == FUSED[component]
    standard = Counter(node.op_type for node in model.graph if not node.domain)
    assert {name: standard[name] for name in STANDARD[component]} == STANDARD[component]
    assert len(model.graph) == NODES[component]
    by_name = {report.name: report for report in reports}
    assert not any(by_name[name].skipped for name in ("fuse-group-norm-silu", "fuse-attention"))
    details = by_name["fuse-add-group-norm-silu"].details
    assert details is not None
    assert details["forms"] == FORMS[component]


def test_quantisation_sees_the_same_layers_after_fusion() -> None:
    model = load_graph("unet")
    run_passes(canonical_passes(), model)

    def layers() -> dict[str | None, tuple[Role, str | None]]:
        found, skipped = find_layers(model)
        assert not skipped
        return {layer.node.outputs[0].name: (layer.role, layer.activation.name) for layer in found}

    before, macs = layers(), count_macs(model, {"B": 2, "H": 8, "W": 12})
    run_passes(fusion_passes("unet"), model)
    assert len(before) == 202
    assert layers() == before
    assert count_macs(model, {"B": 2, "H": 8, "W": 12}).total == macs.total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("component", INPUTS)
def test_lowered_graphs_compute_the_same(component: str, backend: str) -> None:
    model = load_graph(component)
    fuse(component, model)
    run_passes((*precision_passes("fp32"), *lowering_passes(backend)), model)
    assert relative_error(model, answer(component), feed(component)) <= FP32


@pytest.mark.parametrize("component", INPUTS)
def test_unfused_graph_is_the_exporters_but_for_group_norms(component: str) -> None:
    model = load_graph(component)
    before = Counter(node.op_type for node in model.graph)
    norms = before.pop("GroupNormalization", 0)
    before += Counter({"InstanceNormalization": norms, "BatchNormalization": norms, "Reshape": 2 * norms})
    run_passes((*canonical_passes(), *precision_passes("fp32"), *lowering_passes("openvino")), model)
    after = Counter(node.op_type for node in model.graph)
    assert {name: after[name] for name in before.keys() | after.keys() if name not in SIZE_ARITHMETIC} == {
        name: number for name, number in before.items() if name not in SIZE_ARITHMETIC
    }
    assert len(model.graph) <= sum(before.values()) + norms  # a Shape each


@pytest.mark.parametrize("component", INPUTS)
def test_half_is_close_and_keeps_the_interface(component: str) -> None:
    model = load_graph(component)
    interface = [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]
    fuse(component, model)
    (report,) = (each for each in run_passes(precision_passes("fp16"), model) if each.name == "cast-fp16")
    assert report.details is not None
    assert report.details["clamped"] == 0
    assert report.details["float32_nodes"] == (5 if component == "unet" else 0)
    run_passes(lowering_passes("tensorrt_rtx"), model)
    assert [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)] == interface
    names = [value.name for node in model.graph for value in node.outputs] + list(model.graph.initializers)
    assert len(set(names)) == len(names)
    float32 = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert sum(np.prod(value.shape) for value in float32) <= 64 + 8  # frequencies of the sinusoid, scales of Resize
    assert 0 < relative_error(model, answer(component), feed(component)) < FP16


def test_passes_leave_weights_on_disk(tmp_path: Path) -> None:
    ir.save(load_graph("vae_decoder"), tmp_path / "model.onnx", external_data="model.onnx_data")
    model = ir.load(tmp_path / "model.onnx")
    fuse("vae_decoder", model)
    large = [value.const_value for value in model.graph.initializers.values() if np.prod(value.shape) > 8192]
    assert large
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in large)


def test_unet_without_a_site_is_an_error() -> None:
    model = load_graph("unet")
    without_silu = [each for each in canonical_passes() if not isinstance(each, RaiseSilu)]
    with pytest.raises(PassError, match="fuse-group-norm-silu: expected at least one site"):
        run_passes((*without_silu, *fusion_passes("unet")), model)


def test_missed_site_is_reported_and_the_rest_is_fused(caplog: pytest.LogCaptureFixture) -> None:
    model = load_graph("vae_decoder")
    norm = next(node for node in model.graph if node.op_type == "GroupNormalization")
    norm.attributes["stash_type"] = ir.AttrInt64("stash_type", ir.DataType.FLOAT16)
    reports = fuse("vae_decoder", model)
    assert reports["fuse-group-norm-silu"].matched == 22
    assert "fused 22 of 23 sites" in caplog.text
    assert "statistics in FLOAT16" in caplog.text


def test_contradicting_precisions_are_refused() -> None:
    with pytest.raises(InputError, match="unknown precision"):
        precision_passes("bf8")
    with pytest.raises(InputError, match="need a quantising pass"):
        precision_passes("int8")
    with pytest.raises(InputError, match="need a quantising pass"):
        precision_passes("fp16", quantise=(RaiseSilu(),))


def test_half_comes_after_quantisation() -> None:
    names = [each.name for each in precision_passes("int8", quantise=(RaiseSilu(),))]
    assert names == ["raise-silu", "cast-fp16", "remove-unused", "fix-names"]
    assert "cast-fp16" not in [
        each.name for each in precision_passes("int8", quantise=(RaiseSilu(),), remainder="fp32")
    ]
