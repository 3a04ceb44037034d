"""A transformer block between two residual blocks, of a few nodes, with odd and distinct sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from equality import make_model
from small_graphs import normal

TRANSFORMER = """
<ir_version: 10, opset_import: ["": 23]>
transformer (float[B, 6, H, W] x, float[B, 6, H, W] before) => (float[B, 6, H, W] y)
<int64[3] to_tokens = {0, -1, 10}, int64[1] keep = {0}, int64[1] rest = {-1}, float[B, 10, H, W] image,
 float[B, H, W, 10] rows, float[B, S, 10] tokens, float[B, S, 10] sum3, float[B, H, W, 10] rows2,
 float[B, 10, H, W] image2>
{
    skip = Add (before, x)
    normed0 = GroupNormalization <num_groups = 3, epsilon = 1e-3> (skip, gamma0, beta0)
    image = Conv (normed0, w_in, b_in)
    rows = Transpose <perm = [0, 2, 3, 1]> (image)
    tokens = Reshape (rows, to_tokens)
    product1 = MatMul (tokens, w1)
    biased1 = Add (product1, b1)
    sum1 = Add (biased1, tokens)
    normed1 = LayerNormalization <axis = -1, epsilon = 1e-3> (sum1, gamma1, beta1)
    product2 = MatMul (normed1, w2)
    biased2 = Add (product2, b2)
    value, gate = Split <axis = -1, num_outputs = 2> (biased2)
    active = Gelu (gate)
    gated = Mul (value, active)
    product3 = MatMul (gated, w3)
    biased3 = Add (product3, b3)
    sum3 = Add (sum1, biased3)
    plane = Shape <start = 2> (image)
    size = Concat <axis = 0> (keep, plane, rest)
    rows2 = Reshape (sum3, size)
    image2 = Transpose <perm = [0, 3, 1, 2]> (rows2)
    out = Conv (image2, w_out, b_out)
    y = Add (out, skip)
}
"""

WEIGHTS = {
    "gamma0": (6,),
    "beta0": (6,),
    "w_in": (10, 6, 1, 1),
    "b_in": (10,),
    "w1": (10, 10),
    "b1": (10,),
    "gamma1": (10,),
    "beta1": (10,),
    "w2": (10, 14),
    "b2": (14,),
    "w3": (7, 10),
    "b3": (10,),
    "w_out": (6, 10, 1, 1),
    "b_out": (6,),
}


def make_transformer(text: str = TRANSFORMER, more: Mapping[str, np.ndarray] | None = None) -> ir.Model:
    """`TRANSFORMER`, or a variation of it with `more` initialisers."""
    weights = {name: normal(seed, *shape) / 2 for seed, (name, shape) in enumerate(WEIGHTS.items())}
    weights |= more or {}
    return make_model(text, {name: value for name, value in weights.items() if re.search(rf"\b{name}\b", text)})


def feed_transformer(*, batch: int = 3, height: int = 5, width: int = 7, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Inputs of `TRANSFORMER`; small ones have a variance below the GroupNorm's epsilon."""
    return {name: scale * normal(seed, batch, 6, height, width) for seed, name in ((60, "x"), (61, "before"))}


FEEDS = [feed_transformer(), feed_transformer(batch=1, height=8, width=3), feed_transformer(scale=0.01)]
