"""Random weights: the same for a seed, of sane size, and without a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_pipelines import run_text_encoder, run_unet, run_vae

from sdc.compiler.load import load_checkpoint


def test_weights_depend_on_the_seed_alone(folder: Path) -> None:
    first, again, other = (load_checkpoint(str(folder), weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(run_unet(first.unet()), run_unet(again.unet()))
    assert not torch.allclose(run_unet(first.unet()), run_unet(other.unet()), atol=0.1)
    assert first.digest("unet") == again.digest("unet")
    assert len({first.digest("unet"), other.digest("unet"), load_checkpoint(str(folder)).digest("unet")}) == 3


def test_equal_layers_differ(folder: Path) -> None:
    weights = load_checkpoint(str(folder), weights="random").unet().state_dict()
    assert not torch.equal(weights["mid_block.resnets.0.conv1.weight"], weights["mid_block.resnets.1.conv1.weight"])


def test_outputs_are_of_order_one(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder), weights="random", seed=4)
    for output in (run_unet(checkpoint.unet()), run_vae(checkpoint.vae()), run_text_encoder(checkpoint.text_encoder())):
        assert 0.1 < output.std() < 3
        assert output.abs().max() < 20


def test_norms_and_biases_are_not_trivial(folder: Path) -> None:
    weights = load_checkpoint(str(folder), weights="random").unet().state_dict()
    scale, bias = weights["conv_norm_out.weight"], weights["conv_norm_out.bias"]
    assert scale.sub(1).abs().max() <= 0.1
    assert scale.std() > 0.02
    assert bias.abs().max() <= 0.1
    assert bias.std() > 0.02


def test_no_weights_are_needed(folder: Path, tmp_path: Path) -> None:
    for file in (*folder.rglob("*.json"), *folder.rglob("*.txt")):
        copy = tmp_path / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    checkpoint = load_checkpoint(str(tmp_path), weights="random", seed=1)
    assert checkpoint.weights == "random"
    assert torch.equal(run_vae(checkpoint.vae()), run_vae(load_checkpoint(str(folder), weights="random", seed=1).vae()))


def test_sd15_is_described_without_a_download() -> None:
    checkpoint = load_checkpoint("sd15", weights="random")
    assert checkpoint.config("unet")["block_out_channels"] == [320, 640, 1280, 1280]
    assert len(json.loads(checkpoint.tokenizer_files["vocab.json"])) == 49408
    weights = checkpoint.text_encoder().state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == 123_060_480


@pytest.mark.slow
def test_sd15_unet_has_its_published_size_and_finite_half_precision_output() -> None:
    unet = load_checkpoint("sd15", weights="random", seed=1).unet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    with torch.no_grad():
        output = unet.half()(
            torch.randn(1, 4, 16, 8).half(), torch.tensor([501]), torch.randn(1, 77, 768).half()
        ).sample
    assert 0.1 < output.float().std() < 3
