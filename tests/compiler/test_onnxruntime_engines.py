"""What ONNX Runtime holds of constants and touches of its arena, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdc.compiler.memory.onnxruntime_arena import touched_bytes
from sdc.compiler.memory.onnxruntime_engines import GRAPH_BYTES_PER_NODE, read_onnx_engine
from sdc.engines.errors import BundleError
from sdc.passes.memory.buffers import SizedGraph, Step

MIB = 1 << 20


def write_graph(path: Path, operator: str, dtype: type) -> Path:
    """A node with a constant of 105 elements."""
    given, weight = ir.Value(name="x"), ir.Value(name="w", const_value=ir.tensor(np.ones((7, 3, 5), dtype), name="w"))
    node = ir.node(operator, [given, weight])
    ir.save(ir.Model(ir.Graph([given], node.outputs, nodes=[node], initializers=[weight]), ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("operator", "dtype", "each", "while_loading"),
    [
        ("MatMul", np.float16, 4, 2),
        ("Conv", np.float16, 4, 2 + 4),
        ("Conv", np.float32, 4, 0),
        ("MatMul", np.int8, 1, 0),
        ("Gather", np.float16, 0, 0),
    ],
)
def test_a_constant_by_its_type_and_reader(
    tmp_path: Path, operator: str, dtype: type, each: int, while_loading: int
) -> None:
    held = read_onnx_engine(write_graph(tmp_path / "model.onnx", operator, dtype))
    assert (held.weight_bytes, held.page_bytes) == (7 * 3 * 5 * each, 7 * 3 * 5 * while_loading)
    assert held.graph_bytes == GRAPH_BYTES_PER_NODE


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="is no ONNX graph"):
        read_onnx_engine(path)


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
