"""Bundles hold what optimum's diffusion pipelines look for beside the graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sdc.compiler.load.clip_tokenizer import complete_tokenizer
from sdc.compiler.load.folder import read_tokenizer
from sdc.compiler.stages import Source, open_source
from sdc.engines.tokenizer import load_tokenizer

PROMPT = "a photo of a red sneaker, on a WHITE background 42!"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return dict(open_source(Source("tiny")).files)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_every_component_has_its_configuration(files: dict[str, bytes], component: str) -> None:
    """optimum refuses a component without one; these values it asks for by name."""
    config = json.loads(files[f"{component}/config.json"])
    asked = {"text_encoder": {"num_hidden_layers": 2}, "unet": {"in_channels": 4, "time_cond_proj_dim": None}}
    for name, value in asked.get(component, {"scaling_factor": 0.49421, "latent_channels": 4}).items():
        assert config[name] == value
    classes = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel"}
    assert config.get("_class_name", (config.get("architectures") or [""])[0]) == classes.get(
        component, "AutoencoderKL"
    )
    assert "_name_or_path" not in config


def test_model_index_names_what_is_loaded_by_class(files: dict[str, bytes]) -> None:
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["safety_checker"] == [None, None]


def test_both_spellings_of_the_tokenizer_say_the_same(files: dict[str, bytes], tmp_path: Path) -> None:
    folders = {}
    for spelling, left_out in (("merges", {"tokenizer.json"}), ("json", {"vocab.json", "merges.txt"})):
        folders[spelling] = tmp_path / spelling
        folders[spelling].mkdir()
        for name in {path.removeprefix("tokenizer/") for path in files if path.startswith("tokenizer/")} - left_out:
            (folders[spelling] / name).write_bytes(files[f"tokenizer/{name}"])
    by_merges, by_json = (load_tokenizer(folder).encode([PROMPT]) for folder in folders.values())
    assert (by_merges == by_json).all()
    assert len(set(by_json[0])) > 12
    theirs = CLIPTokenizer.from_pretrained(folders["merges"])
    assert theirs(PROMPT, padding="max_length", max_length=77).input_ids == by_json[0].tolist()


def test_merges_written_as_pairs_are_joined() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b</w>": 1, "ab</w>": 2}, "merges": [["a", "b</w>"]]}
    found = complete_tokenizer({"tokenizer.json": json.dumps({"model": model}).encode()})
    assert found["merges.txt"] == b"#version: 0.2\na b</w>\n"
    assert json.loads(found["vocab.json"]) == model["vocab"]


def test_tokenizer_of_another_kind_gets_no_merges(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    assert set(read_tokenizer(tmp_path)) == {"tokenizer.json"}
