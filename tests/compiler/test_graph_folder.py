"""Folders of ONNX graphs are exported as the weights that they came from are, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from optimum_folder import save_as_optimum

from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.metrics import psnr
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.load import load_checkpoint, load_model
from sdc.compiler.load.lora import LoraSource
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source, open_source
from sdc.compiler.trace.adopt import adopt_graph
from sdc.compiler.trace.exporters import Exporter
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.trace.run_graph import run_graph
from sdc.compiler.workshop.cache import StageCache
from sdc.engines import load
from sdc.engines.errors import InputError
from sdc.engines.specs import COMPONENTS
from sdc.engines.targets import parse_targets


@pytest.fixture(scope="module")
def graphs(minimal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_as_optimum(minimal_folder, tmp_path_factory.mktemp("optimum") / "minimal")


@pytest.fixture
def folder(graphs: Path, tmp_path: Path) -> Path:
    """To be changed at will."""
    return Path(shutil.copytree(graphs, tmp_path / "minimal"))


@dataclass(frozen=True)
class Drawn:
    pictures: np.ndarray
    manifest: Any


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Drawn]:
    folder = tmp_path_factory.mktemp("drawn")

    def export_and_draw(model: Path) -> Drawn:
        out = folder / str(len(list(folder.iterdir())))
        request = ExportRequest(Source(str(model)), PrecisionRequest("fp32"), parse_targets("ort-cpu"), out)
        summary = export_bundle(request, cache=StageCache(folder / "cache"))
        with load(out) as pipeline:
            generation = pipeline.plan(["a lighthouse", "two boats at dawn"], steps=3, guidance_scale=4.0, seed=5)
            return Drawn(pipeline.decode(pipeline.denoise(generation)), summary.manifest)

    return export_and_draw


@pytest.fixture(scope="module")
def from_torch(draw: Callable[[Path], Drawn], minimal_folder: Path) -> Drawn:
    return draw(minimal_folder)


def test_pictures_are_those_of_the_weights(draw: Callable[[Path], Drawn], from_torch: Drawn, graphs: Path) -> None:
    drawn = draw(graphs)
    assert np.std(drawn.pictures) > 0.01
    assert psnr(drawn.pictures, from_torch.pictures, data_range=2).min() >= 100
    assert drawn.manifest.pipeline == from_torch.manifest.pipeline
    assert drawn.manifest.components == from_torch.manifest.components
    assert {"unet_prompt", "unet_timestep"} <= set(drawn.manifest.components), "work is hoisted as from weights"


@pytest.fixture(scope="module")
def half_graphs(minimal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder from another exporter: torch's TorchScript exporter writes one that is no valid graph."""
    folder = tmp_path_factory.mktemp("half")
    save_as_optimum(minimal_folder, folder / "half", Exporter("dynamo", 18, torch.float16))
    return folder / "half"


def test_graphs_in_float16_are_computed_in_float32_with_their_weights(half_graphs: Path, tmp_path: Path) -> None:
    configs = open_source(Source(str(half_graphs))).configs
    for component in COMPONENTS:
        difference = adopt_graph(
            half_graphs / component / "model.onnx", component, configs, tmp_path / f"{component}.onnx"
        )
        assert 0 < difference < 0.02
        model = ir.load(tmp_path / f"{component}.onnx")
        values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
        assert ir.DataType.FLOAT16 not in {value.dtype for value in values}
        assert not [node for node in model.graph if "to" in node.attributes and node.attributes["to"].as_int() == 10]
    widened = {name: value.const_value for name, value in model.graph.initializers.items()}
    source = ir.load(half_graphs / "vae_encoder" / "model.onnx").graph.initializers
    weight = next(name for name, value in source.items() if len(value.shape or ()) == 4)
    np.testing.assert_array_equal(widened[weight].numpy(), source[weight].const_value.numpy().astype(np.float32))


