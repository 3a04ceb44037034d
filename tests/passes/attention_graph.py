"""Attention as exporters write it, for tests that change one thing in it."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from equality import make_model
from small_graphs import normal

from sdc.passes.raising.raise_attention import RaiseAttention
from sdc.passes.shapes.infer_shapes import InferShapes
from sdc.passes.simplify.cancel_no_ops import CancelNoOps
from sdc.passes.simplify.remove_unused import RemoveUnused

PASSES = (RaiseAttention(), RemoveUnused(), CancelNoOps(), InferShapes())


HEAD = """<ir_version: 10, opset_import: ["": 23]>
attention (float[B, 11, 10] x, float[B, 7, 9] context) => (float[B, 11, 10] y)
<int64[4] split = {0, 0, 3, 5}, int64[3] merge = {0, 0, 15}, float scale = {0.4472136}, float root = {0.66874030},
 float inverse = {2.2360680}, float other = {0.3}, float zero = {0}, float hidden = {-3e38}, float low = {-10000},
 int64[3] fold = {-1, 11, 5}, int64[3] fold_keys = {-1, 7, 5}, int64[4] unfold = {-1, 3, 11, 5},
 int64[4] unfold_keys = {-1, 3, 5, 7}>
"""


BODY = """{
    query = MatMul (x, wq)
    key = MatMul (context, wk)
    value = MatMul (context, wv)
    query4 = Reshape (query, split)
    key4 = Reshape (key, split)
    value4 = Reshape (value, split)
    q = Transpose <perm = [0, 2, 1, 3]> (query4)
    k = Transpose <perm = [0, 2, 3, 1]> (key4)
    v = Transpose <perm = [0, 2, 1, 3]> (value4)
    raw = MatMul (q, k)
    scores = Mul (raw, scale)
    probabilities = Softmax <axis = -1> (scores)
    attended = MatMul (probabilities, v)
    back = Transpose <perm = [0, 2, 1, 3]> (attended)
    merged = Reshape (back, merge)
    y = MatMul (merged, wo)
}"""


SCORES = "raw = MatMul (q, k)\n    scores = Mul (raw, scale)"


FEEDS = [{"x": 2 * normal(50, batch, 11, 10), "context": normal(51, batch, 7, 9)} for batch in (3, 1)]


def attention(body: str = BODY, head: str = HEAD, masks: dict[str, np.ndarray] | None = None) -> ir.Model:
    weights = {"wq": normal(1, 10, 15), "wk": normal(2, 9, 15), "wv": normal(3, 9, 15), "wo": normal(4, 15, 10)}
    text = head + body
    return make_model(text, {n: w for n, w in (weights | (masks or {})).items() if re.search(rf"\b{n}\b", text)})


def replaced(*pairs: tuple[str, str]) -> str:
    body = BODY
    for old, new in pairs:
        assert old in body
        body = body.replace(old, new)
    return body


def raised(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    return node


FOLDED = replaced(
    (
        "raw = MatMul (q, k)",
        "qf = Reshape (q, fold)\n kf = Reshape (kn, fold_keys)\n kt = Transpose <perm = [0, 2, 1]> (kf)\n"
        " vf = Reshape (v, fold_keys)\n raw = MatMul (qf, kt)",
    ),
    ("k = Transpose <perm = [0, 2, 3, 1]>", "kn = Transpose <perm = [0, 2, 1, 3]>"),
    (
        "attended = MatMul (probabilities, v)",
        "folded = MatMul (probabilities, vf)\n attended = Reshape (folded, unfold)",
    ),
)


"""As older attention processors write it: heads in the batch."""


def masked(scores: str) -> str:
    return replaced((SCORES, f"raw = MatMul (q, k)\n scaled = Mul (raw, scale)\n {scores}"))


VISIBLE = np.ones((11, 7), bool)


BLIND = VISIBLE & (np.arange(11) != 4)[:, None]


"""Hides all keys from one query."""


CAUSAL = np.tril(np.ones((11, 7), bool))
