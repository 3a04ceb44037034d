"""What ONNX Runtime holds of constants and touches of its arena, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdc.compiler.memory.onnxruntime_activations import as_onnxruntime_holds, expanded_weights
from sdc.compiler.memory.onnxruntime_arena import touched_bytes
from sdc.compiler.memory.onnxruntime_engines import (
    GRAPH_BYTES_PER_NODE,
    SESSION_BYTES,
    held_by_onnxruntime,
    read_graph,
)
from sdc.engines.errors import BundleError
from sdc.passes.memory.buffers import SizedGraph, Step
from sdc.passes.memory.from_graph import buffers_from_graph

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from equality import make_model

MIB = 1 << 20


def make_constant(name: str, dtype: type = np.float16) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(np.ones((7, 3, 5), dtype), name=name))


def graph_of(operator: str, dtype: type, *, cast: bool = False) -> ir.Graph:
    """A node with a constant of 105 elements, cast or not."""
    given, weight = ir.Value(name="x"), make_constant("w", dtype)
    widened = [ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})] if cast else []
    node = ir.node(operator, [given, *(widened[0].outputs if cast else [weight])])
    return ir.Graph([given], node.outputs, nodes=[*widened, node], initializers=[weight])


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(
    ("operator", "dtype", "each", "while_loading"),
    [
        ("MatMul", np.float16, 4, 2 + 4),
        ("Conv", np.float16, 4, 2 + 4),
        ("Conv", np.float32, 4, 0),
        ("MatMul", np.int8, 1, 0),
        ("Gather", np.float16, 0, 0),
    ],
)
def test_a_constant_by_its_type_and_reader(
    operator: str, dtype: type, each: int, while_loading: int, cast: bool
) -> None:
    held = held_by_onnxruntime(graph_of(operator, dtype, cast=cast))
    assert (held.weight_bytes, held.page_bytes) == (7 * 3 * 5 * each, 7 * 3 * 5 * while_loading)
    assert held.graph_bytes == SESSION_BYTES + GRAPH_BYTES_PER_NODE, "casts of constants are gone"


@pytest.mark.parametrize(("operator", "times"), [("MatMul", 1), ("Conv", 2)])
def test_constants_are_cast_one_by_one_but_those_of_convolutions(operator: str, times: int) -> None:
    given, weights = ir.Value(name="x"), [make_constant(name) for name in "vw"]
    nodes = [ir.node(operator, [given, weight]) for weight in weights]
    graph = ir.Graph([given], [node.outputs[0] for node in nodes], nodes=nodes, initializers=weights)
    assert held_by_onnxruntime(graph).page_bytes == times * 105 * (2 + 4)


PRODUCTS = """<ir_version: 10, opset_import: ["": 23]> g
    (float[5, 8] x) => (float[5, 6] y, float[5, 6] z, float[5, 6] u)
    <float scale = {0.5}> {
        d = DequantizeLinear (w, scale)  y = Gemm (x, d)
        q = QuantizeLinear (x, scale)  a = DequantizeLinear (q, scale)
        e = DequantizeLinear (v, scale)  z = Gemm (a, e)
        f = DequantizeLinear (v, scale)  u = MatMul (x, f) }"""


def test_weights_that_no_kernel_takes_in_integers_are_expanded_in_every_run() -> None:
    model = make_model(PRODUCTS, {name: np.ones((8, 6), np.int8) for name in "wv"})
    assert expanded_weights(model.graph) == {"y": 4 * 48}
    graph = buffers_from_graph(model).at({})
    held = as_onnxruntime_holds(graph, expanded_weights(model.graph))
    operators = [step.operator for step in held.steps]
    assert operators == ["DequantizeLinear", *(step.operator for step in graph.steps)]
    assert (held.names[-1], held.bytes[-1]) == ("y.weight", 4 * 48)
    weight = len(held.names) - 1
    assert [number for number, step in enumerate(held.steps) if weight in (*step.reads, *step.writes)] == [0, 1]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="is no ONNX graph"):
        read_graph(path)


def chain(*sizes: int) -> SizedGraph:
    """Steps that read what the one before wrote."""
    steps = [Step("Relu", (number - 1,) if number else (), (number,)) for number in range(len(sizes))]
    names = tuple(f"b{number}" for number in range(len(sizes)))
    return SizedGraph(names, sizes, tuple(steps), frozenset({len(sizes) - 1}))


@pytest.mark.parametrize(
    ("sizes", "touched"),
    [
        ((1000, 1000, 1000), 2 * 1024),  # the third lies where the first was
        ((MIB, MIB), 2 * MIB),  # a region of 1 MiB, then one of 2
        ((3 * MIB, 3 * MIB, MIB), 3 * MIB + 3 * MIB),  # of 4 and 4; the last where the first was
        ((MIB, 2 * MIB, MIB, MIB), MIB + 2 * MIB),  # the third where the first was, the fourth in a half of the second
        ((MIB, 2 * MIB, 2 * MIB), MIB + 2 * MIB + 2 * MIB),  # the third fits nowhere
    ],
)
def test_what_a_chain_touches(sizes: tuple[int, ...], touched: int) -> None:
    assert touched_bytes(chain(*sizes)) == touched
