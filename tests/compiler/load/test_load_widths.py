"""Folders whose configuration has widths of its own: loaded as they were saved, refused where they make no sense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from small_pipelines import run_unet

from sdc.compiler.compress.channels import find_groups
from sdc.compiler.compress.prune import UnetState, prune
from sdc.compiler.load import load_checkpoint
from sdc.compiler.load.save import save_checkpoint
from sdc.compiler.load.widths import WIDTHS
from sdc.engines.errors import InputError


@pytest.fixture(scope="module")
def pruned(folder: Path) -> UnetState:
    """The folder's UNet with the first half of every group."""
    checkpoint = load_checkpoint(str(folder))
    whole = UnetState(checkpoint.config("unet"), checkpoint.unet().state_dict())
    groups = find_groups(whole.build_empty())
    return prune(whole, groups, {group.name: np.arange(max(1, group.units // 2)) for group in groups})


@pytest.fixture
def pruned_folder(folder: Path, pruned: UnetState, tmp_path: Path) -> Path:
    save_checkpoint(load_checkpoint(str(folder)), tmp_path / "pruned", unet=(pruned.config, pruned.weights))
    return tmp_path / "pruned"


def test_a_pruned_folder_is_loaded_as_it_was_saved(folder: Path, pruned_folder: Path, pruned: UnetState) -> None:
    checkpoint = load_checkpoint(str(pruned_folder))
    unet = checkpoint.unet()
    assert torch.equal(run_unet(unet), run_unet(pruned.build()))
    assert sum(each.numel() for each in unet.parameters()) == pruned.parameters
    whole = load_checkpoint(str(folder))
    assert checkpoint.digest("unet") != whole.digest("unet")
    for part in (checkpoint.text_encoder, checkpoint.vae):
        theirs = getattr(whole, part.__name__)().state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in part().state_dict().items())


def test_random_weights_have_the_widths_too(pruned_folder: Path, pruned: UnetState) -> None:
    unet = load_checkpoint(str(pruned_folder), weights="random").unet()
    assert sum(each.numel() for each in unet.parameters()) == pruned.parameters
    assert run_unet(unet).isfinite().all()


def test_diffusers_refuses_the_folder_and_the_file_says_why(pruned_folder: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
        UNet2DConditionModel.from_pretrained(pruned_folder / "unet", low_cpu_mem_usage=False)
    assert "diffusers cannot load" in json.loads((pruned_folder / "unet" / "config.json").read_text())["sdc_note"]


def test_a_folder_that_was_saved_whole_loads_in_diffusers(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(folder))
    save_checkpoint(checkpoint, tmp_path / "whole")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "whole" / "unet").eval()
    assert torch.equal(run_unet(unet), run_unet(checkpoint.unet()))


CONV, NORM = "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm2"


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([], "sdc_widths of .* is no table of layers"),
        (
            {"mid_block.resnets.7.conv1": {"in": 4, "out": 4}},
            "names mid_block.resnets.7.conv1, which the network does not",
        ),
        ({"mid_block.resnets.0": {"in": 4}}, "mid_block.resnets.0 is a ResnetBlock2D, which has no widths"),
        ({CONV: {"in": 48}}, "conv1 has {'in': 48}; expected in, out above 0"),
        ({CONV: {"in": 48, "out": 0}}, "expected in, out above 0"),
        ({CONV: {"in": 48, "out": "8"}}, "expected in, out above 0"),
        ({CONV: {"in": 48, "out": True}}, "expected in, out above 0"),
        ({CONV: 48}, "conv1 has 48; expected in, out above 0"),
        ({NORM: {"channels": 9, "groups": 2}}, "9 channels are no whole number for each of 2 groups"),
        ({CONV: {"in": 48, "out": 8}}, r"conv1.weight is \[24, 48, 3, 3\], expected \[8, 48, 3, 3\]"),
    ],
)
def test_widths_that_make_no_sense_are_refused(pruned_folder: Path, widths: Any, message: str, tmp_path: Path) -> None:
    path = pruned_folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    changed = {**config[WIDTHS], **widths} if isinstance(widths, dict) else widths
    path.write_text(json.dumps({**config, WIDTHS: changed}))
    with pytest.raises(InputError, match=message):
        load_checkpoint(str(pruned_folder))


def test_pruned_weights_without_their_widths_are_refused(pruned_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pruned_folder, tmp_path / "copy"))
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != WIDTHS}))
    with pytest.raises(InputError, match=r"is \[\d+.*\], expected \[\d+"):
        load_checkpoint(str(copy))
