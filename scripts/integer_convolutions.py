"""One 3x3 convolution on ONNX Runtime's CPU kernels, in the ways in which int8 could run it.

    python scripts/integer_convolutions.py --threads 1

Columns: float32; operands dequantised, as the graph of `insert-qdq` says; the same after `lower-quantised-conv`; and
with a result of 8 bits, which ONNX Runtime makes a QLinearConv. Medians of calls in turn, in milliseconds.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from sdc.compiler.compare.outputs import seconds_in_turn
from sdc.compiler.text_table import markdown_row
from sdc.passes.base import run_passes
from sdc.passes.lowering.lower_quantised_conv import LowerQuantisedConv
from sdc.passes.shapes.infer_shapes import InferShapes

SIZES = ((64, 16), (128, 8), (320, 64), (640, 32), (1280, 16), (1280, 8))
"""Channels, and height and width of the image; those of `tiny` and of SD 1.5 at 512 pixels."""

FLOATING = "y = Conv <pads = [1, 1, 1, 1]> (x, f, b)"
QUANTISED = """q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero)
    v = DequantizeLinear <axis = 0> (w, t) y = Conv <pads = [1, 1, 1, 1]> (d, v, b)"""
BYTES = """q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero)
    v = DequantizeLinear <axis = 0> (w, t) c = DequantizeLinear <axis = 0> (i, u)
    a = Conv <pads = [1, 1, 1, 1]> (d, v, c)
    r = QuantizeLinear (a, step, middle) y = DequantizeLinear (r, step, middle)"""
FORMS = {
    "float32": (FLOATING, ()),
    "dequantised": (QUANTISED, ()),
    "lower-quantised-conv": (QUANTISED, (LowerQuantisedConv(),)),
    "result of 8 bits": (BYTES, ()),
}


def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(markdown_row("channels, size", *FORMS), markdown_row(*["---"] * (1 + len(FORMS))), sep="\n")
    for channels, size in SIZES:
        x = np.random.default_rng(0).standard_normal((options.batch, channels, size, size), np.float32)
        sessions = [open_form(name, channels, options.threads) for name in FORMS]
        calls = [partial(session.run, None, {"x": x}) for session in sessions]
        medians = 1000 * np.median(seconds_in_turn(calls, rounds=options.rounds), axis=0)
        print(markdown_row(f"{channels}, {size}x{size}", *(f"{each:.3f}" for each in medians)), flush=True)


def open_form(name: str, channels: int, threads: int) -> onnxruntime.InferenceSession:
    """A session of one convolution."""
    text, passes = FORMS[name]
    random = np.random.default_rng(1)
    step = np.full(channels, 3e-3, np.float32)
    weights = {
        "f": random.standard_normal((channels, channels, 3, 3), np.float32),
        "b": random.standard_normal(channels, np.float32),
        "w": random.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int8),
        "t": step,
        "i": random.integers(-9999, 9999, channels).astype(np.int32),
        "u": np.float32(0.02) * step,
    }
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 23]> g (float[B, {channels}, H, W] x) => (float[B, {channels}, H, W] y)
        <float scale = {{0.02}}, uint8 zero = {{101}}, float step = {{0.05}}, uint8 middle = {{128}}> {{ {text} }}"""
    )
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(weights[key], key) for key in weights if key in read)
    model = ir.serde.deserialize_model(proto)
    run_passes((InferShapes(), *passes), model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
