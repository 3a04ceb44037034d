"""The work of a UNet's engine for the target cpu."""

from __future__ import annotations

import math
from pathlib import Path

from sdc.engines.bundle import open_bundle
from sdc.engines.sessions.openvino_core import openvino_core

UNET, TARGET = "unet", "cpu"


def count_macs(folder: Path, sizes: dict[str, int]) -> tuple[int, int]:
    """Multiply-adds with weights, and those of attention, in the UNet's graph at given sizes."""
    bundle = open_bundle(folder, verify=False)
    model = openvino_core().read_model(folder / bundle.manifest.targets[TARGET].engines[UNET].files[0])
    spec = bundle.manifest.components[UNET]
    model.reshape(
        {
            tensor.name: [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
            for tensor in spec.inputs
        }
    )
    weights = attention = 0
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "ScaledDotProductAttention":
            query, key = (list(node.input(index).get_shape()) for index in (0, 1))
            attention += (math.prod(query) + math.prod(node.output(0).get_shape())) * key[-2]
        elif kind == "Convolution":
            weights += math.prod(node.output(0).get_shape()) * math.prod(list(node.input(1).get_shape())[1:])
        elif kind == "MatMul":
            transposed = node.get_attributes()["transpose_a"]
            weights += math.prod(node.output(0).get_shape()) * list(node.input(0).get_shape())[-2 if transposed else -1]
    return weights, attention
