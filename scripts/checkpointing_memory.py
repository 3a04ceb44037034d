"""Measures gradient checkpointing: memory and time of one training step of a UNet with it and without.

    python scripts/checkpointing_memory.py --model tiny --batch 64
    python scripts/checkpointing_memory.py --model sd15 --size 32

Each side runs in a process of its own. "Activations" is how much that process grows at most during a step, when weights
and gradients are there already. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from dataclasses import dataclass

from sdc.compiler.text_table import format_table
from sdc.compiler.workshop.worker import Worker


@dataclass(frozen=True)
class Case:
    """One side of the measurement: `size` is that of the latents, None for the model's own."""

    model: str
    batch: int
    size: int | None
    steps: int
    checkpointing: bool


@dataclass(frozen=True)
class Figures:
    """What a case took: bytes of weights and gradients, growth of the process in a step, a step's time; medians."""

    fixed_bytes: int
    activation_bytes: int
    seconds: float
    loss: float


def main() -> None:
    """Parse the command line, measure both sides and print a table."""
    parser = argparse.ArgumentParser(description="measure gradient checkpointing")
    parser.add_argument("--model", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="of the latents (the model's own)")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for checkpointing in (False, True):
        case = Case(arguments.model, arguments.batch, arguments.size, arguments.steps, checkpointing)
        with Worker(log_path=None) as worker:
            figures: Figures = worker.call(measure, case).value
        rows.append(
            [
                "with" if checkpointing else "without",
                f"{figures.fixed_bytes / 1e9:.2f}",
                f"{figures.activation_bytes / 1e9:.3f}",
                f"{figures.seconds:.2f}",
                f"{figures.loss:.6f}",
            ]
        )
    print(format_table(["checkpointing", "weights and gradients, GB", "activations, GB", "step, s", "loss"], rows))


def measure(case: Case) -> Figures:
    """Run training steps; the first one makes the gradients and is not measured."""
    import psutil
    import torch

    from sdc.compiler.load import load_checkpoint
    from sdc.compiler.workshop.memory import PeakMemory

    checkpoint = load_checkpoint(case.model, weights="random" if case.model == "sd15" else "trained")
    unet = checkpoint.unet().train().requires_grad_(True)
    if case.checkpointing:
        unet.enable_gradient_checkpointing()
    torch.manual_seed(7)
    size = case.size or unet.config.sample_size
    sample = torch.randn(case.batch, unet.config.in_channels, size, size)
    states = torch.randn(case.batch, 77, unet.config.cross_attention_dim)

    def step() -> float:
        unet.zero_grad(set_to_none=False)
        loss = unet(sample, 501, states).sample.square().mean()
        loss.backward()
        return loss.item()

    loss = step()
    seconds, grown = [], []
    for _ in range(case.steps):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what earlier steps have freed
        before = psutil.Process().memory_info().rss
        begin = time.perf_counter()
        with PeakMemory() as memory:
            step()
        seconds.append(time.perf_counter() - begin)
        grown.append(memory.peak_bytes - before)
    fixed = sum(parameter.numel() * parameter.element_size() * 2 for parameter in unet.parameters())
    return Figures(fixed, int(statistics.median(grown)), statistics.median(seconds), loss)


if __name__ == "__main__":
    main()
