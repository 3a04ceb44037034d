"""What a bundle holds beside its engines: tokenizer, schedule, and the configurations that other loaders ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdc.compiler.bundle.writer import json_bytes

_OF_THE_MACHINE = ("_name_or_path", "_use_default_values")
"""Entries of a configuration that say where it was read from."""

_NETWORK_OF = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}


def small_files(
    *,
    tokenizer_files: Mapping[str, bytes],
    scheduler_config: Mapping[str, Any],
    model_index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, bytes]:
    """The files by path; optimum's diffusion pipelines open a bundle by them, where its UNet is a classic one.

    Args:
        tokenizer_files: name to content.
        scheduler_config: content of ``scheduler_config.json``.
        model_index: content of ``model_index.json``.
        configs: of the three networks. optimum reads one beside every ``model.onnx``, and the autoencoder's twice.
    """
    written = {
        f"{component}/config.json": json_bytes(
            {name: value for name, value in configs[network].items() if name not in _OF_THE_MACHINE}
        )
        for component, network in _NETWORK_OF.items()
    }
    return {
        **{f"tokenizer/{name}": content for name, content in tokenizer_files.items()},
        **written,
        "scheduler/scheduler_config.json": json_bytes(scheduler_config),
        "model_index.json": json_bytes({name: value for name, value in model_index.items() if name != "_name_or_path"}),
    }
