"""ONNX Runtime's CUDA operators in NumPy, for graphs that no GPU runs here.

Written from the operators' documentation (ONNX Runtime, docs/ContribOperators.md), not from what sdc lowers to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

_erf = np.vectorize(math.erf, otypes=[np.float32])


class ContribRun(OpRun):
    op_domain = "com.microsoft"


def _normalise(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, *, groups: int, epsilon: float) -> np.ndarray:
    """Group normalisation of [N, H, W, C] with statistics in float32."""
    batch, height, width, channels = x.shape
    grouped = x.astype(np.float32).reshape(batch, height * width, groups, channels // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    return normed * gamma + beta


def _activate(x: np.ndarray, activation: int) -> np.ndarray:
    return x / (1 + np.exp(-x)) if activation == 1 else x


class GroupNorm(ContribRun):
    def _run(self, x, gamma, beta, activation=None, groups=None, epsilon=1e-5, channels_last=1):
        assert gamma.dtype == beta.dtype == np.float32
        assert channels_last == 1
        y = _activate(_normalise(x, gamma, beta, groups=groups, epsilon=epsilon), activation)
        return (y.astype(x.dtype),)


class SkipGroupNorm(ContribRun):
    def _run(self, x, gamma, beta, skip, bias=None, activation=None, groups=None, epsilon=1e-5, channels_last=1):
        assert gamma.dtype == beta.dtype == np.float32
        assert channels_last == 1
        allowed = (x.shape, (x.shape[0], 1, 1, x.shape[3]), (x.shape[0], x.shape[3]))
        assert skip.shape in allowed, skip.shape
        total = x + (skip[:, None, None, :] if skip.ndim == 2 else skip)
        total = total if bias is None else total + bias
        y = _activate(_normalise(total, gamma, beta, groups=groups, epsilon=epsilon), activation)
        return y.astype(x.dtype), total


class NhwcConv(ContribRun):
    def _run(
        self, x, w, b=None, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None, strides=None
    ):
        assert (group, auto_pad) in ((None, None), (1, "NOTSET"), (None, "NOTSET"), (1, None))
        assert tuple(dilations or (1, 1)) == (1, 1)
        assert kernel_shape is None or tuple(kernel_shape) == w.shape[1:3]
        top, left, bottom, right = pads or (0, 0, 0, 0)
        padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[1:3], axis=(1, 2))
        down, across = strides or (1, 1)
        windows = windows[:, ::down, ::across]
        y = np.einsum("nhwcij,mijc->nhwm", windows, w, optimize=True)
        return ((y if b is None else y + b).astype(x.dtype),)


class MultiHeadAttention(ContribRun):
    def _run(self, query, key, value, num_heads=None, scale=None, unidirectional=0, mask_filter_value=None):
        assert mask_filter_value is None  # there is no mask

        def split(x: np.ndarray) -> np.ndarray:
            return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3).astype(np.float32)

        q, k, v = map(split, (query, key, value))
        scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.swapaxes(2, 3)
        if unidirectional:
            scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        return (y.transpose(0, 2, 1, 3).reshape(query.shape).astype(query.dtype),)


class BiasSplitGelu(ContribRun):
    def _run(self, x, bias):
        value, gate = np.split(x + bias, 2, axis=-1)
        return ((value * gate * 0.5 * (1 + _erf(gate / np.sqrt(2)))).astype(x.dtype),)


class BiasAdd(ContribRun):
    def _run(self, x, bias, skip):
        assert x.shape == skip.shape
        return (x + bias + skip,)


class SkipLayerNormalization(ContribRun):
    def _run(self, x, skip, gamma, beta=None, bias=None, epsilon=1e-5):
        total = x + skip if bias is None else x + skip + bias
        wide = total.astype(np.float32)
        mean, variance = wide.mean(axis=-1, keepdims=True), wide.var(axis=-1, keepdims=True)
        y = (wide - mean) / np.sqrt(variance + epsilon) * gamma + beta
        unused = np.zeros(0, np.float32)
        return y.astype(x.dtype), unused, unused, total


class QuickGelu(ContribRun):
    def _run(self, x, alpha=1.702):
        return ((x / (1 + np.exp(-alpha * x))).astype(x.dtype),)


OPERATORS = (
    *(GroupNorm, SkipGroupNorm, NhwcConv, MultiHeadAttention),
    *(BiasSplitGelu, BiasAdd, SkipLayerNormalization, QuickGelu),
)


def run_reference(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of a graph for the CUDA provider, computed by ONNX's reference and the operators above.

    Feeds are rounded to the types of the inputs, which the session does too.
    """
    proto = ir.to_proto(model)
    evaluator = ReferenceEvaluator(proto, new_ops=list(OPERATORS))
    types = {value.name: value.dtype.numpy() for value in model.graph.inputs}
    typed = {name: array.astype(types[name]) for name, array in feeds.items()}
    return dict(zip([output.name for output in proto.graph.output], evaluator.run(None, typed), strict=True))


def check_schemas(model: ir.Model) -> int:
    """Hold every contributed node against ONNX Runtime's own schema; the number of nodes."""
    schemas = {schema.name: schema for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}
    nodes = [node for node in model.graph if node.domain == "com.microsoft"]
    for node in nodes:
        schema = schemas[node.op_type]
        assert schema.min_input <= len(node.inputs) <= schema.max_input, node
        assert schema.min_output <= len(node.outputs) <= schema.max_output, node
        _check_attributes(node, schema)
        types: dict[str, ir.DataType] = {}
        named_outputs = [value if value.name else None for value in node.outputs]
        for values, parameters in ((node.inputs, schema.inputs), (named_outputs, schema.outputs)):
            for value, parameter in zip(values, parameters, strict=False):
                if value is None:
                    assert "Optional" in str(parameter.option), (node, parameter.name)
                    continue
                assert value.dtype is not None, value
                assert f"tensor({_TYPES[value.dtype]})" in parameter.types, (node, parameter.name)
                assert types.setdefault(parameter.typeStr, value.dtype) == value.dtype, (node, parameter.name)
    return len(nodes)


_TYPES = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16"}


def _check_attributes(node: ir.Node, schema) -> None:
    for name, attribute in node.attributes.items():
        assert name in schema.attributes, (node, name)
        assert str(schema.attributes[name].type).split(".")[-1] == attribute.type.name, (node, name)
    missing = [name for name, each in schema.attributes.items() if each.required and name not in node.attributes]
    assert not missing, (node, missing)


def is_valid_standard(model: ir.Model) -> bool:
    """Whether ONNX's checker takes the graph; contributed operators are checked by `check_schemas`."""
    onnx.checker.check_model(ir.to_proto(model))
    return True
