"""diffusers' own modules in torch: eager, or through `torch.compile`; channels-last.

Options: "dtype" is "float32" or "bfloat16"; "compile" is true for inductor with frozen weights.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peers.pictures import work_from_networks
from peers.protocol import COMPONENTS, PICTURE, Feeds, Job, Measured, Run, Work, made_folder, main

FOLDERS = {"unet": "unet", "vae_decoder": "vae", "text_encoder": "text_encoder"}


class Network(nn.Module):
    """A component that takes tensors in order and returns one."""

    def __init__(self, network: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output."""
        return self.call(self.network, *inputs)


def prepare(job: Job) -> None:
    """Weights in the precision of the side, so that loading them takes no more than they do."""
    if job.options["dtype"] != "float32":
        made_folder(job, job.options["dtype"], lambda folder: save_rounded(job, folder))


def save_rounded(job: Job, folder: Path) -> None:
    """All components, rounded."""
    for component in COMPONENTS:
        pretrained(component, Path(job.checkpoint), job.options["dtype"]).save_pretrained(folder / FOLDERS[component])
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(Path(job.checkpoint) / name, folder / name)


def pretrained(component: str, folder: Path, dtype: str) -> nn.Module:
    """diffusers' or transformers' class, loaded."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes = {"unet": UNet2DConditionModel, "vae_decoder": AutoencoderKL, "text_encoder": CLIPTextModel}
    named = {"dtype" if component == "text_encoder" else "torch_dtype": getattr(torch, dtype)}
    return classes[component].from_pretrained(folder / FOLDERS[component], **named)


def load(job: Job, component: str) -> Run:
    """A network of the side."""
    torch.set_num_threads(job.threads)
    dtype = job.options["dtype"]
    folder = Path(job.checkpoint) if dtype == "float32" else Path(job.made) / dtype
    module = pretrained(component, folder, dtype)
    if component == "vae_decoder":
        del module.encoder, module.quant_conv
    call = decode if component == "vae_decoder" else first_output
    network = Network(module.to(memory_format=torch.channels_last), call).eval()
    if job.options.get("compile"):
        from torch._inductor import config

        config.freezing = True
        network.compile(dynamic=False)

    def run(feeds: Feeds) -> Any:
        with torch.no_grad():
            return network(*tensors_of(feeds, getattr(torch, dtype))).float().numpy()

    return run


def first_output(network: nn.Module, *inputs: Tensor) -> Tensor:
    """Of a UNet or a text encoder."""
    return network(*inputs, return_dict=False)[0]


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents to pixels."""
    return vae.decoder(vae.post_quant_conv(latents))


def tensors_of(feeds: Feeds, dtype: torch.dtype) -> list[Tensor]:
    """In the network's own type, but for tokens and the timestep; images are channels-last."""
    tensors = [torch.from_numpy(array) for array in feeds.values()]
    formats = [torch.channels_last if tensor.ndim == 4 else torch.preserve_format for tensor in tensors]
    return [
        tensor if tensor.ndim == 1 or not tensor.is_floating_point() else tensor.to(dtype, memory_format=format_)
        for tensor, format_ in zip(tensors, formats, strict=True)
    ]


def open_work(job: Job) -> Work:
    """Networks and pictures; the first call in float32 counts the operations, too, when it is asked for."""
    work = work_from_networks(job, load)
    if not job.options.get("count_flops") or job.component == PICTURE:
        return work

    def counting(calls: int, steps: int) -> Measured:
        from torch.utils.flop_counter import FlopCounterMode

        begin = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            measured = work(calls, steps)
        return Measured([time.perf_counter() - begin], measured.result, extra={"flops": counter.get_total_flops()})

    return counting


if __name__ == "__main__":
    main(open_work, prepare)
