"""What is pruned, sparse or of low rank is exported as that: fusions find their sites, zeros and ranks are there."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from minimal_pipeline import save_minimal_pipeline

from sdc.compiler.build.built import save_onnx
from sdc.compiler.cli import main
from sdc.compiler.compress.channels import find_groups
from sdc.compiler.compress.low_rank import apply_spans, choose_spans, spectra_of
from sdc.compiler.compress.prune import UnetState, prune
from sdc.compiler.compress.settings import parse_pattern
from sdc.compiler.compress.sparsity import apply_masks, choose_layers, make_masks
from sdc.compiler.load import load_checkpoint
from sdc.compiler.load.networks import make_empty
from sdc.compiler.load.save import save_checkpoint
from sdc.compiler.stages import MODEL_NAME, fused_component
from sdc.compiler.trace.check import example_feeds, small_sizes
from sdc.compiler.trace.export import export_component
from sdc.compiler.trace.interfaces import component_spec
from sdc.engines import load
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes
from sdc.passes.simplify.factorise_weights import LOW_RANK
from sdc.passes.sparse_weights import SparseLayers, count_sparse_layers

sys.path.append(str(Path(__file__).parents[2] / "passes"))
from equality import relative_error, run_model
from exported_graphs import load_graph


@pytest.fixture(scope="module")
def pruned_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with random units of every group gone, each group at another width."""
    checkpoint = load_checkpoint("tiny")
    whole = UnetState(checkpoint.config("unet"), checkpoint.unet().state_dict())
    groups, random = find_groups(whole.build_empty()), np.random.default_rng(1)
    kept = {
        group.name: np.sort(random.choice(group.units, random.choice(group.kept_units(8)[1:]), replace=False))
        for group in groups
    }
    pruned = prune(whole, groups, kept)
    folder = tmp_path_factory.mktemp("pruned") / "tiny"
    save_checkpoint(checkpoint, folder, unet=(pruned.config, pruned.weights))
    return folder


def fused_operators(model: ir.Model) -> Counter[str]:
    run_passes((*canonical_passes(), *fusion_passes("unet")), model)
    return Counter(node.op_type for node in model.graph)


def test_all_fusion_sites_are_found(pruned_tiny: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(pruned_tiny))
    configs = {name: checkpoint.config(name) for name in ("text_encoder", "unet", "vae")}
    difference = export_component(checkpoint, "unet", configs, tmp_path / "model.onnx")
    assert difference < 1e-4, "the graph is not the pruned network"
    found, whole = fused_operators(ir.load(tmp_path / "model.onnx")), fused_operators(load_graph("unet"))
    assert whole["MultiHeadAttention"] == 22
    assert found == whole


def test_all_sparse_layers_are_sparse_in_the_lowered_graph(tmp_path: Path) -> None:
    """`tiny` with two of every four weights, in float16, lowered for TensorRT."""
    checkpoint, pattern, folder = load_checkpoint("tiny"), parse_pattern("2:4"), tmp_path / "tiny"
    whole = UnetState(checkpoint.config("unet"), checkpoint.unet().state_dict())
    layers = choose_layers(whole.build_empty(), in_blocks=True)
    assert list(layers.dense) == ["conv_in", "conv_out"]
    sparse = apply_masks(whole, make_masks(whole.weights, layers.names, pattern, None))
    save_checkpoint(checkpoint, folder, unet=(sparse.config, sparse.weights))
    configs = {name: checkpoint.config(name) for name in ("text_encoder", "unet", "vae")}
    export_component(load_checkpoint(str(folder)), "unet", configs, folder / "model.onnx")
    model = ir.load(folder / "model.onnx")
    passes = (*canonical_passes(), *fusion_passes("unet"), *precision_passes("fp16"), *lowering_passes("tensorrt_rtx"))
    run_passes(passes, model)
    assert count_sparse_layers(model) == SparseLayers(len(layers.names), len(layers.names) + 2)


def test_fewer_channels_and_blocks_int8_and_deepcache_together(tmp_path: Path) -> None:
    """Pictures of all four are those of the same network in float32, but for rounding and the kept features."""
    whole, smaller = save_minimal_pipeline(tmp_path / "whole", guidance_width=None, unet_layers=2), tmp_path / "smaller"
    by_weights = ("--importance", "magnitude", "--budgets", "uniform", "--round-steps", "0", "--recover-steps", "0")
    fewer = ("--student", "small", "--parameters", "0.6", "--multiple", "1")
    assert main(["compress", "--model", str(whole), "--out", str(smaller), *fewer, *by_weights]) == 0
    quickly = ("--target", "ort-cpu", "--deepcache")
    for precision, more in {"fp32": (), "int8": ("--calibration-steps", "2")}.items():
        out = str(tmp_path / precision)
        assert main(["export", "--model", str(smaller), "--precision", precision, *quickly, *more, "--out", out]) == 0
    wanted, whole_steps, cached = (
        np.asarray(pipeline("a red coat", steps=4, seed=3, guidance_scale=2.0, deepcache=interval)[0], np.float64)
        for folder, interval in (("fp32", 1), ("int8", 1), ("int8", 2))
        for pipeline in (load(tmp_path / folder),)
    )
    assert 30 < psnr(whole_steps, wanted) < 90
    assert 20 < psnr(cached, wanted) < psnr(whole_steps, wanted)


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(20 * np.log10(255 / np.sqrt(np.square(found - wanted).mean() + 1e-9)))


def test_an_export_splits_the_layers_of_low_rank(model: Path, tmp_path: Path) -> None:
    """As many as the configuration names, with equal results; without the configuration's entry none is looked for."""
    whole, folder = load_checkpoint(str(model)), tmp_path / "low"
    state = UnetState(whole.config("unet"), whole.unet().state_dict())
    names = choose_layers(state.build_empty(), in_blocks=False).names
    low = apply_spans(state, choose_spans(spectra_of(state.weights, names, None), energy=0.7).spans)
    save_checkpoint(whole, folder, unet=(low.config, low.weights))
    checkpoint = load_checkpoint(str(folder))
    configs = {
        name: _plain(make_empty(name, checkpoint.config(name), origin="")) for name in ("text_encoder", "unet", "vae")
    }
    export_component(checkpoint, "unet", configs, folder / MODEL_NAME)
    spec = component_spec("unet", configs)
    component, reports = fused_component(spec, folder, True)
    split = reports["low rank"][0]
    assert split["name"] == "factorise-weights"
    ranks = low.config[LOW_RANK]
    assert len(ranks) > 10
    assert split["matched"] == len(ranks)
    assert sorted(layer["rank"] for layer in split["details"]["layers"].values()) == sorted(ranks.values())

    feeds = example_feeds(spec, small_sizes(spec), vocabulary=100)
    exported = ir.external_data.load_to_model(ir.load(folder / MODEL_NAME))
    ir.external_data.load_to_model(component.model)
    assert relative_error(component.model, run_model(exported, feeds), feeds) < 1e-4
    del exported.metadata_props[LOW_RANK]
    save_onnx(exported, folder / MODEL_NAME)
    assert "low rank" not in fused_component(spec, folder, True)[1]


def _plain(network: Any) -> dict[str, Any]:
    config = network.config
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)
