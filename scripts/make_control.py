"""Makes the known-bad control of evaluations: `tiny` with its UNet's weights rounded to 4 bits per tensor or channel.

    python scripts/make_control.py --out build/control/tiny
    sdc export --model build/control/tiny --precision fp32 --target cpu --out build/tiny-control
    sdc eval build/tiny-control --reference build/tiny-fp32

A metric that does not see this damage would not see a smaller one. The folder's last name stays "tiny", so that the
judge knows the pictures.
"""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn


def main() -> None:
    """Parse the command line and write a diffusers folder."""
    parser = argparse.ArgumentParser(description="make the known-bad control of evaluations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--per-channel", action="store_true", help="a scale for each output channel")
    arguments = parser.parse_args()
    layers = write_control(arguments.out, bits=arguments.bits, per_channel=arguments.per_channel)
    kind = "channel" if arguments.per_channel else "tensor"
    print(f"{arguments.out}: {layers} layers rounded to {arguments.bits} bits per {kind}")


def write_control(out: Path, *, bits: int, per_channel: bool = False) -> int:
    """Write the folder; returns how many layers were rounded."""
    with as_file(files("sdc.compiler") / "models" / "tiny") as folder:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    layers = [module for module in pipeline.unet.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(round_weight(layer.weight, bits, per_channel=per_channel))
    pipeline.save_pretrained(out)
    return len(layers)


def round_weight(weight: Tensor, bits: int, *, per_channel: bool) -> Tensor:
    """Symmetric rounding to the nearest of 2^bits - 1 levels, one scale for the tensor or each output channel."""
    largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) if per_channel else weight.abs().max()
    scale = largest / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


if __name__ == "__main__":
    main()
