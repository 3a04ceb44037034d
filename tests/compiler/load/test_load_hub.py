"""Checkpoints are downloaded through huggingface_hub itself, cached, and used again offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from hub_server import COMMIT, serve_hub

from sdc.compiler.load import load_checkpoint

PROGRAM = """
import json, sys
from sdc.compiler.load import load_checkpoint
from sdc.engines.errors import InputError
answers = []
for model, weights in json.loads(sys.argv[1]):
    try:
        checkpoint = load_checkpoint(model, weights=weights)
        answers.append({
            "source": checkpoint.source,
            "digests": [checkpoint.digest(name) for name in ("text_encoder", "unet", "vae")],
            "width": checkpoint.unet().conv_in.out_channels,
        })
    except InputError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Client:
    """Loads models in a process of its own: huggingface_hub reads the environment when it is imported."""

    home: Path
    endpoint: str

    def load(self, *models: tuple[str, str], offline: bool = False) -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": str(int(offline))}
        command = [sys.executable, "-c", PROGRAM, json.dumps(models)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        answers: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
        return answers


@pytest.fixture
def repository(folder: Path, tmp_path: Path) -> Path:
    """What a hub's repository holds beside what is needed."""
    path = Path(shutil.copytree(folder, tmp_path / "repository"))
    for extra in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (path / extra).write_bytes(b"not to be downloaded")
    (path / "safety_checker").mkdir()
    (path / "safety_checker/model.safetensors").write_bytes(b"not to be downloaded")
    (path / "README.md").write_text("a small model")
    return path


def test_download_cache_and_offline_use(repository: Path, folder: Path, tmp_path: Path) -> None:
    expected = [load_checkpoint(str(folder)).digest(name) for name in ("text_encoder", "unet", "vae")]
    with serve_hub({"someone/small-model": repository}) as hub:
        client = Client(tmp_path / "home", hub.endpoint)
        first, again = client.load(("someone/small-model", "trained"), ("someone/small-model@main", "trained"))
    assert first["source"] == f"someone/small-model@{COMMIT}"
    assert first["digests"] == expected
    assert again == first
    downloads = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert len(downloads) == len(set(downloads))
    assert {path for path in hub.downloads() if path.endswith((".safetensors", ".bin", ".md"))} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    (offline,) = client.load(("someone/small-model", "trained"), offline=True)
    assert offline == first


def test_shards_are_fetched_and_random_weights_need_none(
    repository: Path, tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    for file in (repository / "unet").glob("*.safetensors"):
        file.unlink()
    pipeline.unet.save_pretrained(repository / "unet", max_shard_size="200KB", variant="fp16")
    without_weights = Path(shutil.copytree(repository, tmp_path / "without"))
    for file in without_weights.rglob("*.safetensors"):
        file.unlink()
    with serve_hub({"someone/shards": repository, "someone/without": without_weights}) as hub:
        client = Client(tmp_path / "home", hub.endpoint)
        random, sharded = client.load(("someone/without", "random"), ("someone/shards", "trained"))
    assert random["width"] == sharded["width"] == 12
    assert sum("unet/" in path and path.endswith(".safetensors") for path in hub.downloads()) > 1


def test_every_failure_is_one_clear_error(repository: Path, tmp_path: Path) -> None:
    pickled = Path(shutil.copytree(repository, tmp_path / "pickled"))
    for file in (pickled / "vae").glob("*.safetensors"):
        file.unlink()
    larger = Path(shutil.copytree(repository, tmp_path / "larger"))
    index = json.loads((larger / "model_index.json").read_text())
    (larger / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    repositories = {"a/small": repository, "a/pickled": pickled, "a/larger": larger, "a/gated": None}
    with serve_hub(repositories) as hub:
        client = Client(tmp_path / "home", hub.endpoint)
        names = ("a/absent", "a/small@nowhere", "a/gated", "a/pickled", "a/larger")
        answers = client.load(*((name, "trained") for name in names))
    messages = [answer["error"] for answer in answers]
    assert "the hub has no model a/absent" in messages[0]
    assert "no such revision: a/small@nowhere" in messages[1]
    assert "access to a/gated is gated" in messages[2]
    assert "HF_TOKEN" in messages[2]
    assert "a/pickled has no safetensors weights of vae" in messages[3]
    assert "StableDiffusionXLPipeline" in messages[4]
    assert not any(line.startswith("GET /a/larger/resolve") and "unet/diff" in line for line in hub.requests)
    (unreachable,) = client.load(("b/other", "trained"))  # the server has gone
    assert "the hub is not reachable" in unreachable["error"]
    assert "HF_HUB_OFFLINE" in unreachable["error"]
