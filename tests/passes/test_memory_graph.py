"""Buffers of graphs: by hand, against what ONNX Runtime really makes, and how tightly they can be packed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from equality import make_model
from exported_graphs import INPUTS, feed, load_graph
from made_sizes import assert_sizes_are_made, symbol_sizes
from small_denoiser import make_denoiser, make_feeds, measure_table
from test_lower_quantised_conv import KERNELS, make_conv
from test_lower_quantised_conv import make_feeds as make_conv_feeds

from sdc.engines.errors import PassError
from sdc.passes.base import run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.hoisting.hoist import PROMPT, TIMESTEP, hoist
from sdc.passes.lowering.lower_quantised_conv import LowerQuantisedConv
from sdc.passes.memory.buffers import BufferGraph
from sdc.passes.memory.from_graph import buffers_from_graph
from sdc.passes.memory.plan import plan_memory
from sdc.passes.pipeline import BACKENDS, ORT_CUDA, canonical_passes, fusion_passes, lowering_passes, precision_passes
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.shapes.contributed_shapes import contributed_shape
from sdc.passes.shapes.shape_rules import known_shape

WITHIN = 1.10
"""How far above its lower bound a component's arena may be."""

SMALL = """<ir_version: 10, opset_import: ["": 23]>
g (float[B, 3, H] x) => (float[B, 6, H] y, float[B, 3, 1, H] z)
<int64[3] flat = {0, 1, -1}, int64[1] two = {2}> {
    a = Mul (x, x)
    b = Concat <axis = 1> (a, x)
    c = Reshape (b, flat)
    size = Shape (b)
    d = Sigmoid (c)
    y = Reshape (d, size)
    z = Unsqueeze (x, two)
}"""


def parts(graph: BufferGraph) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    def names(indices: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(graph.buffers[index].name for index in indices)

    return [(step.operator, names(step.reads), names(step.writes)) for step in graph.steps]


def lowered(component: str, backend: str, precision: str = "fp32") -> ir.Model:
    model = load_graph(component)
    phases = (*canonical_passes(), *fusion_passes(component), *precision_passes(precision), *lowering_passes(backend))
    run_passes(phases, model)
    return model


def test_views_share_and_copies_of_inputs_do_not() -> None:
    model = make_model(SMALL, {})
    before = digest_from_model(model)
    graph = buffers_from_graph(model)
    assert parts(graph) == [
        ("Mul", (), ("a",)),
        ("Concat", ("a",), ("b",)),
        ("Shape", (), ("size",)),
        ("Sigmoid", ("b",), ("d",)),
        ("Unsqueeze", (), ("z",)),
    ]
    assert [graph.buffers[index].name for index in graph.outputs] == ["d", "z"]
    assert [buffer.name for buffer in graph.inputs] == ["x"]
    assert dict(zip(graph.at({"B": 5, "H": 7}).names, graph.at({"B": 5, "H": 7}).bytes, strict=True)) == {
        "a": 448,  # 5 * 3 * 7 * 4 = 420
        "b": 896,  # 840
        "size": 64,
        "d": 896,
        "z": 448,
    }
    assert graph.weight_bytes == 3 * 8 + 8
    assert digest_from_model(model) == before


def test_results_of_constants_take_nothing() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[B, 3] x) => (float[B, 5] y) {
        wide = Cast <to = 1> (w)
        turned = Transpose (wide)
        y = MatMul (x, turned)
    }"""
    graph = buffers_from_graph(make_model(text, {"w": np.ones((5, 3), np.float16)}))
    assert parts(graph) == [("MatMul", (), ("y",))]
    assert graph.weight_bytes == 5 * 3 * 2


def test_products_read_integers_and_others_what_they_stand_for() -> None:
    model = make_denoiser()
    InsertQdq(measure_table(model, make_feeds())).run(model)
    graph = buffers_from_graph(model)
    dtypes = {buffer.name: buffer.dtype for buffer in graph.buffers}
    of_products = [names for operator, names, _ in parts(graph) if operator in ("Conv", "MatMul")]
    assert any(dtypes[name] == ir.DataType.INT8 for names in of_products for name in names)
    assert not any(operator == "DequantizeLinear" for operator, _, _ in parts(graph))
    dequantise = next(node for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].producer())
    negated = ir.node("Neg", [dequantise.outputs[0]])
    negated.outputs[0].name = "negated"
    model.graph.insert_after(dequantise, negated)
    model.graph.outputs.append(negated.outputs[0])
    again = buffers_from_graph(model)
    assert [operator for operator, _, _ in parts(again)].count("DequantizeLinear") == 1


def test_a_size_that_nothing_determines_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[N] x) => (float[M] y) {
        found = NonZero (x)
        y = Cast <to = 1> (found)
    }""".replace("float[M] y", "float[1, M] y")
    with pytest.raises(PassError, match=r"'found' depends on .*which belong to no input"):
        buffers_from_graph(make_model(text, {}))