@pytest.mark.parametrize("dtype", [ir.DataType.INT64, ir.DataType.FLOAT])
def test_timestep_of_any_kind_is_fitted(folder: Path, tmp_path: Path, dtype: ir.DataType) -> None:
    path = folder / "unet" / "model.onnx"
    model = ir.load(path)
    timestep = next(value for value in model.graph.inputs if value.name == "timestep")
    assert timestep.shape == ir.Shape([])
    if dtype == ir.DataType.INT64:
        cast = ir.node("Cast", [timestep], attributes={"to": ir.DataType.FLOAT})
        for node, index in list(timestep.uses()):
            if node is not cast:
                node.replace_input_with(index, cast.outputs[0])
        model.graph.insert_before(model.graph[0], cast)
        timestep.dtype = dtype
        ir.save(model, path)
    configs = open_source(Source(str(folder))).configs
    assert adopt_graph(path, "unet", configs, tmp_path / "unet.onnx") <= 1e-6
    found = {value.name: value for value in ir.load(tmp_path / "unet.onnx").graph.inputs}
    assert found["timestep"].dtype == ir.DataType.FLOAT
    assert found["timestep"].shape == ir.Shape([1])
    assert list(found) == [tensor.name for tensor in component_spec("unet", configs).inputs]


def test_digest_depends_on_graph_and_configuration(folder: Path, graphs: Path) -> None:
    before = load_model(str(graphs)).digest("unet")
    assert load_model(str(folder)).digest("unet") == before
    content = bytearray((folder / "unet" / "model.onnx").read_bytes())
    content[content.index(b"torch")] ^= 1
    (folder / "unet" / "model.onnx").write_bytes(content)
    assert load_model(str(folder)).digest("unet") != before


def edit(folder: Path, component: str, change: Callable[[ir.Model], None]) -> None:
    path = folder / component / "model.onnx"
    model = ir.load(path)
    change(model)
    ir.save(model, path)


def refused(folder: Path, component: str, tmp_path: Path) -> str:
    configs = open_source(Source(str(folder))).configs
    with pytest.raises(InputError) as caught:
        adopt_graph(folder / component / "model.onnx", component, configs, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    return str(caught.value)


def test_other_names_are_refused(folder: Path, tmp_path: Path) -> None:
    def rename(model: ir.Model) -> None:
        model.graph.outputs[0].name = "latent_sample"

    edit(folder, "vae_encoder", rename)
    said = refused(folder, "vae_encoder", tmp_path)
    assert "has the outputs latent_sample; expected latent_parameters" in said


def test_input_that_nothing_feeds_is_refused(folder: Path, tmp_path: Path) -> None:
    def add(model: ir.Model) -> None:
        model.graph.inputs.append(ir.Value(name="mask", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)))

    edit(folder, "text_encoder", add)
    assert "has the inputs input_ids, mask; expected input_ids" in refused(folder, "text_encoder", tmp_path)


def test_further_outputs_are_left_out(folder: Path, tmp_path: Path) -> None:
    def add(model: ir.Model) -> None:
        hidden = next(node.outputs[0] for node in model.graph if node.op_type == "LayerNormalization")
        hidden.name = "hidden_states.0"
        model.graph.outputs.insert(0, hidden)

    edit(folder, "text_encoder", add)
    configs = open_source(Source(str(folder))).configs
    adopt_graph(folder / "text_encoder" / "model.onnx", "text_encoder", configs, tmp_path / "out.onnx")
    found = [value.name for value in ir.load(tmp_path / "out.onnx").graph.outputs]
    assert found == ["last_hidden_state", "pooler_output"]


def test_fixed_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    def fix(model: ir.Model) -> None:
        model.graph.inputs[0].shape = ir.Shape([2, 5, 8, 12])

    edit(folder, "unet", fix)
    assert "B, H, W must be free" in refused(folder, "unet", tmp_path)


def test_another_model_s_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    def widen(model: ir.Model) -> None:
        model.graph.inputs[0].shape = ir.Shape(["b", 4, "h", "w"])

    edit(folder, "vae_decoder", widen)
    assert "[b, 4, h, w], but its configuration says [B, 5, H, W]" in refused(folder, "vae_decoder", tmp_path)


