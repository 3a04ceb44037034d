"""Attention of the CPU kernels beside OpenVINO's own, on the shapes of Stable Diffusion 1.5 at 512 pixels.

    python scripts/bench_attention.py --threads 1

All are models of OpenVINO that differ in the attention alone: from bf16 query, key and value as projections leave
them, [B, S, heads * head_size], to a result like the query, so what splits and merges heads counts. OpenVINO's own and
the kernel in bf16, and the kernel in 8 bits, as it is used where a graph is quantised. Medians of calls in turn, in
milliseconds, ratios to OpenVINO; errors are relative, against float32, for logits of the standard deviation --spread.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
import openvino
from openvino import opset13 as operators

from sdc.compiler.compare.outputs import seconds_in_turn
from sdc.compiler.text_table import markdown_row
from sdc.engines.kernels.library import Kernels, find_kernels
from sdc.engines.sessions.openvino_attention import replace_attention
from sdc.engines.sessions.openvino_core import openvino_core
from sdc.engines.sessions.openvino_operators import Replacements

SHAPES = (
    (8, 4096, 4096, 40), (8, 4096, 77, 40), (8, 1024, 1024, 80), (8, 1024, 77, 80), (8, 256, 256, 160),
    (8, 256, 77, 160), (8, 64, 64, 160), (8, 64, 77, 160), (1, 4096, 4096, 512), (12, 77, 77, 64),
    (10, 4096, 4096, 64), (20, 1024, 1024, 64),
)  # fmt: skip
"""Heads, queries, keys, head size: the UNet's, the VAE's, the text encoder's (without its causal mask), SDXL's."""


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--spread", type=float, default=1.0)
    options = parser.parse_args()
    kernels = find_kernels()
    if isinstance(kernels, str):
        raise SystemExit(f"there are no CPU kernels here: {kernels}")
    columns = ("heads, queries, keys, head size", "OpenVINO", "bf16", "int8", "bf16 / OpenVINO", "int8 / OpenVINO")
    print(markdown_row(*columns, *(f"error: {side}" for side in columns[1:4])))
    print(markdown_row(*["---"] * 9))
    for shape in SHAPES:
        heads, queries, keys, size = shape
        generator = np.random.default_rng(0)
        lengths = (queries, keys, keys)
        feeds = [generator.standard_normal((options.batch, length, heads * size), np.float32) for length in lengths]
        feeds[0] *= options.spread
        sides = [
            request_of(shape, options.threads),
            *(request_of(shape, options.threads, kernels=kernels, eight_bits=bits) for bits in (False, True)),
        ]
        tensors = [bf16_tensor(feed) for feed in feeds]
        times = seconds_in_turn([partial(side.infer, tensors) for side in sides], rounds=options.rounds)
        exact = floats_of(request_of(shape, 0, precision="f32"), tensors)
        errors = [np.linalg.norm(floats_of(side, tensors) - exact) / np.linalg.norm(exact) for side in sides]
        ratios = np.median(times[:, 1:] / times[:, :1], axis=0)
        cells = [f"{each:.2f}" for each in (*(1000 * np.median(times, axis=0)), *ratios)]
        print(markdown_row(", ".join(map(str, shape)), *cells, *(f"{error:.4f}" for error in errors)), flush=True)


def request_of(
    shape: tuple[int, int, int, int],
    threads: int,
    *,
    kernels: Kernels | None = None,
    eight_bits: bool = False,
    precision: str = "bf16",
) -> openvino.InferRequest:
    """A compiled attention; 0 threads leave their number to OpenVINO."""
    heads, _, _, size = shape
    operands = [operators.parameter([-1, -1, heads * size], openvino.Type.bf16) for _ in range(3)]
    split = [
        operators.transpose(
            operators.reshape(operators.convert(operand, "f32"), np.array([0, 0, heads, size]), True), [0, 2, 1, 3]
        )
        for operand in operands
    ]
    attention = operators.scaled_dot_product_attention(*split)
    merged = operators.reshape(operators.transpose(attention, [0, 2, 1, 3]), np.array([0, 0, heads * size]), True)
    model = openvino.Model([operators.convert(merged, "bf16" if precision == "bf16" else "f32")], operands)
    for index, port in enumerate(model.inputs):
        port.get_tensor().set_names({f"operand {index}"})
    if kernels is not None:
        large = {f"operand {index}": (4, 4096, heads * size) for index in range(3)}
        replacements = Replacements()
        replace_attention(model, kernels, large, replacements)
        for operator in replacements.operators:
            operator.settings = replace(operator.settings, eight_bits=eight_bits)
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return openvino_core().compile_model(model, "CPU", settings).create_infer_request()


def bf16_tensor(values: np.ndarray) -> openvino.Tensor:
    """float32 → bf16, cut off."""
    bits = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return openvino.Tensor(bits, openvino.Shape(values.shape), openvino.Type.bf16)


def floats_of(request: openvino.InferRequest, tensors: list[openvino.Tensor]) -> np.ndarray:
    """Run, and take the result as float32."""
    request.infer(tensors)
    result = request.get_output_tensor(0)
    if result.element_type == openvino.Type.f32:
        return np.array(result.data)
    return (result.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    main()
