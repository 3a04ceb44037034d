"""Graphs whose weights are patched with LoRAs are, to the byte, those that are traced with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from minimal_pipeline import save_minimal_pipeline
from safetensors.torch import save_file

from sdc.compiler.load import Checkpoint, LoraSource, load_checkpoint
from sdc.compiler.stages import Source, open_source
from sdc.compiler.trace.export import export_component
from sdc.compiler.trace.patch import patch_component


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_minimal_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraSource:
    """One that changes every layer of the UNet and the text encoder."""
    checkpoint = load_checkpoint(str(model))
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for network, module in (("unet", checkpoint.unet()), ("text_encoder", checkpoint.text_encoder())):
        for name, part in module.named_modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
                outputs, *inputs = part.weight.shape
                tensors[f"{network}.{name}.lora_A.weight"] = torch.randn(2, *inputs, generator=generator)
                up = torch.randn(outputs, 2, *(1,) * len(inputs[1:]), generator=generator)
                tensors[f"{network}.{name}.lora_B.weight"] = 0.1 * up
    path = tmp_path_factory.mktemp("lora") / "all.safetensors"
    save_file(tensors, path)
    return LoraSource(path, 0.7)


@pytest.fixture(scope="module")
def configs(model: Path) -> Any:
    return open_source(Source(str(model))).configs


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exported(checkpoint: Checkpoint, name: str, configs: Any, folder: Path) -> tuple[Path, float]:
    folder.mkdir()
    return folder / "model.onnx", export_component(checkpoint, name, configs, folder / "model.onnx")


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_a_patched_graph_is_the_traced_one(
    model: Path, lora: LoraSource, configs: Any, tmp_path: Path, name: str
) -> None:
    changed = load_checkpoint(str(model), loras=[lora])
    base, _ = exported(load_checkpoint(str(model)), name, configs, tmp_path / "base")
    _, difference = exported(changed, name, configs, tmp_path / "traced")
    (tmp_path / "patched").mkdir()
    path = tmp_path / "patched/model.onnx"
    assert patch_component(changed, name, configs, base=base, path=path) == difference
    assert contents(tmp_path / "patched") == contents(tmp_path / "traced")
    assert contents(tmp_path / "base")["model.onnx_data"] != contents(tmp_path / "traced")["model.onnx_data"]


def test_a_graph_with_other_names_or_operators_is_left_to_be_traced(
    model: Path, lora: LoraSource, configs: Any, tmp_path: Path
) -> None:
    base, _ = exported(load_checkpoint(str(model)), "text_encoder", configs, tmp_path / "base")
    changed = load_checkpoint(str(model), loras=[lora])
    (tmp_path / "out").mkdir()
    layer = next(iter(changed.loras[0].updates["text_encoder"]))

    renamed = ir.load(base)
    value = renamed.graph.initializers[f"{layer}.weight"]
    value.name = "another"
    ir.save(renamed, tmp_path / "base/renamed.onnx")

    turned = ir.load(base)
    value = turned.graph.initializers[f"{layer}.weight"]
    (use,) = value.uses()
    identity = ir.node("Identity", [value])
    turned.graph.insert_before(use.node, identity)
    use.node.replace_input_with(use.idx, identity.outputs[0])
    ir.save(turned, tmp_path / "base/turned.onnx")

    for name in ("renamed", "turned"):
        path = tmp_path / "out/model.onnx"
        graph = tmp_path / f"base/{name}.onnx"
        assert patch_component(changed, "text_encoder", configs, base=graph, path=path) is None
    assert list((tmp_path / "out").iterdir()) == []
