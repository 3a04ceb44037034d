"""A model that overflows in float16, as SD's VAE does, gets its island in an export and draws the right picture.

The model is made by a rescaling that changes no picture: a convolution before a norm may have any scale.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import StableDiffusionPipeline
from minimal_pipeline import save_minimal_pipeline
from onnx.reference import ReferenceEvaluator

from sdc.compiler.compile import export_bundle
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.workshop.cache import StageCache
from sdc.engines import load
from sdc.engines.targets import parse_targets
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, precision_passes
from sdc.passes.simplify.inline_functions import InlineFunctions

SCALE = 2e5
OVERFLOWING = ("vae_decoder", "vae_encoder", "unet")


def save_overflowing_pipeline(folder: Path) -> Path:
    """The minimal pipeline with one convolution in front of a norm scaled up, in UNet, VAE decoder and encoder."""
    (folder / "plain").mkdir()
    (folder / "large").mkdir()
    pipeline = StableDiffusionPipeline.from_pretrained(save_minimal_pipeline(folder / "plain"), safety_checker=None)
    with torch.no_grad():
        for half in (pipeline.vae.decoder, pipeline.vae.encoder):
            for parameter in half.mid_block.resnets[0].conv1.parameters():
                parameter.mul_(SCALE)
        block = pipeline.unet.mid_block.resnets[0]
        for layer in (block.conv1, block.time_emb_proj):
            for parameter in layer.parameters():
                parameter.mul_(SCALE)
    pipeline.save_pretrained(folder / "large", safe_serialization=True)
    return folder / "large"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageCache]:
    folder = tmp_path_factory.mktemp("half")
    model = save_overflowing_pipeline(folder)
    cache = StageCache(folder / "cache")
    for precision in ("fp32", "fp16"):
        request = ExportRequest(
            Source(str(model)), PrecisionRequest(precision), parse_targets("ort-cpu"), folder / precision, hoist=False
        )
        export_bundle(request, cache=cache)
    return folder, cache


def test_overflows_are_reported(exports: tuple[Path, StageCache]):
    folder, _ = exports
    report = json.loads((folder / "fp16" / "reports" / "export.json").read_text(encoding="utf-8"))["fp16"]
    assert {name for name, overflow in report.items() if overflow} == set(OVERFLOWING)
    for name in OVERFLOWING:
        assert report[name]["magnitude"] > 32752
        assert report[name]["first"] in report[name]["float32"]
        assert 2 <= len(report[name]["float32"]) <= 5


def test_pictures_are_right(exports: tuple[Path, StageCache]):
    folder, _ = exports
    pictures = {}
    for precision in ("fp32", "fp16"):
        with load(folder / precision) as pipeline:
            drawn = pipeline("a boat", steps=3, guidance_scale=3.0, seed=5)[0]
            pictures[precision] = np.asarray(drawn, np.float32)
    assert np.abs(pictures["fp16"] - pictures["fp32"]).max() <= 4


def decode(model: ir.Model) -> np.ndarray:
    """The decoder's picture with every rounding that the graph says: ONNX Runtime on a CPU would skip them."""
    flat = model.clone()
    InlineFunctions(fused=True).run(flat)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(flat))
    latents = np.random.default_rng(3).normal(size=(1, 5, 4, 6)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(proto).run(None, {"latent_sample": latents})[0]


def test_decoder_gives_nan_without_its_island(exports: tuple[Path, StageCache]):
    folder, cache = exports
    report = json.loads((folder / "fp16" / "reports" / "export.json").read_text(encoding="utf-8"))["fp16"]
    graphs = [path for path in cache.root.glob("export/*/**/model.onnx") if is_decoder(path)]
    decoder = ir.from_proto(onnx.load(graphs[0]))
    run_passes([*canonical_passes(), *fusion_passes("vae_decoder")], decoder)
    exact, broken, mended = decoder.clone(), decoder.clone(), decoder.clone()
    run_passes(precision_passes("fp16"), broken)
    run_passes(precision_passes("fp16", float32=frozenset(report["vae_decoder"]["float32"])), mended)
    expected = decode(exact)
    assert not np.isfinite(decode(broken)).any()
    np.testing.assert_allclose(decode(mended), expected, rtol=0, atol=0.02 * np.abs(expected).max())


def is_decoder(path: Path) -> bool:
    return any(value.name == "latent_sample" for value in ir.load(path).graph.inputs)
