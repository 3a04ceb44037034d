"""What a graph computes in float32 stays so in an engine that may compute in bfloat16.

Under its hint for bfloat16 OpenVINO rounds operands of float32 as well. Sums that run through a whole network, and
their normalisations, lose by it: the error of SD 1.5's text encoder is 0.0068 with the marks and 0.0076 without
(OpenVINO's own 0.0072), in the same time (OpenVINO 2026.4, AMX). The attribute is read with the engine, so the file
carries it; the Python interface cannot set it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

_KEPT = frozenset({"Add", "Multiply", "MVN"})
_PASSED_ON = frozenset({"Const", "Convert", "Parameter"})
"""What these give in float32 was not computed in it."""

_MARK = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"}
"""Source: OpenVINO 2026.4's runtime attribute of that name, as it is written to files: from any type to these two."""


def keep_float32(path: Path) -> int:
    """Mark sums, products by elements and normalisations of what was computed in float32.

    One that stands between conversions, as a normalisation of 16 bits with float32 statistics, is left to OpenVINO.

    Args:
        path: an OpenVINO intermediate representation, changed in place.

    Returns:
        The number of operators.
    """
    tree = ElementTree.parse(path)
    layers = {layer.attrib["id"]: layer for layer in tree.iter("layer")}
    computed = {
        edge.attrib["to-layer"]
        for edge in tree.iter("edge")
        if _gives_float32(feeder := layers[edge.attrib["from-layer"]]) and feeder.attrib["type"] not in _PASSED_ON
    }
    kept = [
        layer
        for identifier, layer in layers.items()
        if identifier in computed and layer.attrib["type"] in _KEPT and _gives_float32(layer)
    ]
    for layer in kept:
        ElementTree.SubElement(_runtime_info(layer), "attribute", _MARK)
    if kept:
        tree.write(path, encoding="utf-8", xml_declaration=True)
    return len(kept)


def _gives_float32(layer: ElementTree.Element) -> bool:
    port = layer.find("output/port")
    return port is not None and port.attrib["precision"] == "FP32"


def _runtime_info(layer: ElementTree.Element) -> ElementTree.Element:
    """The element of a layer's runtime attributes, made where there is none: behind its data."""
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        layer.insert(0 if layer.find("data") is None else 1, info)
    return info
