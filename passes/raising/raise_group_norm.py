"""Recognise GroupNormalization in the chain that exporters write before opset 21."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import (
    add_initializer,
    constant,
    dimensions,
    is_operator,
    producer,
    replace_by_several,
    site,
    sole_consumer,
)
from sdc.passes.simplify.drop_neutral import uniform_value


@dataclass(frozen=True)
class RaiseGroupNorm(Pass):
    """Every group norm is one node `GroupNormalization`.

    Instance norm over groups that were folded into the channels is group norm without its affine part:
    ``y = (x - mean) / sqrt(variance + epsilon) * gamma + beta``, statistics per sample and group.

    Source: Wu and He, arXiv:1803.08494, equation 1 to 6.

    Before → after, with x: [B, C, ...]::

        z = InstanceNormalization(Reshape(x, [B, G, -1]), 1, 0)
        y = Add(Mul(Reshape(z, shape of x), gamma), beta)          →  y = GroupNormalization(x, gamma [C], beta [C])

    Preconditions:

    1. The Reshape in front keeps the batch and leaves G channels, a divisor of C; rank is 3.
    2. The instance norm's scale is 1 and its bias 0, everywhere.
    3. The Reshape behind restores the shape of ``x``, and nothing else reads what stands in between.
    4. ``gamma`` and ``beta`` are initialisers with one value per channel: [C, 1, ...].

    A norm without its affine part gets gamma = 1 and beta = 0. Operands of Mul and Add may stand in either order.

    Not matched: instance norm proper, which has its own scales and no Reshapes; group norm from means and variances.
    """

    name: ClassVar[str] = "raise-group-norm"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; instance norms that stay are reported as skipped."""
        matched = 0
        skipped: list[Skipped] = []
        for node in [each for each in model.graph if is_operator(each, "InstanceNormalization")]:
            found = _match(node)
            if isinstance(found, str):
                skipped.append(Skipped(site(node), found))
            else:
                _raise(model.graph, node, found)
                matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


@dataclass(frozen=True)
class _Site:
    """A group norm.

    Attributes:
        x: its operand.
        channels: of x.
        groups: number of groups.
        gamma: scale per channel, None for 1; `beta` likewise, None for 0.
        nodes: all that spell it, the last gives the result.
    """

    x: ir.Value
    channels: int
    groups: int
    gamma: np.ndarray | None
    beta: np.ndarray | None
    nodes: list[ir.Node]


def _match(norm: ir.Node) -> _Site | str:
    fold, unfold = producer(norm.inputs[0], "Reshape"), sole_consumer(norm.outputs[0])
    if fold is None or not is_operator(unfold, "Reshape"):
        return "not between two Reshapes"
    assert unfold is not None
    x, folded = fold.inputs[0], dimensions(norm.inputs[0])
    shape = dimensions(x)
    assert x is not None
    if shape is None or folded is None or None in shape or dimensions(unfold.outputs[0]) != shape:
        return f"the Reshape behind gives {dimensions(unfold.outputs[0])}, expected the operand's {shape}"
    channels, groups = shape[1], folded[1]
    if not isinstance(channels, int) or not isinstance(groups, int) or len(folded) != 3 or folded[0] != shape[0]:
        return f"folds {shape} to {folded}, expected [batch, groups, rest]"
    if channels % groups:
        return f"{groups} groups do not divide {channels} channels"
    if uniform_value(norm.inputs[1]) != 1.0 or uniform_value(norm.inputs[2]) != 0.0:
        return "the instance norm has a scale or bias of its own"
    nodes = [fold, norm, unfold]
    gamma = _take_operand(nodes, "Mul", channels)
    beta = _take_operand(nodes, "Add", channels)
    return _Site(x, channels, groups, gamma, beta, nodes)


def _take_operand(nodes: list[ir.Node], op_type: str, channels: int) -> np.ndarray | None:
    """The other operand of the `op_type` behind the chain, per channel; the node joins the chain."""
    value = nodes[-1].outputs[0]
    node = sole_consumer(value)
    if not is_operator(node, op_type):
        return None
    assert node is not None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    shape, parameter = dimensions(value), dimensions(other)
    if shape is None or parameter is None or other is value:
        return None
    # [C, 1, ...] against [B, C, ...]: one value per channel, and the result has the operand's shape.
    aligned = (1,) * (len(shape) - len(parameter)) + tuple(parameter)
    if len(parameter) > len(shape) or aligned != (1, channels, *[1] * (len(shape) - 2)):
        return None
    array = constant(other)
    if array is None:
        return None
    nodes.append(node)
    return array.reshape(channels)


def _raise(graph: ir.Graph, norm: ir.Node, found: _Site) -> None:
    assert found.x.dtype is not None
    dtype = found.x.dtype.numpy()
    gamma = np.ones(found.channels, dtype) if found.gamma is None else found.gamma
    beta = np.zeros(found.channels, dtype) if found.beta is None else found.beta
    last = found.nodes[-1]
    name = last.outputs[0].name
    raised = ir.node(
        "GroupNormalization",
        [found.x, add_initializer(graph, gamma, f"{name}.gamma"), add_initializer(graph, beta, f"{name}.beta")],
        # Source: ONNX InstanceNormalization-6, default of epsilon.
        {"num_groups": found.groups, "epsilon": norm.attributes.get_float("epsilon", 1e-5)},
    )
    replace_by_several(found.nodes, [raised], last.outputs, raised.outputs, at=last)
