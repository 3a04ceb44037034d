"""Recognise LayerNormalization that is written as means and squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import (
    constant,
    dimensions,
    is_operator,
    producer,
    replace_by_several,
    scalar,
    site,
    sole_consumer,
    through_casts,
)


@dataclass(frozen=True)
class RaiseLayerNorm(Pass):
    """Every layer norm over the last dimension is one node `LayerNormalization`.

    ``y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * gamma + beta``

    Source: Ba, Kiros and Hinton, arXiv:1607.06450, equation 3 and 4.

    Before → after, with x: [..., D]::

        d = Sub(x, ReduceMean(x))
        s = Sqrt(Add(ReduceMean(Pow(d, 2) or Mul(d, d)), epsilon))
        y = Add(Mul(Div(d, s), gamma), beta)                        →  y = LayerNormalization(x, gamma, beta)

    Preconditions:

    1. Both means are over the last dimension alone and keep it.
    2. The exponent is 2 and epsilon a number.
    3. ``gamma`` and ``beta`` are initialisers of shape [D].
    4. The result has the type of ``x``. Conversions to a wider type in between are left out: `LayerNormalization`
       computes its statistics in float32 (``stash_type`` is 1).

    Operands of Add and Mul may stand in either order; a Reciprocal and Mul may stand for the Div.

    Not matched: norms without gamma and beta, over several dimensions, or around no mean (RMS norm).
    """

    name: ClassVar[str] = "raise-layer-norm"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; a Sqrt of a variance that stays is reported as skipped."""
        matched = 0
        skipped: list[Skipped] = []
        for node in [each for each in model.graph if is_operator(each, "Sqrt")]:
            found = _match(node)
            if isinstance(found, str):
                skipped.append(Skipped(site(node), found))
            elif found is not None:
                raised = ir.node(
                    "LayerNormalization", [found.x, found.gamma, found.beta], {"axis": -1, "epsilon": found.epsilon}
                )
                last = found.nodes[-1]
                replace_by_several(found.nodes, [raised], last.outputs, raised.outputs, at=last)
                matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


@dataclass(frozen=True)
class _Site:
    x: ir.Value
    gamma: ir.Value
    beta: ir.Value
    epsilon: float
    nodes: list[ir.Node]


def _match(root: ir.Node) -> _Site | str | None:
    """The norm around a Sqrt, or why it is none, or None if it does not look like one."""
    add = producer(root.inputs[0], "Add")
    if add is None:
        return None
    variance, epsilon = _either(add, lambda value: producer(value, "ReduceMean"), scalar)
    if variance is None or epsilon is None:
        return None
    square = through_casts(variance.inputs[0])
    deviation = _squared(square)
    centre = producer(through_casts(deviation), "Sub")
    if deviation is None or centre is None:
        return "what is averaged is not the square of a difference"
    x, mean = through_casts(centre.inputs[0]), producer(through_casts(centre.inputs[1]), "ReduceMean")
    if x is None or mean is None or through_casts(mean.inputs[0]) is not x:
        return "the difference is not that of a value and its own mean"
    if not _over_last(mean) or not _over_last(variance):
        return "a mean is not over the last dimension alone"
    scaled = _normalised(root, centre.outputs[0])
    if scaled is None:
        return "the deviation is not divided by the root, or something else reads it"
    return _affine(x, scaled, epsilon)


def _either(
    node: ir.Node,
    first: Callable[[ir.Value | None], ir.Node | None],
    second: Callable[[ir.Value | None], float | None],
) -> tuple[ir.Node | None, float | None]:
    """What two questions find in the operands of a commutative node, one in each."""
    a, b = node.inputs
    for left, right in ((a, b), (b, a)):
        node_found, number = first(left), second(right)
        if node_found is not None and number is not None:
            return node_found, number
    return None, None


def _squared(value: ir.Value | None) -> ir.Value | None:
    if (power := producer(value, "Pow")) is not None:
        return power.inputs[0] if scalar(power.inputs[1]) == 2.0 else None
    product = producer(value, "Mul")
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def _over_last(mean: ir.Node) -> bool:
    shape = dimensions(mean.inputs[0])
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if shape is None or axes is None or axes.size != 1 or mean.attributes.get_int("keepdims", 1) != 1:
        return False
    return int(axes.item()) % len(shape) == len(shape) - 1


def _normalised(root: ir.Node, deviation: ir.Value) -> ir.Node | None:
    """The node that divides the deviation by the root."""
    divide = sole_consumer(root.outputs[0])
    if is_operator(divide, "Div") and divide is not None and through_casts(divide.inputs[0]) is deviation:
        return divide
    if is_operator(divide, "Reciprocal") and divide is not None:
        product = sole_consumer(divide.outputs[0])
        if is_operator(product, "Mul") and product is not None and deviation in map(through_casts, product.inputs):
            return product
    return None


def _affine(x: ir.Value, normalised: ir.Node, epsilon: float) -> _Site | str:
    nodes = [normalised]
    parameters = []
    for op_type in ("Mul", "Add"):
        node = sole_consumer(nodes[-1].outputs[0])
        while is_operator(node, "Cast") and node is not None:
            nodes.append(node)
            node = sole_consumer(node.outputs[0])
        if node is None or not is_operator(node, op_type):
            return f"no {op_type} with gamma or beta follows"
        other = node.inputs[1] if node.inputs[0] is nodes[-1].outputs[0] else node.inputs[0]
        shape = dimensions(x)
        if other is None or other.const_value is None or shape is None or dimensions(other) != shape[-1:]:
            return "gamma or beta is not an initialiser of the last dimension's size"
        parameters.append(other)
        nodes.append(node)
    if any(parameter.dtype != x.dtype for parameter in parameters):
        return f"gamma and beta are {[str(each.dtype) for each in parameters]}, x is {x.dtype}"
    if nodes[-1].outputs[0].dtype != x.dtype:
        return f"takes {x.dtype} and gives {nodes[-1].outputs[0].dtype}"
    if dimensions(nodes[-1].outputs[0]) != dimensions(x):
        return "a number adds axes to the result"
    return _Site(x, parameters[0], parameters[1], epsilon, nodes)
