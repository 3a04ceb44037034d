"""Exported graphs compute what the torch modules do, at sizes they were not traced with, and say so in their names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import StableDiffusionPipeline
from minimal_pipeline import GUIDANCE_WIDTH, LATENT_CHANNELS, TEXT_WIDTH

from sdc.compiler.build.built import save_onnx
from sdc.compiler.load import Checkpoint, load_checkpoint
from sdc.compiler.trace.check import compare_with_reference, example_feeds, run_module, small_sizes
from sdc.compiler.trace.export import export_component
from sdc.compiler.trace.interfaces import component_spec
from sdc.engines.errors import ExportError
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import COMPONENTS, ComponentSpec
from sdc.engines.targets import ONNXRUNTIME


@dataclass(frozen=True)
class Exported:
    checkpoint: Checkpoint
    configs: dict[str, dict[str, Any]]
    folder: Path
    differences: dict[str, float]

    def path(self, name: str) -> Path:
        return self.folder / name / "model.onnx"

    def spec(self, name: str) -> ComponentSpec:
        return component_spec(name, self.configs)

    def graph(self, name: str) -> ir.Graph:
        return ir.load(self.path(name)).graph


@pytest.fixture(scope="session")
def exported(minimal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    checkpoint = load_checkpoint(str(minimal_folder))
    configs = {network: checkpoint.config(network) for network in ("text_encoder", "unet", "vae")}
    folder = tmp_path_factory.mktemp("exported")
    differences = {}
    for name in COMPONENTS:
        (folder / name).mkdir()
        differences[name] = export_component(checkpoint, name, configs, folder / name / "model.onnx")
    return Exported(checkpoint, configs, folder, differences)


@pytest.fixture(scope="session")
def pipeline(minimal_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(minimal_folder, safety_checker=None)


def reference(pipeline: StableDiffusionPipeline, name: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What diffusers gives, called as its own pipelines call it."""
    tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
    with torch.no_grad():
        if name == "text_encoder":
            output = pipeline.text_encoder(tensors["input_ids"])
            return [output.last_hidden_state.numpy(), output.pooler_output.numpy()]
        if name == "unet":
            output = pipeline.unet(
                tensors["sample"],
                int(feeds["timestep"][0]),
                encoder_hidden_states=tensors["encoder_hidden_states"],
                timestep_cond=tensors["timestep_cond"],
            )
            return [output.sample.numpy()]
        if name == "vae_decoder":
            return [pipeline.vae.decode(tensors["latent_sample"]).sample.numpy()]
        return [pipeline.vae.encode(tensors["sample"]).latent_dist.parameters.numpy()]


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 32), (4, 14, 10)])
def test_graphs_equal_diffusers_at_every_size(
    exported: Exported, pipeline: StableDiffusionPipeline, name: str, batch: int, height: int, width: int
) -> None:
    spec = exported.spec(name)
    sizes = {"B": batch, "H": height, "W": width, "H_px": 4 * height, "W_px": 4 * width}
    feeds = example_feeds(spec, sizes, vocabulary=49408)
    expected = reference(pipeline, name, feeds)
    with open_session(EngineSource(spec, ONNXRUNTIME, (exported.path(name),))) as session:
        outputs = session.run(feeds)
    for tensor, wanted in zip(spec.outputs, expected, strict=True):
        found = outputs[tensor.name]
        assert found.shape == wanted.shape == tuple(sizes.get(str(size), size) for size in tensor.shape)
        # float32 on both sides: rounding of at most some hundred additions a value, twenty layers deep.
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_the_comparison_that_comes_with_the_export_is_close_and_not_zero(exported: Exported) -> None:
    for name, difference in exported.differences.items():
        assert 0 < difference < 1e-5, name


@pytest.mark.parametrize("name", COMPONENTS)
def test_inputs_and_outputs_are_the_interface(exported: Exported, name: str) -> None:
    graph, spec = exported.graph(name), exported.spec(name)
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        assert [value.dtype.numpy().name for value in values] == [tensor.dtype for tensor in tensors]
        assert [tuple(size if isinstance(size, int) else size.value for size in value.shape) for value in values] == [
            tensor.shape for tensor in tensors
        ]


def test_operators_are_those_of_opset_23(exported: Exported) -> None:
    assert ir.load(exported.path("unet")).opset_imports == {"": 23}
    unet = Counter(node.op_type for node in exported.graph("unet"))
    assert unet["Attention"] == 8
    assert unet["GroupNormalization"] == 21
    assert unet["LayerNormalization"] == 12
    assert unet["Gelu"] == 4
    assert not {"Softmax", "InstanceNormalization", "ReduceMean", "Erf"} & unet.keys()
    attentions = [node for node in exported.graph("text_encoder") if node.op_type == "Attention"]
    assert [node.attributes["is_causal"].as_int() for node in attentions] == [1]
    assert [len([value for value in node.inputs if value is not None]) for node in attentions] == [3], "no mask"


