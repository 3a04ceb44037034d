"""What ONNX Runtime holds of constants and touches of its arena, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
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
from sdc.engines.sessions.onnxruntime import session_options
from sdc.engines.sessions.onnxruntime_regions import OWN, SHARED
from sdc.passes.memory.buffers import SizedGraph, Step
from sdc.passes.memory.from_graph import buffers_from_graph
from sdc.passes.memory.lifetimes import lower_bound, write_in_place

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from equality import make_model

MIB, GIB = 1 << 20, 1 << 30


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
    ],
)
def test_a_constant_by_its_type_and_reader(
    operator: str, dtype: type, each: int, while_loading: int, cast: bool
) -> None:
    held = held_by_onnxruntime(graph_of(operator, dtype, cast=cast))
    assert (held.weight_bytes, held.page_bytes) == (7 * 3 * 5 * each, 7 * 3 * 5 * while_loading)
    assert held.graph_bytes == SESSION_BYTES + GRAPH_BYTES_PER_NODE, "casts of constants are gone"


def test_rows_are_read_in_the_file_unless_the_table_is_cast() -> None:
    assert held_by_onnxruntime(graph_of("Gather", np.float16)).weight_bytes == 0
    assert held_by_onnxruntime(graph_of("Gather", np.float16, cast=True)).weight_bytes == 4 * 105


@pytest.mark.parametrize(("operator", "times"), [("MatMul", 1), ("Conv", 2)])
def test_constants_are_cast_one_by_one_but_those_of_convolutions(operator: str, times: int) -> None:
    given, weights = ir.Value(name="x"), [make_constant(name) for name in "vw"]
    nodes = [ir.node(operator, [given, weight]) for weight in weights]
    graph = ir.Graph([given], [node.outputs[0] for node in nodes], nodes=nodes, initializers=weights)
    assert held_by_onnxruntime(graph).page_bytes == times * 105 * (2 + 4)


PRODUCTS = {
    "Gemm <transB = 1> (x, d)": True,
    "Gemm (x, d)": False,
    "MatMul (x, d)": False,
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_weights_that_no_kernel_takes_in_integers_are_expanded_in_every_run(product: str, tmp_path: Path) -> None:
    """Beside what is left of ONNX Runtime's own optimisations."""
    model = make_product(product)
    assert expanded_weights(model.graph) == ({"y": 4 * 2048} if PRODUCTS[product] else {})
    graph = buffers_from_graph(model).at({})
    held = as_onnxruntime_holds(graph, expanded_weights(model.graph))
    expected = (
        [Step("DequantizeLinear", (), (1,)), Step("Gemm", (1,), (0,))] if PRODUCTS[product] else list(graph.steps)
    )
    assert list(held.steps) == expected
    assert held.bytes == ((*graph.bytes, 4 * 2048) if PRODUCTS[product] else graph.bytes)
    options = session_options(None)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    kinds = {node.op_type for node in ir.load(tmp_path / "optimised.onnx").graph}
    assert ("DequantizeLinear" in kinds) == PRODUCTS[product]


def make_product(text: str) -> ir.Model:
    graph = f"""<ir_version: 10, opset_import: ["": 23]> g (float[5, 64] x) => (float[5, 32] y) {{
        d = DequantizeLinear (w, scale)  y = {text} }}"""
    weight = np.ones((32, 64) if "transB" in text else (64, 32), np.int8)
    return make_model(graph, {"w": weight, "scale": np.array(0.5, np.float32)})


def test_weights_of_products_of_integers_are_not_expanded() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[5, 64] x) => (float[5, 32] y) <float scale = {0.5}> {
        q = QuantizeLinear (x, scale)  a = DequantizeLinear (q, scale)
        d = DequantizeLinear (w, scale)  y = Gemm <transB = 1> (a, d) }"""
    assert expanded_weights(make_model(text, {"w": np.ones((32, 64), np.int8)}).graph) == {}


CHAINS = {
    "silu": ("s = Sigmoid (x)  y = Mul (x, s)", 1),
    "gate of another": ("s = Sigmoid (x)  y = Mul (t, s)", 3),
    "sigmoid": ("y = Sigmoid (t)", 1),
    "add": ("y = Add (t, t)", 2),
    "sum": ("y = Sum (t, t, t)", 3),
    "residual of a convolution": ("r = Neg (x)  c = Conv (x, k)  y = Add (r, c)", 1),
    "of a convolution and less than an image": ("m = ReduceMean (t)  c = Conv (t, k)  y = Add (m, c)", 2 + 1 / 64),
    "of two convolutions": ("c = Conv (x, k)  d = Conv (x, k)  y = Add (c, d)", 1),
    "of a convolution that is read again": ("r = Neg (x)  c = Conv (x, k)  a = Add (r, c)  y = Neg (c)", 3),
}


@pytest.mark.parametrize("name", CHAINS)
def test_which_operators_have_memory_of_their_own(name: str) -> None:
    """In images: what lives at the same time, the input aside."""
    text, images = CHAINS[name]
    text = f"t = Neg (x)  {text}" if "(t" in text else text
    graph = (
        f"""<ir_version: 10, opset_import: ["": 23]> g (float[1, 16, 8, 8] x) => (float[1, 16, 8, 8] y) {{ {text} }}"""
    )
    weights = {"k": np.ones((16, 16, 1, 1), np.float32)} if "k)" in text else {}
    sized = buffers_from_graph(make_model(graph, weights)).at({})
    assert lower_bound(write_in_place(as_onnxruntime_holds(sized, {}))) == images * 4 * 16 * 64


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
    ("sizes", "touched", "regions"),
    [
        ((1000, 1000, 1000), 2 * 1024, [1]),  # the third lies where the first was
        ((MIB, MIB), 2 * MIB, [1, 2]),
        ((3 * MIB, 3 * MIB, MIB), 3 * MIB + 3 * MIB, [4, 4]),  # the last where the first was
        ((MIB, 2 * MIB, MIB, MIB), MIB + 2 * MIB, [1, 2]),  # the fourth in a half of the second
        ((MIB, 2 * MIB, 2 * MIB), MIB + 2 * MIB + 2 * MIB, [1, 2, 4]),  # the third fits nowhere
        ((GIB, GIB, GIB), 2 * GIB, [1024, 1024]),  # of 1 GiB at most
    ],
)
def test_what_a_chain_touches_of_an_arena_of_its_own(sizes: tuple[int, ...], touched: int, regions: list[int]) -> None:
    assert touched_bytes(chain(*sizes), OWN) == touched + sum(regions) * MIB // 32


@pytest.mark.parametrize(
    ("sizes", "touched", "regions"),
    [
        ((MIB, MIB), 2 * MIB, 1),
        ((3 * MIB, 3 * MIB, 3 * MIB, 6 * MIB), 9 * MIB, 1),  # the last over the first two
        ((GIB, GIB, GIB), 2 * GIB, 2),  # each is 256 bytes short of two of these
        ((3 * GIB, GIB - 512, 3 * GIB), 4 * GIB - 512, 2),  # of twice the size; the second lies behind the first
    ],
)
def test_what_a_chain_touches_of_the_shared_arena(sizes: tuple[int, ...], touched: int, regions: int) -> None:
    tables = MIB // 32 + regions * (SHARED.first_bytes // 32)
    assert touched_bytes(chain(*sizes), SHARED) == touched + tables
