"""Checkpoints in diffusers' layout: a folder for each network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdc.compiler.load.checkpoint import Checkpoint, NetworkSource, WeightSource
from sdc.compiler.load.clip_tokenizer import clip_tokenizer_files, complete_tokenizer
from sdc.compiler.load.networks import NETWORKS, check_tensors, rename_old_names
from sdc.compiler.load.random_weights import RandomWeights
from sdc.compiler.load.tensor_files import digest_files, read_tensors, refuse_pickle
from sdc.engines.errors import InputError

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
"""Classes of pipelines whose parts sdc compiles."""

_WEIGHT_STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_VARIANTS = ("", ".fp16")
"""Endings of the stem, the preferred one first: full precision is what diffusers loads when it is not told."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MODEL_FIELDS = ("_class_name", "_diffusers_version", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
_ABSENT_FIELDS = ("feature_extractor", "image_encoder", "safety_checker")


@dataclass(frozen=True)
class FileWeights:
    """Weights of one network in safetensors files of diffusers' layout."""

    files: tuple[Path, ...]

    @property
    def origin(self) -> str:
        """The first file."""
        return str(self.files[0])

    def check(self, network: str, module: nn.Module) -> None:
        """Raise InputError unless the files hold exactly the module's weights."""
        hint = f"its config.json and its weights belong to different models, or the {network} is not whole"
        check_tensors(module, self.read(network, module), origin=self.origin, hint=hint)

    def read(self, network: str, module: nn.Module) -> dict[str, Tensor]:
        """The weights under the module's own names, mapped from the files."""
        tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors.update(read_tensors(file))
        return rename_old_names(network, tensors, module)

    def fingerprint(self) -> str:
        """Digests of the files."""
        return json.dumps(["files", *digest_files(self.files)])


def open_folder(folder: Path, *, name: str, source: str, seed: int | None = None) -> Checkpoint:
    """Open a folder in diffusers' layout.

    Args:
        folder: holds ``model_index.json`` and a folder for each part.
        name: what the user called it.
        source: what a manifest says.
        seed: take random weights of this seed; the folder needs none then.

    Raises:
        InputError: a part is missing, is damaged, or is of a class that is not supported.
    """
    read_model_index(folder)  # first, so that an unsupported pipeline is called so and not incomplete
    weights: dict[str, WeightSource] = {
        network: FileWeights(find_weights(folder, network)) if seed is None else RandomWeights(seed)
        for network in NETWORKS
    }
    tokenizer_files = read_tokenizer(folder / "tokenizer")
    return assemble(folder, name=name, source=source, weights=weights, tokenizer_files=tokenizer_files)


def open_shipped(architecture: str, *, seed: int) -> Checkpoint:
    """An architecture whose configurations ship with sdc ("sd15" or "sd2"): random weights, CLIP's tokenizer."""
    folder = shipped_configs(architecture)
    weights: dict[str, WeightSource] = {network: RandomWeights(seed) for network in NETWORKS}
    tokenizer_files = clip_tokenizer_files(read_json(folder / "tokenizer" / "tokenizer_config.json"))
    return assemble(folder, name=architecture, source=architecture, weights=weights, tokenizer_files=tokenizer_files)


def assemble(
    configs: Path,
    *,
    name: str,
    source: str,
    weights: Mapping[str, WeightSource],
    tokenizer_files: Mapping[str, bytes],
) -> Checkpoint:
    """Make a checkpoint of the configurations in a folder of diffusers' layout and of weights from anywhere.

    Raises:
        InputError: a configuration is missing or damaged.
    """
    return Checkpoint(
        name=name,
        source=source,
        weights="random" if isinstance(weights["unet"], RandomWeights) else "trained",
        networks={
            network: NetworkSource(read_json(configs / network / "config.json"), weights[network])
            for network in NETWORKS
        },
        tokenizer_files=tokenizer_files,
        scheduler_config=read_json(configs / "scheduler" / "scheduler_config.json"),
        model_index=trim_model_index(read_model_index(configs)),
    )


def shipped_configs(architecture: str) -> Path:
    """The folder of configurations that ships for ``architecture``."""
    return Path(str(files("sdc.compiler.load"))) / "configs" / architecture


def read_model_index(folder: Path) -> dict[str, Any]:
    """Read ``model_index.json``.

    Raises:
        InputError: it is missing or damaged, or the pipeline's class is not supported.
    """
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise InputError(
            f"{folder} is a {index.get('_class_name')}; supported so far are {', '.join(PIPELINES)}",
            hint="use a checkpoint of Stable Diffusion 1.x or 2.x",
        )
    return index


def weight_candidates(network: str) -> list[str]:
    """Names that the weights of a network may have, the preferred one first; ``.json`` lists shards."""
    stem = _WEIGHT_STEMS[network]
    return [
        name
        for variant in _VARIANTS
        for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json")
    ]


def listed_shards(path: Path) -> list[str]:
    """File names that an index lists; none if ``path`` holds the weights itself."""
    return sorted(set(read_json(path)["weight_map"].values())) if path.suffix == ".json" else []


def find_weights(folder: Path, network: str) -> tuple[Path, ...]:
    """The safetensors files of a network: one, or the shards that an index lists.

    Raises:
        InputError: there are none, or only pickles.
    """
    part, candidates = folder / network, weight_candidates(network)
    for path in (part / name for name in candidates):
        if path.is_file():
            return tuple(part / shard for shard in listed_shards(path)) or (path,)
    for other in sorted(part.glob("*")) if part.is_dir() else ():
        refuse_pickle(other)
    raise InputError(f"{folder} has no weights of {network}: {part / candidates[0]} not found")


def trim_model_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a ``model_index.json`` what sdc compiles; diffusers reads the rest as absent."""
    kept = {name: index[name] for name in _MODEL_FIELDS if name in index}
    return {**kept, **{name: [None, None] for name in _ABSENT_FIELDS}, "requires_safety_checker": False}


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in both spellings: ``tokenizer.json``, and ``vocab.json`` with ``merges.txt``.

    Raises:
        InputError: there is neither ``tokenizer.json`` nor a vocabulary with merges.
    """
    found = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= set(found):
        raise InputError(f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt")
    return complete_tokenizer(found)


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        InputError: it is missing or is not a JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} not found", hint="expected a whole checkpoint in diffusers' layout")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", hint="fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object", hint="fetch it again")
    return value
