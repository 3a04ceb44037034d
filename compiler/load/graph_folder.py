"""ONNX graphs in place of weights: folders as optimum exports them, a graph for each component."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdc.compiler.load.checkpoint import LABELS
from sdc.compiler.load.folder import read_json, read_model_index, read_tokenizer, trim_model_index, weight_candidates
from sdc.compiler.load.lora import Lora
from sdc.compiler.load.networks import check_agreement, network_of
from sdc.compiler.load.tensor_files import digest_files
from sdc.engines.errors import InputError
from sdc.engines.manifest import MANIFEST_NAME
from sdc.engines.specs import COMPONENTS

GRAPH_NAME = "model.onnx"
_CONFIG_FOLDERS = {"text_encoder": "text_encoder", "unet": "unet", "vae": "vae_decoder"}


@dataclass(frozen=True)
class GraphCheckpoint:
    """A pipeline whose networks are graphs already; beside them it is what a `Checkpoint` is.

    Attributes:
        graphs: path by component; external weights lie beside each.
        configs: content of each network's ``config.json``.
    """

    name: str
    source: str
    graphs: Mapping[str, Path]
    configs: Mapping[str, Mapping[str, Any]]
    tokenizer_files: Mapping[str, bytes]
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]

    @property
    def weights(self) -> str:
        """Nobody can tell how weights in a graph came about; it is said where they are from."""
        return "trained"

    @property
    def loras(self) -> tuple[Lora, ...]:
        """None: see `open_graphs`."""
        return ()

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of the network that a component comes from."""
        return dict(self.configs[network_of(component)])

    def digest(self, component: str) -> str:
        """SHA-256 over the component's graph, its weights and its configuration, by content."""
        config = {name: value for name, value in self.config(component).items() if name not in LABELS}
        files = digest_files(graph_files(self.graphs[component]))
        return hashlib.sha256(json.dumps({"config": config, "graph": files}, sort_keys=True).encode()).hexdigest()


def holds_graphs(folder: Path) -> bool:
    """Whether a folder is a bundle, or has a graph of the UNet and no weights for torch."""
    has_weights = any((folder / "unet" / name).is_file() for name in weight_candidates("unet"))
    return (folder / MANIFEST_NAME).is_file() or ((folder / "unet" / GRAPH_NAME).is_file() and not has_weights)


def open_graphs(folder: Path, *, name: str, has_loras: bool, random: bool) -> GraphCheckpoint:
    """Open a folder of graphs; they are read when they are exported.

    Raises:
        InputError: a part is missing or of a kind that is not supported; the folder is a bundle; or weights are asked
            for that graphs cannot take.
    """
    if (folder / MANIFEST_NAME).is_file():
        raise InputError(
            f"{folder} is a bundle: its graphs are fused and lowered for their target, and cannot be compiled again",
            hint="export from the model that it was made from; `sdc inspect` names it",
        )
    if has_loras:
        raise InputError(
            f"{folder} holds ONNX graphs, whose weights a LoRA cannot be matched to: exporters fold, transpose and "
            "rename them",
            hint="fold the LoRA in before the graphs are exported, or export from the weights themselves",
        )
    if random:
        raise InputError(
            f"{folder} holds ONNX graphs, which bring their weights along",
            hint="leave --weights random out, or give a folder of configurations in diffusers' layout",
        )
    index = read_model_index(folder)
    graphs = {component: folder / component / GRAPH_NAME for component in COMPONENTS}
    for path in graphs.values():
        if not path.is_file():
            raise InputError(f"{path} not found", hint="expected a whole export of optimum: optimum-cli export onnx")
    configs = {network: read_json(folder / part / "config.json") for network, part in _CONFIG_FOLDERS.items()}
    check_agreement(configs, origin=str(folder))
    return GraphCheckpoint(
        name=name,
        source=str(folder),
        graphs=graphs,
        configs=configs,
        tokenizer_files=read_tokenizer(folder / "tokenizer"),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        model_index=trim_model_index(index),
    )


def graph_files(path: Path) -> list[Path]:
    """The graph's file and those that its weights are in.

    Raises:
        InputError: it is no ONNX model, or weights are missing or lie outside its folder.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each have their own for a file that is none
        raise InputError(f"{path} is no ONNX model: {type(error).__name__}", hint="export it again") from error
    locations = {
        Path(value.const_value.location)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for location in sorted(locations):
        if location.is_absolute() or ".." in location.parts or not (path.parent / location).is_file():
            raise InputError(f"{path} has its weights in {location}, which is not beside it", hint="copy it there")
    return [path, *(path.parent / location for location in sorted(locations))]
