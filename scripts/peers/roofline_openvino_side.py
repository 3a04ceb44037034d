"""The fastest that OpenVINO multiplies large matrices, in fp32, bf16 and int8: what a network's time is compared with.

Components are "gemm-fp32", "gemm-bf16" and "gemm-int8". The right operand is constant, as a network's weights are. int8
is a product between FakeQuantize nodes, which OpenVINO runs in integers and ends in float.
"""

from __future__ import annotations

import time

import numpy as np
import openvino
from openvino import opset13 as operators

from peers.protocol import Job, Measured, Work, main

SIZE = 4096


def open_work(job: Job) -> Work:
    """Products of two square matrices."""
    generator = np.random.default_rng(0)
    operand = operators.parameter([SIZE, SIZE], np.float32)
    weight = generator.standard_normal((SIZE, SIZE), np.float32)
    if job.component == "gemm-int8":
        steps = np.clip(np.round(weight * 30), -127, 127).astype(np.int8)
        right = operators.multiply(operators.convert(operators.constant(steps), "f32"), np.float32(1 / 30))
        left = operators.fake_quantize(operand, *(np.float32(value) for value in (-4, 3.96875, -4, 3.96875)), 256)
    else:
        left, right = operand, operators.constant(weight)
    product = operators.matmul(left, right, False, True)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": "f32" if job.component == "gemm-fp32" else "bf16",
    }
    request = (
        openvino.Core().compile_model(openvino.Model([product], [operand]), "CPU", settings).create_infer_request()
    )
    fed = openvino.Tensor(generator.standard_normal((SIZE, SIZE), np.float32))

    def work(calls: int, steps: int) -> Measured:
        del steps
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            request.infer([fed], share_inputs=True, share_outputs=True)
            seconds.append(time.perf_counter() - begin)
        return Measured(seconds, extra={"flops": 2 * SIZE**3})

    return work


if __name__ == "__main__":
    main(open_work, lambda _: None)
