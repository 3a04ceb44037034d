"""Operators of domain `sdc`: what the graph says once it is fused, each defined by its own reference body.

Every fused operator is a model-local function, so a fused graph runs wherever standard operators run, and a kernel that
implements one has the body to be tested against. The contract for kernels:

- All floating-point inputs and outputs of a node have one element type; bodies hold no floating-point constant but
  through CastLike, and no other cast, so the same function serves float32 and float16.
- ``x``, ``sum`` and ``y`` of the normalisations are [B, C, spatial...]; nothing in them depends on the order of
  dimensions in memory, so a kernel may keep them channels-last.
- Attention takes and gives [B, S, heads * head_size], as projections leave and take it: no transposes around it.
- Weights of Conv, Gemm and MatMul are never inside a function: quantisation sees every one of them in the main graph.
- Statistics of normalisations and the softmax accumulate in float32 at least (``stash_type`` is 1).
"""

from __future__ import annotations

from functools import cache

import onnx
import onnx.parser
import onnx_ir as ir

DOMAIN = "sdc"
VERSION = 1

SILU = "Silu"
QUICK_GELU = "QuickGelu"
GROUP_NORM_SILU = "GroupNormSilu"
ADD_GROUP_NORM_SILU = "AddGroupNormSilu"
MULTI_HEAD_ATTENTION = "MultiHeadAttention"

_BODIES = {
    SILU: """
        <domain: "sdc", opset_import: ["": 23]>
        Silu (x) => (y) {
            gate = Sigmoid (x)
            y = Mul (x, gate)
        }""",
    QUICK_GELU: """
        <domain: "sdc", opset_import: ["": 23]>
        QuickGelu (x) => (y) {
            factor = Constant <value_float: float = 1.702> ()
            factor_like_x = CastLike (factor, x)
            scaled = Mul (x, factor_like_x)
            gate = Sigmoid (scaled)
            y = Mul (x, gate)
        }""",
    GROUP_NORM_SILU: """
        <domain: "sdc", opset_import: ["": 23]>
        GroupNormSilu <num_groups, epsilon> (x, gamma, beta) => (y) {
            normed = GroupNormalization <num_groups: int = @num_groups, epsilon: float = @epsilon> (x, gamma, beta)
            gate = Sigmoid (normed)
            y = Mul (normed, gate)
        }""",
    ADD_GROUP_NORM_SILU: """
        <domain: "sdc", opset_import: ["": 23]>
        AddGroupNormSilu <num_groups, epsilon> (x, addend, gamma, beta) => (y, sum) {
            sum = Add (x, addend)
            normed = GroupNormalization <num_groups: int = @num_groups, epsilon: float = @epsilon> (sum, gamma, beta)
            gate = Sigmoid (normed)
            y = Mul (normed, gate)
        }""",
    MULTI_HEAD_ATTENTION: """
        <domain: "sdc", opset_import: ["": 23]>
        MultiHeadAttention <num_heads, scale, is_causal> (query, key, value, mask) => (y) {
            heads = Constant <value_int: int = @num_heads> ()
            minus_one = Constant <value_ints: ints = [-1]> ()
            keep_two = Constant <value_ints: ints = [0, 0]> ()
            heads_1d = Reshape (heads, minus_one)
            split = Concat <axis = 0> (keep_two, heads_1d, minus_one)
            merge = Concat <axis = 0> (keep_two, minus_one)
            query_split = Reshape (query, split)
            key_split = Reshape (key, split)
            value_split = Reshape (value, split)
            q = Transpose <perm = [0, 2, 1, 3]> (query_split)
            k = Transpose <perm = [0, 2, 1, 3]> (key_split)
            v = Transpose <perm = [0, 2, 1, 3]> (value_split)
            context = Attention <scale: float = @scale, is_causal: int = @is_causal> (q, k, v, mask)
            context_split = Transpose <perm = [0, 2, 1, 3]> (context)
            y = Reshape (context_split, merge)
        }""",
}


OPERATORS = tuple(_BODIES)
"""Names of all operators of the domain."""


@cache
def _function_proto(operator: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(_BODIES[operator])


def import_operator(model: ir.Model, operator: str) -> None:
    """Make `operator` of the domain callable in `model`: its function and the domain's version."""
    identifier = (DOMAIN, operator, "")
    if identifier not in model.functions:
        model.functions[identifier] = ir.serde.deserialize_function(_function_proto(operator))
    model.graph.opset_imports[DOMAIN] = VERSION


def is_fused(node: ir.Node, operator: str) -> bool:
    """Whether `node` calls `operator` of the domain."""
    return node.domain == DOMAIN and node.op_type == operator
