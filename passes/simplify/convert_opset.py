"""Bring graphs of other operator sets to the one that all other passes speak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import add_initializer, constant, dimensions, replace_by_several, site

OPSET = 23
OLDEST, NEWEST = 13, 24
_IR_VERSION = 10
"""What torch's exporter writes for opset 23."""


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """The model imports ONNX's operator set 23, and every operator means what it meant.

    Between opsets 13 and 24 most operators only gained element types and optional attributes. What changed is
    rewritten, in subgraphs too; no weight is read but GroupNormalization's own.

    Before → after::

        Reduce*(x), axes = a (before 18)                          →  Reduce*(x, a)
        Split(x) without sizes (before 18)                        →  Split(x), num_outputs
        GroupNormalization(x, gamma [G], beta [G]) (before 21)    →  GroupNormalization(x, gamma [C], beta [C])
        GridSample, mode bilinear or bicubic (before 20)          →  mode linear or cubic
        Swish(x), alpha = a (24)                                  →  Mul(x, Sigmoid(Mul(x, a)))

    Preconditions:

    1. The model imports an opset from 13 to 24.
    2. Operators that changed in another way (DFT, RoiAlign before 16) do not occur.
    3. Scale and bias of an older GroupNormalization are initialisers, and the channels are known.
    4. Of opset 24, nothing is used that opset 23 lacks, Swish aside.

    onnxscript's converter begins at 18 and loses the epsilon of GroupNormalization; ONNX's own copies the model.
    """

    name: ClassVar[str] = "convert-opset"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Convert; the match count is the number of rewritten operators.

        Raises:
            PassError: an operator cannot be converted.
        """
        version = model.graph.opset_imports.get("") or model.graph.opset_imports.pop("ai.onnx", OPSET)
        if not OLDEST <= version <= NEWEST:
            raise PassError(
                f"the graph is in opset {version}, expected {OLDEST} to {NEWEST}",
                hint=f"export it with opset_version={OPSET}",
            )
        matched = 0
        for node in list(model.graph.all_nodes()) if version != OPSET else ():
            if node.domain == "":
                matched += _convert(node, version)
            node.version = None
        model.graph.opset_imports[""] = OPSET
        model.ir_version = max(model.ir_version, _IR_VERSION)
        return PassReport(name=self.name, matched=matched, details={"from": version})


def _convert(node: ir.Node, version: int) -> bool:
    """Rewrite one operator; whether it changed."""
    if node.op_type in _CHANGED:
        until, convert = _CHANGED[node.op_type]
        return version < until and convert(node)
    if node.op_type.startswith("Reduce"):
        return version < 18 and _axes_to_input(node)
    if node.op_type == "Swish":
        _spell_out_swish(node)
        return True
    if version > OPSET and any(value is not None for value in node.inputs[6:]) and node.op_type == "Attention":
        raise _refusal(node, version, "lengths of padded keys")
    if version > OPSET and not onnx.defs.has(node.op_type, OPSET, ""):
        raise _refusal(node, version, "there is no such operator")
    return False


def _refusal(node: ir.Node, version: int, what: str) -> PassError:
    return PassError(
        f"{site(node)} of opset {version} cannot be brought to opset {OPSET}: {what}",
        hint=f"export the graph with opset_version={OPSET}",
    )


def _add_operand(node: ir.Node, array: np.ndarray, *, index: int) -> None:
    """Make an initialiser the operand at `index`."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, add_initializer(graph, array, f"{node.outputs[0].name}.operand_{index}"))


def _axes_to_input(node: ir.Node) -> bool:
    if "axes" not in node.attributes:
        return False
    axes = node.attributes.pop("axes").as_ints()
    _add_operand(node, np.array(axes, np.int64), index=1)
    return True


def _count_outputs(node: ir.Node) -> bool:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return False
    node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    return True


def _scale_per_channel(node: ir.Node) -> bool:
    shape, groups = dimensions(node.inputs[0]), node.attributes["num_groups"].as_int()
    channels = shape[1] if shape is not None else None
    parameters = [constant(value) for value in node.inputs[1:3]]
    if not isinstance(channels, int) or any(parameter is None for parameter in parameters):
        raise _refusal(node, 20, "its channels are unknown or its scale and bias are computed")
    for index, parameter in enumerate(parameters, 1):
        assert parameter is not None
        if parameter.size not in (groups, channels):
            raise _refusal(node, 20, f"{parameter.size} scales for {groups} groups")
        _add_operand(node, np.repeat(parameter, channels // parameter.size), index=index)
    return True


def _rename_mode(node: ir.Node) -> bool:
    mode = node.attributes.get_string("mode", "bilinear")
    node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))
    return True


def _spell_out_swish(node: ir.Node) -> None:
    x, graph = node.inputs[0], node.graph
    assert x is not None
    assert isinstance(graph, ir.Graph)
    alpha = node.attributes.get_float("alpha", 1.0)
    nodes = []
    argument = x
    if alpha != 1.0:
        assert x.dtype is not None
        factor = add_initializer(graph, np.array(alpha, x.dtype.numpy()), f"{node.outputs[0].name}.alpha")
        nodes.append(ir.node("Mul", [x, factor]))
        argument = nodes[0].outputs[0]
    nodes.append(ir.node("Sigmoid", [argument]))
    nodes.append(ir.node("Mul", [x, nodes[-1].outputs[0]]))
    replace_by_several([node], nodes, node.outputs, nodes[-1].outputs, at=node)


def _refuse(node: ir.Node) -> bool:
    raise _refusal(node, OPSET - 1, "its meaning changed")


_CHANGED: dict[str, tuple[int, Callable[[ir.Node], bool]]] = {
    # Source: ONNX's changelog of operators, versions 13 to 24.
    "Split": (18, _count_outputs),
    "GroupNormalization": (21, _scale_per_channel),
    "GridSample": (20, _rename_mode),
    "DFT": (20, _refuse),
    "RoiAlign": (16, _refuse),
}
"""Operators that changed: the version that changed them, and what brings an older one there."""
