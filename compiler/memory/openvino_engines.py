"""What OpenVINO's CPU plugin makes of an engine's constants when it compiles it, from the engine's file alone."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdc.engines.errors import BundleError

GRAPH_BYTES_PER_NODE = 33_000
"""What stays of a node beside its constants: the model, its clones, descriptors, kernels that were compiled for it.

Source: resident memory, less constants and activations, of SD 1.5's UNet in int8 (5,658 nodes, 35 kB each) and text
encoder (1,053, 44); of the VAE decoder before sizes were folded, over what is left of it (673, 31); OpenVINO 2026.4.
"""

PROCESS_BYTES = 130_000_000
"""The interpreter, the runtime's libraries and a tokenizer, OpenVINO and its plugin with a model of one node.

Source: as above; 54 MB of its own and 76 of files.
"""

READ_PAGES_BYTES = 25_000_000
"""Pages of a file of weights that are in memory while it is compiled, at most; of a small file a fifth of it.

They are let go of every 0.05 s or sooner (`sdc.engines.sessions.mapped_files`). Source: as above, where activations are
small.
"""
_PART_IN_PAGES = 5

_PRODUCTS = frozenset({"Convolution", "ConvolutionBackpropData", "GroupConvolution", "MatMul"})
_SCALING = frozenset({"Convert", "Multiply", "Reshape", "Subtract", "Transpose"})
"""What stands between the integers of a weight and its product."""
_FLOATING = frozenset({"f32", "f16", "bf16"})
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "i8": 8, "u8": 8, "i4": 4, "u4": 4}


@dataclass(frozen=True)
class HeldEngine:
    """What a compiled engine holds in memory beside its activations.

    Attributes:
        weight_bytes: constants, in all the forms in which they are kept.
        graph_bytes: all else.
        page_bytes: of its file, while it is compiled: before it has activations.
        packed_bytes: part of the weights that kernels of our own have packed before it is compiled.
    """

    weight_bytes: int
    graph_bytes: int
    page_bytes: int = 0
    packed_bytes: int = 0


def read_held_engine(
    path: Path,
    floating_bits: int,
    *,
    bf16_bits: int | None = None,
    packed: Collection[str] = (),
    gated: Collection[str] = (),
) -> HeldEngine:
    """What an engine in OpenVINO's representation takes once it is compiled.

    1. A float16 constant is expanded to float32 when the model is compiled, and stays so.
    2. The weight of a product (convolution or MatMul) is packed for its kernel: integers as they are stored, bfloat16
       as `bf16_bits` says, other floating point in the type of the arithmetic.
    3. Where that is bfloat16, a MatMul's float16 weight is kept once more as it was before packing.
    4. Where a scalar multiplies the product (a Gemm's alpha, even 1), it is multiplied into a bfloat16 weight: a copy
       of the weight. A float32 one has none.
    5. A float16 weight of a convolution that runs in a kernel of our own is packed from the file, and never expanded.
    6. Other constants are read where they are, in the mapped file, whose pages do not stay; small ones are copied, and
       not counted.

    Weights alone of 8 or 4 bits (``w8``, ``w4``), which some products expand, are counted as they are stored.

    Source: OpenVINO 2026.4, by the sizes and callers of its live blocks after compiling, in float32 and in bfloat16.

    Args:
        path: of the file that names the nodes (.xml).
        floating_bits: 32 or 16: what it computes in.
        bf16_bits: 16 where the processor computes in bfloat16 what has this type in the graph, 32 where it does not;
            by default `floating_bits`.
        packed: names of the convolutions that run in kernels of our own.
        gated: names of the MatMuls that do.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        root = ElementTree.parse(path).getroot()
        nodes = {int(node.attrib["id"]): node for node in root.iterfind("layers/layer")}
        readers = defaultdict(list)
        for edge in root.iterfind("edges/edge"):
            readers[int(edge.attrib["from-layer"])].append(int(edge.attrib["to-layer"]))
        constants = {
            number: (data.attrib["element_type"], data.attrib.get("shape", ""))
            for number, node in nodes.items()
            if node.attrib["type"] == "Const" and (data := node.find("data")) is not None
        }
        kinds = {number: node.attrib["type"] for number, node in nodes.items()}
    except (ElementTree.ParseError, KeyError, ValueError, OSError) as error:
        raise BundleError(f"{path} is no engine of OpenVINO: {error}", hint="export the bundle again") from error
    scalars = {number for number, (_, shape) in constants.items() if _elements(shape) == 1}
    weights = in_kernels = 0
    for number, (element, shape) in constants.items():
        product = _product(number, kinds, readers)
        kind = None if product is None else kinds[product]
        name = None if product is None else nodes[product].attrib.get("name")
        if name in packed or name in gated:
            in_kernels += _elements(shape) * (16 if element in _FLOATING else _BITS.get(element, 0)) // 8
        if element == "f16" and name in packed:
            weights += 2 * _elements(shape)
            continue
        bits = bf16_bits if element == "bf16" and bf16_bits is not None else floating_bits
        weights += _constant_bytes(element, _elements(shape), kind, bits)
        if product is not None and element == "bf16" and _is_scaled(product, kinds, readers, scalars):
            weights += _elements(shape) * _BITS[element] // 8
    stored = sum(_elements(shape) * _BITS.get(element, 0) // 8 for element, shape in constants.values())
    pages = min(stored // _PART_IN_PAGES, READ_PAGES_BYTES)
    return HeldEngine(weights, GRAPH_BYTES_PER_NODE * len(nodes), pages, min(in_kernels, weights))


def _constant_bytes(element: str, count: int, product: str | None, floating_bits: int) -> int:
    held = 4 * count if element == "f16" else 0
    if product is None or element not in _BITS:
        return held
    held += count * (floating_bits if element in _FLOATING else _BITS[element]) // 8
    if element == "f16" and product == "MatMul" and floating_bits == 16:
        held += 2 * count
    return held


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size.strip())


def _product(number: int, kinds: Mapping[int, str], readers: Mapping[int, list[int]]) -> int | None:
    """The product whose weight a constant is, through what scales integers; None if it is none."""
    reached, seen = [number], {number}
    while reached:
        for reader in readers.get(reached.pop(), ()):
            if kinds[reader] in _PRODUCTS:
                return reader
            if kinds[reader] in _SCALING and reader not in seen:
                seen.add(reader)
                reached.append(reader)
    return None


def _is_scaled(
    product: int, kinds: Mapping[int, str], readers: Mapping[int, list[int]], scalars: Collection[int]
) -> bool:
    """Whether all that is read of a product is what a scalar constant makes of it."""
    if len(readers.get(product, ())) != 1 or kinds[readers[product][0]] != "Multiply":
        return False
    (multiply,) = readers[product]
    return any(multiply in readers[scalar] for scalar in scalars)
