"""Which layers run in integers, and why the others do not.

A *layer* is a Conv, MatMul or Gemm whose second operand is constant. Each has one `Role`, found from the shape of the
graph around it and never from names; what a precision leaves alone is chosen by roles (`plan.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from sdc.passes.base import Skipped
from sdc.passes.matching import is_operator, site
from sdc.passes.precision.layer_roles import Role, roles_from_model


class Kind(StrEnum):
    """The operators that can be quantised."""

    CONV = "Conv"
    MATMUL = "MatMul"
    GEMM = "Gemm"


DEFAULT_KEPT = frozenset({Role.TIMESTEP, Role.INPUT, Role.OUTPUT, Role.SHORTCUT, Role.PROJECTION_OUT})
"""Roles whose arithmetic stays in floating point.

Source: the layers that published INT8 recipes leave alone (NVIDIA TensorRT's and ModelOpt's Stable Diffusion examples:
time embedding and its projections, conv_in, conv_out, conv_shortcut, proj_out). Together they are 5 % of the
multiply-adds of `tiny`'s UNet. Measured on it half-trained (8 pictures, DDIM 20, OpenVINO in float32): quantising one
of these roles as well takes 4 dB of PSNR to fp32 for ``OUTPUT`` and ``SHORTCUT`` and 1.6 dB for ``PROJECTION_OUT``, and
multiplies the error of epsilon by 3.8 for ``INPUT``. The prompt's keys and values are quantised: leaving them in
floating point changes nothing that this resolves.
"""

DEFAULT_WEIGHTS_ONLY = frozenset({Role.TIMESTEP})
"""Roles among those kept whose weights are stored as integers all the same.

A timestep's layers multiply one row: they cost the reading of their weights and nothing else. In SD 1.5 these are 27.7
million, 3 % of the UNet.
"""

REASONS = {
    Role.TIMESTEP: "depends on the timestep alone: next to no work, and its error reaches every block",
    Role.PROMPT: "depends on the prompt alone: computed once where keys and values are cached",
    Role.INPUT: "reads the network's input: first layer, few channels",
    Role.OUTPUT: "writes the network's output: its error is the picture's",
    Role.SHORTCUT: "pointwise on a skip connection: reads a sum that no normalisation bounds",
    Role.PROJECTION_OUT: "pointwise at the end of a transformer block: reads a sum that no normalisation bounds",
    Role.INTERIOR: "interior layer, kept by the policy",
}
"""Why a policy treats a role by itself."""


@dataclass(frozen=True)
class Layer:
    """A multiplication with a constant.

    Attributes:
        node: the Conv, MatMul or Gemm; input 0 is the activation, input 1 the weight.
        role: its place in the network.
        output_axis: the weight's axis of output channels.
    """

    node: ir.Node
    role: Role
    output_axis: int

    @property
    def activation(self) -> ir.Value:
        """What is multiplied."""
        value = self.node.inputs[0]
        assert value is not None  # checked by `find_layers`
        return value

    @property
    def weight(self) -> ir.Value:
        """The constant operand."""
        value = self.node.inputs[1]
        assert value is not None  # checked by `find_layers`
        return value

    @property
    def input_axis(self) -> int:
        """The weight's axis of input channels."""
        return 1 - self.output_axis

    @property
    def channels(self) -> int:
        """Number of input channels."""
        assert self.weight.shape is not None  # a constant's is known
        return int(self.weight.shape.numpy()[self.input_axis])

    @property
    def spatial_axes(self) -> int:
        """Number of the activation's axes behind its channels."""
        return len(self.weight.shape or ()) - 2 if self.node.op_type == Kind.CONV else 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Sizes of the weight."""
        tensor = ir.convenience.get_const_tensor(self.weight)
        assert tensor is not None  # `find_layers` selects constant weights only
        return tuple(int(size) for size in tensor.shape.numpy())


def row_length(layer: Layer) -> int:
    """Weights of one output channel."""
    shape = layer.weight_shape
    return math.prod(shape) // shape[layer.output_axis]


def find_layers(model: ir.Model) -> tuple[list[Layer], list[Skipped]]:
    """Every layer of the main graph, and the multiplications that cannot be one, with reasons.

    Raises:
        PassError: an input of the graph has no known rank.
    """
    roles = roles_from_model(model)
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    for node in model.graph:
        if not any(is_operator(node, kind) for kind in Kind):
            continue
        reason = _reason_against(node)
        if reason is not None:
            skipped.append(Skipped(site(node), reason))
            continue
        layers.append(Layer(node, roles[node.outputs[0].name or ""], _output_axis(node)))
    return layers, skipped


def _reason_against(node: ir.Node) -> str | None:
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None:
        return "an operand is missing"
    if _is_dequantised(activation) or _is_dequantised(weight):
        return "already quantised"
    tensor = ir.convenience.get_const_tensor(weight)
    if tensor is None:
        return "a product of two activations"
    if ir.convenience.get_const_tensor(activation) is not None:
        return "both operands are constant"
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"the weight is {tensor.dtype.name}, expected FLOAT or FLOAT16"
    groups = node.attributes.get_int("group") or 1
    if node.op_type == Kind.CONV and groups != 1:
        return f"a grouped convolution ({groups} groups)"
    if node.op_type == Kind.GEMM and node.attributes.get_int("transA"):
        return "a Gemm with a transposed activation"
    if node.op_type == Kind.MATMUL and len(tensor.shape) != 2:
        return f"a constant operand of rank {len(tensor.shape)}, expected a matrix"
    return None


def _is_dequantised(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and is_operator(node, "Reshape") and node.inputs[0] is not None:
        node = node.inputs[0].producer()  # weights in blocks are stored as a matrix
    return is_operator(node, "DequantizeLinear")


def _output_axis(node: ir.Node) -> int:
    """Conv weights are [O, I, ...], MatMul weights [I, O], Gemm weights [I, O] or, transposed, [O, I]."""
    if node.op_type == Kind.CONV:
        return 0
    if node.op_type == Kind.GEMM:
        return 0 if node.attributes.get_int("transB") else 1
    return 1
