"""The one thing that flows through the compiler: a network's graph with its interface."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdc.engines.specs import ComponentSpec


@dataclass(frozen=True)
class Component:
    """One network with its specification; every stage takes and returns it.

    Attributes:
        spec: the interface; the graph's inputs and outputs have the same names, types and order.
        model: the graph, opset 23. Passes change it in place: `clone()` it first to keep the original.
    """

    spec: ComponentSpec
    model: ir.Model