def test_names_are_those_of_the_network(exported: Exported) -> None:
    graph = exported.graph("unet")
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    assert {"conv_in/Conv", "down_blocks.1.resnets.0.conv1/Conv", "mid_block.attentions.0.norm/GroupNormalization"} <= {
        *names
    }
    parameters = dict(exported.checkpoint.unet().named_parameters())
    weights = graph.initializers
    np.testing.assert_array_equal(weights["conv_in.weight"].const_value.numpy(), parameters["conv_in.weight"].detach())
    # A linear layer without bias is a MatMul, whose weight the exporter transposes.
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    np.testing.assert_array_equal(weights[name].const_value.numpy(), parameters[name].detach().T)


def test_sizes_inside_the_graph_are_said_in_the_symbols_of_the_interface(exported: Exported) -> None:
    for name in COMPONENTS:
        symbols = exported.spec(name).dimensions.keys()
        for node in exported.graph(name):
            for value in node.outputs:
                for size in value.shape or ():
                    assert isinstance(size, int) or size.free_symbols() <= symbols, f"{node.name}: {value.shape}"
    shapes = {str(node.outputs[0].shape) for node in exported.graph("vae_decoder") if node.op_type == "Conv"}
    assert {"[B,12,H,W]", "[B,12,2*H,2*W]", "[B,9,4*H,4*W]", "[B,3,H_px,W_px]"} <= shapes


def test_nothing_of_the_exporting_machine_is_left(exported: Exported) -> None:
    for name in COMPONENTS:
        content = exported.path(name).read_bytes()
        for trace in (b".py", b"site-packages", b"stack_trace", b"minimal_pipeline", b"fx_node"):
            assert trace not in content, f"{trace!r} in {name}"


@pytest.mark.parametrize("change", ["weight", "operator"])
def test_a_wrong_graph_is_refused(exported: Exported, tmp_path: Path, change: str) -> None:
    spec = exported.spec("vae_encoder")
    model = ir.load(exported.path("vae_encoder"))
    if change == "weight":
        weight = model.graph.initializers["encoder.conv_in.weight"]
        values = weight.const_value.numpy().copy()
        values[4, 1, 0, 2] *= 1.05
        weight.const_value = ir.tensor(values, name=weight.name)
    else:
        node = next(node for node in model.graph if node.op_type == "GroupNormalization")
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)
    save_onnx(model, tmp_path / "model.onnx")
    feeds = example_feeds(spec, small_sizes(spec), vocabulary=0)
    expected = reference_of(exported, feeds)
    with pytest.raises(ExportError, match=r"vae_encoder differs from its torch module: latent_parameters by"):
        compare_with_reference(tmp_path / "model.onnx", spec, feeds, expected)
    assert compare_with_reference(exported.path("vae_encoder"), spec, feeds, expected) < 1e-5


def reference_of(exported: Exported, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    vae = exported.checkpoint.vae()
    with torch.no_grad():
        moments = vae.quant_conv(vae.encoder(torch.from_numpy(feeds["sample"])))
    return {"latent_parameters": moments.numpy()}


def test_a_graph_that_cannot_be_run_is_refused(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(exported.path("vae_encoder").read_bytes()[:-100])
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the exported vae_encoder"):
        compare_with_reference(tmp_path / "model.onnx", exported.spec("vae_encoder"), {}, {})


def test_a_module_that_gives_nan_is_refused_before_it_is_exported(exported: Exported) -> None:
    module = torch.nn.Conv2d(LATENT_CHANNELS, 3, 1)
    torch.nn.init.constant_(module.bias, float("nan"))
    spec = exported.spec("vae_decoder")
    with pytest.raises(ExportError, match=r"the vae_decoder itself gives NaN or infinity in sample.*weights"):
        run_module(module, spec, example_feeds(spec, small_sizes(spec), vocabulary=0))


def test_example_feeds_are_seeded_and_follow_the_interface(exported: Exported) -> None:
    spec = exported.spec("unet")
    sizes = {"B": 3, "H": 4, "W": 6}
    feeds = example_feeds(spec, sizes, vocabulary=100)
    assert {name: value.shape for name, value in feeds.items()} == {
        "sample": (3, LATENT_CHANNELS, 4, 6),
        "timestep": (1,),
        "encoder_hidden_states": (3, 77, TEXT_WIDTH),
        "timestep_cond": (3, GUIDANCE_WIDTH),
    }
    again = example_feeds(spec, sizes, vocabulary=100)
    assert all((feeds[name] == again[name]).all() for name in feeds)
    tokens = example_feeds(exported.spec("text_encoder"), {"B": 3}, vocabulary=100)["input_ids"]
    assert [int(row.argmax()) for row in tokens] == [3, 8, 13]
