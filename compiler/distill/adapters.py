"""One UNet in three roles: plain it is the teacher, with one LoRA the student, with that LoRA's average the target."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn

from sdc.compiler.distill.consistency import Predict, Roles
from sdc.compiler.lora_argument import DISTILLED
from sdc.engines.errors import InputError

STUDENT, TARGET = "student", "target"

LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Ends of the names of the layers that get a LoRA: all of a UNet's but the first, the last and the time embedding.

Source: LCM-LoRA's list, in ``train_lcm_distill_lora_sd_wds.py`` of diffusers.
"""


class LoraRoles:
    """A frozen UNet with two LoRAs, which begin as no change.

    Args:
        unet: gets the LoRAs; its own weights are never changed.
        rank: of every update; alpha is the same, so that the factor is 1 and need not be stored.
        seed: of the first weights.
    """

    def __init__(self, unet: UNet2DConditionModel, *, rank: int, seed: int) -> None:
        self.unet = unet.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS))
        torch.manual_seed(seed)
        for name in (STUDENT, TARGET):
            unet.add_adapter(config, adapter_name=name)
        self.student = self._tensors(STUDENT)
        self.target = self._tensors(TARGET)
        self._copy_to_target()

    def _tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by name, sorted."""
        part = f".{adapter}."
        found = {name.replace(part, "."): each for name, each in self.unet.named_parameters() if part in name}
        return dict(sorted(found.items()))

    def roles(self) -> Roles:
        """The UNet as the three networks of the loss."""
        return Roles(self._role(None), self._role(TARGET), self._role(STUDENT))

    def _role(self, adapter: str | None) -> Predict:
        def predict(sample: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
            self.take(adapter)
            prediction: Tensor = self.unet(sample, timesteps, states, return_dict=False)[0]
            return prediction

        return predict

    def take(self, adapter: str | None) -> None:
        """Make the UNet play one role; None is the teacher's."""
        if adapter is None:
            self.unet.disable_adapters()
            return
        self.unet.enable_adapters()
        self.unet.set_adapter(adapter)
        for parameter in self.target.values():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the target towards the student: decay · target + (1 - decay) · student."""
        torch._foreach_lerp_(list(self.target.values()), list(self.student.values()), 1 - decay)

    @torch.no_grad()
    def _copy_to_target(self) -> None:
        for name, parameter in self.target.items():
            parameter.copy_(self.student[name])

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Both LoRAs, on the CPU."""
        return {
            role: {name: each.detach().cpu().clone() for name, each in tensors.items()}
            for role, tensors in ((STUDENT, self.student), (TARGET, self.target))
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take what `state` returned."""
        for role, tensors in ((STUDENT, self.student), (TARGET, self.target)):
            for name, parameter in tensors.items():
                parameter.copy_(state[role][name])

    def trained_share(self) -> float:
        """The student's parameters as a share of the UNet's own."""
        trained = sum(each.numel() for each in self.student.values())
        both = {id(each) for tensors in (self.student, self.target) for each in tensors.values()}
        own = sum(each.numel() for each in self.unet.parameters() if id(each) not in both)
        return float(trained / own)

    def save(self, path: Path, *, metadata: dict[str, Any]) -> None:
        """Write the target as diffusers writes a UNet's LoRA, in float16; the file appears whole or not at all.

        Its metadata have one key alone, as the order of several differs from process to process.

        Raises:
            InputError: the file cannot be written.
        """
        layers = get_peft_model_state_dict(self.unet, adapter_name=TARGET)
        tensors = {f"unet.{name}": each.detach().cpu().half().contiguous() for name, each in sorted(layers.items())}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        try:
            try:
                unfinished.write_bytes(save(tensors, metadata={DISTILLED: json.dumps(metadata)}))
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
