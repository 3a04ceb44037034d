"""Arrange GroupNormalization for backends that have no kernel for it, or a slower one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import constant, is_operator, site
from sdc.passes.precision.half_tensors import EXACT_CONSTANT


@dataclass(frozen=True)
class LowerGroupNorm(Pass):
    """GroupNormalization becomes InstanceNormalization over groups, which is one kernel, and an affine map.

    Before → after, with x: [B, C, spatial...]::

        y = GroupNormalization(x, gamma, beta)
            →  n = InstanceNormalization(Reshape(x, [0, groups, -1]), ones, zeros)
               y = BatchNormalization(Reshape(n, Shape(x)), gamma, beta, mean = 0, variance = 1), epsilon = 0

    ONNX Runtime on the CPU otherwise expands GroupNormalization to a chain of some fifteen element-wise operators.
    BatchNormalization is its one kernel for an affine map per channel: a Mul and an Add read and write twice as much.
    OpenVINO's own expansion normalises a tensor of four axes, whose kernel costs some 40 us a call even where there is
    nothing to do.

    Preconditions:

    1. x is of one of the types, float32 alone if not said otherwise: InstanceNormalization does not promise float32
       statistics for others. OpenVINO has the same kernel, with the same statistics, for both forms.
    2. gamma and beta are initialisers.

    With `exact`, gamma and beta of bfloat16 are Cast(the float32 that they were rounded from), where that is known, for
    backends that compute the map in float32 if they can have it so. In float16 they may have been clamped.

    Not matched: what fails these; it stays GroupNormalization.

    Attributes:
        dtypes: types of x that are rewritten.
        exact: whether gamma and beta of bfloat16 are written in float32.

    Source: ONNX GroupNormalization-21 (per-channel gamma and beta), InstanceNormalization-22, BatchNormalization-15.
    """

    name: ClassVar[str] = "lower-group-norm"

    dtypes: frozenset[ir.DataType] = frozenset({ir.DataType.FLOAT})
    exact: bool = False

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites."""
        matched = 0
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if is_operator(node, "GroupNormalization")]:
            if reason := self._reason_against(norm):
                skipped.append(Skipped(site(norm), reason))
            else:
                _lower(model.graph, norm, exact=self.exact)
                matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))

    def _reason_against(self, norm: ir.Node) -> str | None:
        x = norm.inputs[0]
        assert x is not None
        if x.dtype not in self.dtypes:
            expected = ", ".join(sorted(each.name for each in self.dtypes))
            return f"x is {x.dtype and x.dtype.name}, expected {expected}"
        if any(constant(parameter) is None for parameter in norm.inputs[1:]):
            return "gamma or beta is computed, expected initialisers"
        return None


def _lower(graph: ir.Graph, norm: ir.Node, *, exact: bool) -> None:
    x, gamma, beta = norm.inputs
    assert x is not None
    assert x.dtype is not None  # the pass selects by it
    dtype = x.dtype.numpy()
    gamma_values = constant(gamma)
    assert gamma_values is not None
    name = norm.outputs[0].name
    groups = norm.attributes["num_groups"].as_int()

    def initializer(suffix: str, values: np.ndarray) -> ir.Value:
        tensor = ir.tensor(values, name=f"{name}.{suffix}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    new: list[ir.Node] = []

    def parameter(suffix: str, value: ir.Value | None) -> ir.Value:
        assert value is not None
        source = value.meta.get(EXACT_CONSTANT)
        if source is None or not exact or x.dtype != ir.DataType.BFLOAT16:
            return value
        new.append(ir.node("Cast", [initializer(suffix, source.numpy())], {"to": x.dtype}))
        return new[-1].outputs[0]

    ones, zeros = np.ones(groups, dtype), np.zeros(groups, dtype)
    grouped = ir.node("Reshape", [x, initializer("grouped", np.array([0, groups, -1], np.int64))])
    normed = ir.node(
        "InstanceNormalization",
        [grouped.outputs[0], initializer("ones", ones), initializer("zeros", zeros)],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
    )
    size = ir.node("Shape", [x])
    restored = ir.node("Reshape", [normed.outputs[0], size.outputs[0]])
    mean, variance = np.zeros(gamma_values.shape, dtype), np.ones(gamma_values.shape, dtype)
    mapped = ir.node(
        "BatchNormalization",
        [
            restored.outputs[0],
            parameter("gamma", gamma),
            parameter("beta", beta),
            initializer("mean", mean),
            initializer("variance", variance),
        ],
        {"epsilon": 0.0},
    )
    new += [grouped, normed, size, restored, mapped]
    for node in new:
        node.outputs[0].dtype = ir.DataType.INT64 if node is size else x.dtype
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], new, norm.outputs, mapped.outputs)