def test_a_subgraph_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (bool c, float[N] x) => (float[N] y) {
        y = If (c) <
            then_branch = t () => (float[N] p) { p = Neg (x) },
            else_branch = e () => (float[N] q) { q = Abs (x) }
        >
    }"""
    with pytest.raises(PassError, match="holds a subgraph"):
        buffers_from_graph(make_model(text, {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("component", INPUTS)
def test_sizes_are_those_of_the_tensors_that_are_computed(component: str, backend: str) -> None:
    assert assert_sizes_are_made(lowered(component, backend), feed(component, batch=2, height=8, width=12)) > 20


def assert_packed(graph: BufferGraph, sizes: Mapping[str, int]) -> None:
    for in_place in (False, True):
        plan = plan_memory(graph.at(sizes), in_place=in_place)
        for each in (plan.written, plan.reordered):
            assert each.lower_bound_bytes <= each.arena.bytes <= WITHIN * each.lower_bound_bytes


SIZES = ({"batch": 2, "height": 8, "width": 8}, {"batch": 6, "height": 12, "width": 20})


@pytest.mark.parametrize("backend", [*BACKENDS, ORT_CUDA])
@pytest.mark.parametrize("component", INPUTS)
def test_arenas_of_tiny_are_close_to_the_lower_bound(component: str, backend: str) -> None:
    model = lowered(component, backend, "fp16" if backend == ORT_CUDA else "fp32")
    graph = buffers_from_graph(model)
    for size in SIZES:
        sizes = symbol_sizes(model, feed(component, **size))
        assert_packed(graph, sizes)
        plan = plan_memory(graph.at(sizes))
        assert plan.written.arena.bytes < plan.naive_bytes / 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arenas_of_what_is_hoisted_are_close_too(backend: str, precision: str) -> None:
    unet = load_graph("unet")
    run_passes((*canonical_passes(), *fusion_passes("unet"), *precision_passes(precision)), unet)
    parts = hoist(unet).parts
    assert set(parts) == {PROMPT, TIMESTEP}
    for model in (unet, *parts.values()):
        run_passes(lowering_passes(backend), model)
        for size in ((2, 8, 8), (6, 12, 20)):
            assert_packed(buffers_from_graph(model), dict(zip("BHW", size, strict=True)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KERNELS)
def test_sizes_behind_convolutions_of_bytes(kind: str, bias: bool) -> None:
    model = make_conv(*KERNELS[kind], bias=bias)
    LowerQuantisedConv().run(model)
    for feeds in make_conv_feeds():
        assert_sizes_are_made(model, feeds)


def test_sizes_behind_a_transposed_convolution() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[B, 6, H, W] x) => (float[B, 10, K, L] y) {
        y = ConvTranspose <
            group = 2, strides = [3, 2], dilations = [1, 2], pads = [1, 0, 2, 1], output_padding = [1, 0]
        > (x, w)
    }"""
    model = make_model(text, {"w": np.ones((6, 5, 4, 3), np.float32)})
    for size in ((5, 7), (8, 4)):
        assert_sizes_are_made(model, {"x": np.ones((2, 6, *size), np.float32)})


@pytest.mark.parametrize(
    ("call", "inputs", "expected"),
    [
        ("y = com.microsoft.BiasSplitGelu (x, w)", "float[B, S, 10] x, float[10] w", "B,S,5"),
        ("y = com.microsoft.BiasAdd (x, w, x)", "float[B, S, 10] x, float[10] w", "B,S,10"),
        ("y = com.microsoft.QuickGelu (x)", "float[B, 3] x", "B,3"),
        (
            "y = com.microsoft.MultiHeadAttention (x, k, v)",
            "float[B, S, 6] x, float[B, 5, 6] k, float[B, 5, 8] v",
            "B,S,8",
        ),
        ("y = com.microsoft.MatMulIntegerToFloat (x, w, x, x)", "uint8[B, H, 6] x, int8[6, 7] w", "B,H,7"),
        ("y = com.microsoft.GroupNorm (x, w, w)", "float[B, H, W, 6] x, float[6] w", "B,H,W,6"),
        (
            "y = com.microsoft.NhwcConv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, w)",
            "float[B, H, W, 6] x, float[9, 3, 3, 6] w",
            "B,floor(H/2 - 1/2) + 1,W,9",
        ),
        ("y = com.microsoft.Unheard (x)", "float[B] x", None),
    ],
)
def test_shapes_of_contributed_operators(call: str, inputs: str, expected: str | None) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]> g ({inputs}) => (float y) {{ {call} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    (node,) = model.graph
    shape = contributed_shape(node, 0)
    assert (None if shape is None else ",".join(str(getattr(each, "value", each)) for each in shape)) == expected


def test_all_results_of_a_norm_with_a_sum_have_its_shape() -> None:
    node = ir.node(
        "SkipGroupNorm", [ir.val("x", ir.DataType.FLOAT, ["B", 4, 6])], num_outputs=2, domain="com.microsoft"
    )
    assert contributed_shape(node, 1) == contributed_shape(node, 0) == known_shape(node.inputs[0])
