"""The fastest that torch multiplies large matrices, in fp32, bf16 and int8: what a network's time is compared with.

Components are "gemm-fp32", "gemm-bf16" and "gemm-int8"; torch calls MKL or oneDNN for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from peers.protocol import Job, Measured, Work, main

SIZE = 4096


def open_work(job: Job) -> Work:
    """Products of two square matrices."""
    torch.set_num_threads(job.threads)
    multiply = product(job.component)

    def work(calls: int, steps: int) -> Measured:
        del steps
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - begin)
        return Measured(seconds, extra={"flops": 2 * SIZE**3})

    return work


def product(component: str) -> Callable[[], Any]:
    """One product, of random operands."""
    torch.manual_seed(0)
    if component == "gemm-int8":
        left, right = (torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(left, right)
    dtype = {"gemm-fp32": torch.float32, "gemm-bf16": torch.bfloat16}[component]
    left, right = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    return lambda: torch.mm(left, right)


if __name__ == "__main__":
    main(open_work, lambda _: None)
