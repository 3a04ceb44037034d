"""Cut-outs of SD's networks of a few nodes each, with odd and distinct sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from equality import make_model

RESNET = """
<ir_version: 10, opset_import: ["": 23]>
resnet (float[B, 6, H, W] x, float[B, 6] time) => (float[B, 6, H, W] y)
<int64[2] planes = {2, 3}, float[B, 6, H, W] first, float[B, 6, H, W] second, float[B, 6, H, W] third>
{
    first = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    shift = Unsqueeze (time, planes)
    shifted = Add (first, shift)
    normed1 = GroupNormalization <num_groups = 3, epsilon = 1e-3> (shifted, gamma1, beta1)
    gate1 = Sigmoid (normed1)
    silu1 = Mul (normed1, gate1)
    second = Conv <pads = [1, 1, 1, 1]> (silu1, w2, b2)
    skip = Add (x, second)
    normed2 = GroupNormalization <num_groups = 2, epsilon = 1e-3> (skip, gamma2, beta2)
    gate2 = Sigmoid (normed2)
    silu2 = Mul (gate2, normed2)
    third = Conv <pads = [1, 1, 1, 1]> (silu2, w3, b3)
    y = Add (skip, third)
}
"""
"""All three chain forms' heart: time embedding behind a Conv, then a skip connection that is read twice."""

ATTENTION = """
<ir_version: 10, opset_import: ["": 23]>
attention (float[B, S, 10] x, float[B, 7, 9] context) => (float[B, S, 10] y)
<int64[1] heads = {3}, int64[1] size = {5}, int64[1] rest = {-1}, int64[1] width = {15}, int64[4] split = {0, 0, 3, 5},
 int64[3] merge = {0, 0, 15}>
{
    query = MatMul (x, wq)
    key = MatMul (context, wk)
    value = MatMul (context, wv)
    query4 = Reshape (query, split)
    key4 = Reshape (key, split)
    value4 = Reshape (value, split)
    q = Transpose <perm = [0, 2, 1, 3]> (query4)
    k = Transpose <perm = [0, 2, 1, 3]> (key4)
    v = Transpose <perm = [0, 2, 1, 3]> (value4)
    attended = Attention (q, k, v)
    back = Transpose <perm = [0, 2, 1, 3]> (attended)
    merged = Reshape (back, merge)
    y = MatMul (merged, wo)
}
"""
"""Cross-attention with 3 heads of 5 over 7 tokens."""


def normal(seed: int, *shape: int) -> np.ndarray:
    """Seeded normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def make_resnet(text: str = RESNET) -> ir.Model:
    """`RESNET`, or a variation of it."""
    weights = {f"w{n}": normal(n, 6, 6, 3, 3) / 5 for n in (1, 2, 3)}
    # Small biases: small inputs then have a variance below epsilon.
    weights |= {f"b{n}": normal(n + 9, 6) / 100 for n in (1, 2, 3)}
    weights |= {f"gamma{n}": normal(n + 20, 6) for n in (1, 2)} | {f"beta{n}": normal(n + 30, 6) for n in (1, 2)}
    return make_model(text, {name: value for name, value in weights.items() if re.search(rf"\b{name}\b", text)})


def feed_resnet(*, batch: int = 3, height: int = 5, width: int = 7, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Inputs of `RESNET`."""
    return {"x": scale * normal(40, batch, 6, height, width), "time": scale * normal(41, batch, 6)}


def make_attention(text: str = ATTENTION, more: Mapping[str, np.ndarray] | None = None) -> ir.Model:
    """`ATTENTION`, or a variation of it with `more` initialisers."""
    weights = {"wq": normal(1, 10, 15), "wk": normal(2, 9, 15), "wv": normal(3, 9, 15), "wo": normal(4, 15, 10)}
    weights |= more or {}
    return make_model(text, {name: value for name, value in weights.items() if re.search(rf"\b{name}\b", text)})


def feed_attention(*, batch: int = 3, tokens: int = 11) -> dict[str, np.ndarray]:
    """Inputs of `ATTENTION`."""
    return {"x": normal(50, batch, tokens, 10), "context": normal(51, batch, 7, 9)}