def test_other_types_are_refused(folder: Path, tmp_path: Path) -> None:
    def retype(model: ir.Model) -> None:
        model.graph.inputs[0].dtype = ir.DataType.INT32

    edit(folder, "text_encoder", retype)
    assert "takes input_ids as INT32, expected int64" in refused(folder, "text_encoder", tmp_path)


@pytest.mark.parametrize("version", [12, 25])
def test_opsets_that_no_pass_reads_are_refused(folder: Path, tmp_path: Path, version: int) -> None:
    def set_opset(model: ir.Model) -> None:
        model.graph.opset_imports[""] = version

    edit(folder, "vae_decoder", set_opset)
    assert f"is in opset {version}, expected 13 to 24" in refused(folder, "vae_decoder", tmp_path)


def test_operators_of_one_runtime_are_refused(folder: Path, tmp_path: Path) -> None:
    def optimise(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == "Sigmoid")
        node.domain, node.op_type = "com.microsoft", "QuickGelu"

    edit(folder, "text_encoder", optimise)
    assert "com.microsoft.QuickGelu" in refused(folder, "text_encoder", tmp_path)


def test_lora_and_random_weights_are_refused(graphs: Path) -> None:
    with pytest.raises(InputError, match="a LoRA cannot be matched to"):
        load_model(str(graphs), loras=[LoraSource(Path("style.safetensors"), 1.0)])
    with pytest.raises(InputError, match="leave --weights random out"):
        load_model(str(graphs), weights="random")


def test_bundles_are_refused(folder: Path) -> None:
    (folder / "sdc.json").write_text("{}")
    with pytest.raises(InputError, match="is a bundle"):
        load_model(str(folder))


def test_weights_are_asked_for_where_graphs_do_not_help(graphs: Path) -> None:
    with pytest.raises(InputError, match="no weights"):
        load_checkpoint(str(graphs))


def test_folder_with_weights_and_graphs_is_one_of_weights(minimal_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minimal_folder, tmp_path / "both"))
    (folder / "unet" / "model.onnx").write_bytes(b"")
    assert load_model(str(folder)).digest("unet") == load_checkpoint(str(minimal_folder)).digest("unet")


@pytest.mark.parametrize("missing", ["vae_encoder/model.onnx", "vae_decoder/config.json"])
def test_missing_parts_are_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match=missing):
        load_model(str(folder))


def test_missing_weights_are_named(folder: Path) -> None:
    path = folder / "unet" / "model.onnx"
    ir.save(ir.load(path), path.with_name("external.onnx"), external_data="external.data")
    path.with_name("external.onnx").replace(path)
    load_model(str(folder)).digest("unet")
    (folder / "unet" / "external.data").unlink()
    with pytest.raises(InputError, match=r"external\.data"):
        load_model(str(folder)).digest("unet")


def test_graph_that_is_none_is_refused(folder: Path) -> None:
    (folder / "unet" / "model.onnx").write_text(json.dumps({}))
    with pytest.raises(InputError, match="is no ONNX model"):
        load_model(str(folder)).digest("unet")


def test_disagreement_of_networks_is_refused(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 19}))
    with pytest.raises(InputError, match="cross_attention_dim 19"):
        load_model(str(folder))


def test_adopted_graph_takes_the_interface(folder: Path, tmp_path: Path) -> None:
    configs = open_source(Source(str(folder))).configs
    adopt_graph(folder / "vae_decoder" / "model.onnx", "vae_decoder", configs, tmp_path / "out.onnx")
    feeds = [{"latent_sample": np.random.default_rng(3).standard_normal((4, 5, 10, 8), dtype=np.float32)}]
    (found,) = run_graph(tmp_path / "out.onnx", feeds)
    assert found["sample"].shape == (4, 3, 40, 32)
    shapes = {value.name: str(value.shape) for value in ir.load(tmp_path / "out.onnx").graph.outputs}
    assert shapes == {"sample": "[B,3,H_px,W_px]"}
