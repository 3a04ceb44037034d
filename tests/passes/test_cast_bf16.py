"""Sums in float32 beside products in 16 bits; and float32 constants that are kept beside those they became."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from equality import make_model, operators, relative_error, run_model
from exported_graphs import load_graph
from small_graphs import make_resnet, normal

from sdc.passes.base import run_passes
from sdc.passes.lowering.lower_group_norm import LowerGroupNorm
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes
from sdc.passes.precision.cast_bf16 import CastBf16
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.precision.half_tensors import EXACT_CONSTANT
from sdc.passes.simplify.remove_unused import RemoveUnused

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def typed(component: str, backend: str = "openvino", *, fused: bool = True) -> ir.Model:
    """A network of `tiny` in bf16, as a bundle has it."""
    model = load_graph(component)
    fusing = fusion_passes(component) if fused else ()
    run_passes((*canonical_passes(), *fusing, *precision_passes("bf16", component=component, backend=backend)), model)
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_a_text_encoders_sums_stay_in_float32(fused: bool) -> None:
    model = typed("text_encoder", fused=fused)
    types: dict[str, Counter[ir.DataType | None]] = {}
    for node in model.graph:
        types.setdefault(node.op_type, Counter())[node.outputs[0].dtype] += 1
    assert set(types["MatMul"]) == {BF16}
    norms = sum(types.get(name, Counter()).total() for name in ("LayerNormalization", "BiasAddLayerNorm"))
    in_float32 = sum(types.get(name, Counter())[FLOAT] for name in ("LayerNormalization", "BiasAddLayerNorm"))
    assert norms == in_float32 > 2
    for node in model.graph:
        if node.op_type == "Add" and node.outputs[0].dtype == BF16:
            assert any(value is not None and value.is_initializer() for value in node.inputs), "a sum of tokens"
    weights = {value.dtype for node in model.graph if node.op_type == "MatMul" for value in node.inputs}
    assert weights == {BF16}
    tables = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    assert BF16 in {table.dtype for table in tables if table is not None and table.is_initializer()}


@pytest.mark.parametrize(
    ("component", "backend"), [("vae_decoder", "openvino"), ("text_encoder", "tensorrt_rtx"), ("text_encoder", None)]
)
def test_others_are_in_bf16_throughout(component: str, backend: str) -> None:
    model = typed(component, backend)
    computed = Counter(node.outputs[0].dtype for node in model.graph if node.op_type not in ("Cast", "Shape"))
    assert computed[FLOAT] == 0
    assert computed[BF16] > 25


SUM = """
<ir_version: 10, opset_import: ["": 23]>
sums (float[1, 5, 8] x) => (float[1, 5, 8] y)
{
    a = MatMul (x, first)
    b = Add (a, bias)
    c = Add (x, b)
    d = MatMul (c, second)
    y = Add (c, d)
}
"""


@pytest.mark.parametrize("products", [True, False])
def test_a_bias_belongs_to_its_product_and_a_sum_does_not(products: bool) -> None:
    model = make_model(SUM, {"first": normal(1, 8, 8), "second": normal(2, 8, 8), "bias": normal(3, 8)})
    expected = run_model(model, feeds := {"x": normal(4, 1, 5, 8)})
    CastFp16(products=products).run(model)
    RemoveUnused().run(model)
    halves = {node.outputs[0].name for node in model.graph if node.outputs[0].dtype == ir.DataType.FLOAT16}
    assert {"a", "b", "d"} <= halves
    assert ("c" in halves) is not products
    assert relative_error(model, expected, feeds) < 4e-3


def test_norms_have_their_float32_parameters_behind_a_cast() -> None:
    model = make_resnet()
    CastBf16().run(model)
    norms = [node for node in model.graph if node.op_type == "GroupNormalization"]
    exact = [[value.meta[EXACT_CONSTANT].numpy() for value in node.inputs[1:] if value is not None] for node in norms]
    assert norms
    plain = model.clone()
    LowerGroupNorm(frozenset({BF16})).run(plain)
    LowerGroupNorm(frozenset({BF16}), exact=True).run(model)
    maps = [node for node in model.graph if node.op_type == "BatchNormalization"]
    for node, parameters in zip(maps, exact, strict=True):
        for value, expected in zip(node.inputs[1:3], parameters, strict=True):
            assert value is not None
            cast = value.producer()
            assert cast is not None
            assert (cast.op_type, value.dtype) == ("Cast", BF16)
            source = cast.inputs[0]
            assert source is not None
            assert source.const_value is not None
            assert source.dtype == FLOAT
            assert np.array_equal(source.const_value.numpy(), expected)
    assert operators(plain).count("Cast") == operators(model).count("Cast") - 2 * len(maps)


def test_norms_in_float16_are_left_alone() -> None:
    model = make_resnet()
    CastFp16().run(model)
    before = operators(model).count("Cast")
    LowerGroupNorm(frozenset({ir.DataType.FLOAT16}), exact=True).run(model)
    assert operators(model).count("Cast") == before
    assert operators(model).count("BatchNormalization") > 0


@pytest.mark.parametrize(("backend", "casts"), [("openvino", True), ("onnxruntime", False), ("tensorrt_rtx", False)])
def test_only_openvino_is_given_them(backend: str, casts: bool) -> None:
    model = typed("vae_decoder", backend)
    run_passes(lowering_passes(backend), model)
    behind_casts = {
        node.inputs[0].name
        for node in model.graph
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    }
    assert bool(behind_casts) is casts
