"""Operators of domain `sdc`: what the graph says once it is fused, each defined by its own reference body.

Every fused operator is a model-local function, so a fused graph runs wherever standard operators run, and a kernel that
implements one has the body to be tested against. The contract for kernels:

- All floating-point inputs and outputs of a node have one element type; bodies hold no floating-point constant but
  through CastLike, and no other cast, so the same function serves float32 and float16.
- ``x``, ``sum`` and ``y`` of the normalisations are [B, C, spatial...]; nothing in them depends on the order of
  dimensions in memory, so a kernel may keep them channels-last.
- ``x``, ``residual`` and ``y`` of what works on tokens are [B, S, C]; a ``bias`` is [C] and is added to what a MatMul
  gives before anything else, so that its rounding is that of a MatMul with a bias.
- The size of an image is read from ``like``, of which only the shape counts: [B, any, H, W].
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
ADD_GROUP_NORM = "AddGroupNorm"
CONCAT_GROUP_NORM_SILU = "ConcatGroupNormSilu"
GROUP_NORM_SILU_ADD = "GroupNormSiluAdd"
MULTI_HEAD_ATTENTION = "MultiHeadAttention"
ADD_LAYER_NORM = "AddLayerNorm"
BIAS_ADD_LAYER_NORM = "BiasAddLayerNorm"
BIAS_GEGLU = "BiasGeGlu"
BIAS_ADD = "BiasAdd"
TOKENS_FROM_IMAGE = "TokensFromImage"
IMAGE_FROM_TOKENS = "ImageFromTokens"

GROUP_NORM_SILU_OPERATORS = (GROUP_NORM_SILU, ADD_GROUP_NORM_SILU, CONCAT_GROUP_NORM_SILU, GROUP_NORM_SILU_ADD)
"""GroupNorm+SiLU, alone or with a neighbour."""

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
    ADD_GROUP_NORM: """
        <domain: "sdc", opset_import: ["": 23]>
        AddGroupNorm <num_groups, epsilon> (x, addend, gamma, beta) => (y, sum) {
            sum = Add (x, addend)
            y = GroupNormalization <num_groups: int = @num_groups, epsilon: float = @epsilon> (sum, gamma, beta)
        }""",
    CONCAT_GROUP_NORM_SILU: """
        <domain: "sdc", opset_import: ["": 23]>
        ConcatGroupNormSilu <num_groups, epsilon> (x, skip, gamma, beta) => (y, joined) {
            joined = Concat <axis = 1> (x, skip)
            normed = GroupNormalization <num_groups: int = @num_groups, epsilon: float = @epsilon> (joined, gamma, beta)
            gate = Sigmoid (normed)
            y = Mul (normed, gate)
        }""",
    GROUP_NORM_SILU_ADD: """
        <domain: "sdc", opset_import: ["": 23]>
        GroupNormSiluAdd <num_groups, epsilon> (x, addend, gamma, beta) => (y) {
            normed = GroupNormalization <num_groups: int = @num_groups, epsilon: float = @epsilon> (x, gamma, beta)
            gate = Sigmoid (normed)
            active = Mul (normed, gate)
            y = Add (active, addend)
        }""",
    ADD_LAYER_NORM: """
        <domain: "sdc", opset_import: ["": 23]>
        AddLayerNorm <epsilon> (x, residual, gamma, beta) => (y, sum) {
            sum = Add (x, residual)
            y = LayerNormalization <axis = -1, epsilon: float = @epsilon> (sum, gamma, beta)
        }""",
    BIAS_ADD_LAYER_NORM: """
        <domain: "sdc", opset_import: ["": 23]>
        BiasAddLayerNorm <epsilon> (x, bias, residual, gamma, beta) => (y, sum) {
            biased = Add (x, bias)
            sum = Add (biased, residual)
            y = LayerNormalization <axis = -1, epsilon: float = @epsilon> (sum, gamma, beta)
        }""",
    BIAS_GEGLU: """
        <domain: "sdc", opset_import: ["": 23]>
        BiasGeGlu <approximate> (x, bias) => (y) {
            biased = Add (x, bias)
            value, gate = Split <axis = -1, num_outputs = 2> (biased)
            active = Gelu <approximate: string = @approximate> (gate)
            y = Mul (value, active)
        }""",
    BIAS_ADD: """
        <domain: "sdc", opset_import: ["": 23]>
        BiasAdd (x, bias, residual) => (y) {
            biased = Add (x, bias)
            y = Add (biased, residual)
        }""",
    TOKENS_FROM_IMAGE: """
        <domain: "sdc", opset_import: ["": 23]>
        TokensFromImage <channels> (x) => (y) {
            width = Constant <value_int: int = @channels> ()
            batch = Constant <value_ints: ints = [0]> ()
            minus_one = Constant <value_ints: ints = [-1]> ()
            width_1d = Reshape (width, minus_one)
            shape = Concat <axis = 0> (batch, minus_one, width_1d)
            channels_last = Transpose <perm = [0, 2, 3, 1]> (x)
            y = Reshape (channels_last, shape)
        }""",
    IMAGE_FROM_TOKENS: """
        <domain: "sdc", opset_import: ["": 23]>
        ImageFromTokens (x, like) => (y) {
            batch = Constant <value_ints: ints = [0]> ()
            minus_one = Constant <value_ints: ints = [-1]> ()
            size = Shape <start = 2> (like)
            shape = Concat <axis = 0> (batch, size, minus_one)
            channels_last = Reshape (x, shape)
            y = Transpose <perm = [0, 3, 1, 2]> (channels_last)
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
