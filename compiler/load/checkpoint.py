"""A checkpoint: what a pipeline of Stable Diffusion consists of before it is compiled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdc.compiler.load.lora import Lora
from sdc.compiler.load.networks import check_agreement, fill, make_empty, network_of
from sdc.engines.errors import InputError

Weights = Literal["trained", "random"]


class WeightSource(Protocol):
    """Where the weights of a network come from."""

    @property
    def origin(self) -> str:
        """What an error says: a path, a seed."""

    def check(self, network: str, module: nn.Module) -> None:
        """Raise InputError unless the weights fit; reads names and shapes only."""

    def read(self, network: str, module: nn.Module) -> dict[str, Tensor]:
        """The weights under the module's own names, in the precision that they are stored in."""

    def fingerprint(self) -> str:
        """Equal for equal weights; loads none of them."""


@dataclass(frozen=True)
class NetworkSource:
    """One network: its configuration (content of ``config.json``) and its weights."""

    config: Mapping[str, Any]
    weights: WeightSource


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the compiler takes in; the networks are loaded when they are asked for, each time anew.

    Attributes:
        name: what the user called it: "tiny", "sd15", a hub id, the name of a folder or file.
        source: where it is from, for a manifest: hub id and revision, folder, or file.
        weights: "trained" or "random".
        networks: ``text_encoder``, ``unet`` and ``vae``.
        tokenizer_files: name to content; ``tokenizer.json`` is always among them.
        scheduler_config: content of ``scheduler_config.json``.
        model_index: content of ``model_index.json``, without the parts that sdc does not compile.
        loras: folded into the weights of every network that is loaded.
    """

    name: str
    source: str
    weights: Weights
    networks: Mapping[str, NetworkSource]
    tokenizer_files: Mapping[str, bytes]
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]
    loras: tuple[Lora, ...] = ()

    def text_encoder(self) -> CLIPTextModel:
        """A fresh text encoder: float32, inference mode, LoRAs folded in."""
        module = self._load("text_encoder")
        assert isinstance(module, CLIPTextModel)
        return module

    def unet(self) -> UNet2DConditionModel:
        """A fresh UNet: float32, inference mode, LoRAs folded in."""
        module = self._load("unet")
        assert isinstance(module, UNet2DConditionModel)
        return module

    def vae(self) -> AutoencoderKL:
        """A fresh autoencoder: float32, inference mode."""
        module = self._load("vae")
        assert isinstance(module, AutoencoderKL)
        return module

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of the network that a component comes from."""
        return dict(self._network(network_of(component)).config)

    def digest(self, component: str) -> str:
        """SHA-256 over all that determines a component's weights and configuration; loads no weights.

        Files are digested by content, so the same weights in another place give the same digest.
        """
        network = network_of(component)
        source = self._network(network)
        parts = {
            "config": {name: value for name, value in source.config.items() if name not in LABELS},
            "weights": source.weights.fingerprint(),
            "loras": [[lora.sha256, lora.scale] for lora in self.loras if lora.updates.get(network)],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Raise if the weights of a network do not fit its configuration; reads names and shapes only.

        Raises:
            InputError: names the first weight that is missing, left over, or of another shape.
        """
        for name, source in self.networks.items():
            source.weights.check(name, make_empty(name, source.config, origin=self.source))
        check_agreement({name: source.config for name, source in self.networks.items()}, origin=self.source)

    def _network(self, name: str) -> NetworkSource:
        if name not in self.networks:
            raise InputError(f"checkpoint {self.source} has no {name}", hint=f"it has {', '.join(self.networks)}")
        return self.networks[name]

    def _load(self, name: str) -> nn.Module:
        source = self._network(name)
        module = make_empty(name, source.config, origin=self.source)
        fill(module, source.weights.read(name, module), origin=source.weights.origin)
        for lora in self.loras:
            lora.fold(name, module)
        return module


LABELS = ("_diffusers_version", "_name_or_path", "transformers_version")
"""Entries of a configuration that say who wrote it and change nothing."""
