"""What OpenVINO holds of constants, from files that are written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdc.compiler.memory.openvino_engines import GRAPH_BYTES_PER_NODE, read_held_engine
from sdc.engines.errors import BundleError


def write_engine(path: Path, *chains: tuple[str, str, tuple[str, ...]]) -> Path:
    """A file with constants of an element type and a shape, each read through a chain of nodes."""
    layers, edges, number = [], [], 0
    for element, shape, kinds in chains:
        layers.append(f'<layer id="{number}" type="Const"><data element_type="{element}" shape="{shape}"/></layer>')
        for kind in kinds:
            layers.append(f'<layer id="{number + 1}" name="{kind} {number + 1}" type="{kind}"/>')
            edges.append(f'<edge from-layer="{number}" to-layer="{number + 1}"/>')
            number += 1
        number += 1
    path.write_text(f"<net><layers>{''.join(layers)}</layers><edges>{''.join(edges)}</edges></net>")
    return path


@pytest.mark.parametrize(
    ("element", "kinds", "in_16_bits", "in_32_bits"),
    [
        ("f16", ("Convolution",), 4 + 2, 4 + 4),
        ("f16", ("MatMul",), 4 + 2 + 2, 4 + 4),
        ("f16", ("Convert", "Convolution"), 4 + 2, 4 + 4),
        ("f16", ("Gather", "MatMul"), 4, 4),
        ("f16", ("Add",), 4, 4),
        ("bf16", ("MatMul",), 2, 4),
        ("bf16", ("Gather",), 0, 0),
        ("f32", ("GroupConvolution",), 2, 4),
        ("f32", ("Gather",), 0, 0),
        ("i8", ("Convert", "Multiply", "MatMul"), 1, 1),
        ("i8", ("Convert", "Subtract", "Multiply", "Reshape", "Convolution"), 1, 1),
        ("i64", ("Reshape", "MatMul"), 0, 0),
    ],
)
def test_a_constant_in_all_its_forms(
    tmp_path: Path, element: str, kinds: tuple[str, ...], in_16_bits: int, in_32_bits: int
) -> None:
    path = write_engine(tmp_path / "engine.xml", (element, "7,3,5", kinds))
    for bits, each in ((16, in_16_bits), (32, in_32_bits)):
        held = read_held_engine(path, bits)
        assert held.weight_bytes == 7 * 3 * 5 * each
        assert held.graph_bytes == (1 + len(kinds)) * GRAPH_BYTES_PER_NODE


@pytest.mark.parametrize(
    ("element", "kinds", "each"),
    [
        ("f16", ("Convolution",), 2),
        ("f16", ("Convert", "Convolution"), 2),
        ("f16", ("Add",), 4),
        ("bf16", ("Convolution",), 2),
        ("i8", ("Convert", "Multiply", "Convolution"), 1),
    ],
)
def test_kernels_hold_float16_weights_packed_alone(
    tmp_path: Path, element: str, kinds: tuple[str, ...], each: int
) -> None:
    path = write_engine(tmp_path / "engine.xml", (element, "7,15,1,1", kinds), ("f16", "4", ("Convolution",)))
    packed = {f"Convolution {len(kinds)}"}
    assert read_held_engine(path, 16, packed=packed).weight_bytes == 7 * 15 * each + 4 * (4 + 2)


def test_what_kernels_pack_is_in_memory_before_the_rest(tmp_path: Path) -> None:
    int8 = ("Convert", "Multiply", "MatMul")
    path = write_engine(
        tmp_path / "engine.xml",
        ("f16", "7,15", ("Convolution",)),
        ("i8", "7,11", int8),
        ("bf16", "5,3", ("MatMul",)),
        ("i8", "100", int8),
    )
    held = read_held_engine(path, 16, packed={"Convolution 1"}, gated={"MatMul 5", "MatMul 7"})
    assert held.packed_bytes == 2 * 7 * 15 + 7 * 11 + 2 * 5 * 3
    assert held.weight_bytes == held.packed_bytes + 100


@pytest.mark.parametrize(("floating", "bf16", "each"), [(32, 16, 2), (32, 32, 4), (16, None, 2), (32, None, 4)])
def test_bfloat16_of_an_engine_in_float32_is_packed_as_the_processor_computes_it(
    tmp_path: Path, floating: int, bf16: int | None, each: int
) -> None:
    path = write_engine(tmp_path / "engine.xml", ("bf16", "7,15", ("MatMul",)), ("f32", "2", ("MatMul",)))
    held = read_held_engine(path, floating, bf16_bits=bf16)
    assert held.weight_bytes == 7 * 15 * each + 2 * floating // 8


@pytest.mark.parametrize(
    ("element", "kinds", "shape", "each"),
    [
        ("bf16", ("MatMul", "Multiply"), "", 2 + 2),
        ("bf16", ("MatMul", "Multiply"), "1", 2 + 2),
        ("f32", ("MatMul", "Multiply"), "", 2),
        ("i8", ("Convert", "Multiply", "MatMul", "Multiply"), "", 1),
        ("bf16", ("MatMul", "Multiply"), "5", 2),
        ("bf16", ("MatMul", "Add"), "", 2),
    ],
)
def test_a_weight_is_copied_where_a_scalar_multiplies_its_product(
    tmp_path: Path, element: str, kinds: tuple[str, ...], shape: str, each: int
) -> None:
    path = write_engine(tmp_path / "engine.xml", (element, "7,3,5", kinds), ("f32", shape, ()))
    scale, multiply = 1 + len(kinds), len(kinds)
    text = path.read_text().replace("<edges>", f'<edges><edge from-layer="{scale}" to-layer="{multiply}"/>')
    path.write_text(text)
    assert read_held_engine(path, 16).weight_bytes == 7 * 3 * 5 * each


def test_constants_add_up_and_scalars_count_once(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "engine.xml", ("f16", "", ("Add",)), ("i8", "10", ("Convert", "MatMul")))
    assert read_held_engine(path, 16).weight_bytes == 4 + 10


@pytest.mark.parametrize("content", ["no xml", '<net><layers><layer id="x" type="Const"/></layers></net>'])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "engine.xml"
    path.write_text(content)
    with pytest.raises(BundleError, match="is no engine of OpenVINO"):
        read_held_engine(path, 16)
