"""A pipeline's graphs in the layout, and with the interface, of optimum's export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from sdc.compiler.load import load_checkpoint
from sdc.compiler.trace.check import example_feeds
from sdc.compiler.trace.exporters import Exporter, export_with
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.trace.traceable import traceable_module
from sdc.engines.specs import COMPONENTS

SIZES = {"B": 2, "H": 8, "W": 12, "H_px": 32, "W_px": 48}


def save_as_optimum(pipeline: Path, folder: Path, exporter: Exporter | None = None) -> Path:
    """Write the graphs of a diffusers folder: a timestep without a dimension, text of any length, `model.onnx`."""
    exporter = exporter or Exporter("torchscript", 17)
    checkpoint = load_checkpoint(str(pipeline))
    configs = {network: checkpoint.config(network) for network in ("text_encoder", "unet", "vae")}
    for component in COMPONENTS:
        spec = component_spec(component, configs)
        feeds = example_feeds(spec, SIZES, vocabulary=49408)
        inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
        if "timestep" in inputs:
            inputs["timestep"] = inputs["timestep"][0]
        free = {
            tensor.name: {axis: f"free_{size}" for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
            for tensor in spec.inputs
        }
        (folder / component).mkdir(parents=True)
        outputs = [tensor.name for tensor in spec.outputs]
        module = traceable_module(checkpoint, component)
        export_with(exporter, module, inputs, outputs, folder / component / "model.onnx", free=free)
        config = configs["vae" if component.startswith("vae") else component]
        (folder / component / "config.json").write_text(json.dumps(config))
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(pipeline / part, folder / part)
    shutil.copyfile(pipeline / "model_index.json", folder / "model_index.json")
    return folder
