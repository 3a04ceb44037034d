"""Trains everything that `tiny` consists of, stage after stage, each skipped when its result is already there."""

from __future__ import annotations

import argparse
import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from sdc.compiler.evaluate.statistics import make_statistics, save_statistics
from sdc.compiler.tiny.architecture import make_scheduler
from sdc.compiler.tiny.captions import all_captions
from sdc.compiler.tiny.data import DEBIAN_FOLDER, GreyPictures, load_grey_pictures
from sdc.compiler.tiny.judge import Judge
from sdc.compiler.tiny.memory_layout import channels_last
from sdc.compiler.tiny.train_judge import measure_accuracy, train_judge
from sdc.compiler.tiny.train_tokenizer import train_tokenizer
from sdc.compiler.tiny.train_unet import Denoiser, LatentSet, UNetRecipe, encode_pictures, train_unet
from sdc.compiler.tiny.train_vae import finetune_decoder, measure_psnr, train_vae

log = logging.getLogger(__name__)

JUDGE_WIDTH = 32
FEATURE_NETWORK_WIDTH = 16


@dataclass(frozen=True)
class Recipe:
    """How long each stage trains; the defaults gave the weights that ship."""

    seed: int = 0
    judge_epochs: int = 6
    feature_network_epochs: int = 2
    vae_steps: int = 2500
    decoder_steps: int = 500
    unet_steps: int = 4000
    unet_second_steps: int = 1000
    gradient_checkpointing: bool = False


def main() -> None:
    """Command line of ``scripts/train_tiny.py``."""
    parser = argparse.ArgumentParser(description="train the tiny model")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the gzipped IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_tiny(arguments.data, arguments.out, Recipe(gradient_checkpointing=arguments.gradient_checkpointing))


def train_tiny(data_folder: Path, out: Path, recipe: Recipe) -> None:
    """Run every stage that has no result in `out` yet."""
    train, test = load_grey_pictures(data_folder, "train"), load_grey_pictures(data_folder, "t10k")
    features = _judge_stage(
        train,
        test,
        out / "feature_network.safetensors",
        seed=recipe.seed + 100,
        epochs=recipe.feature_network_epochs,
        width=FEATURE_NETWORK_WIDTH,
    )
    vae = _vae_stage(train, test, features, out / "vae", recipe)
    tokenizer = train_tokenizer(all_captions(), out / "tokenizer")
    _unet_stage(train, vae, tokenizer, out, recipe)
    judge_path = out / "models" / "judge.safetensors"
    judge = _judge_stage(train, test, judge_path, seed=recipe.seed, epochs=recipe.judge_epochs, width=JUDGE_WIDTH)
    _package_stage(train, test, features, judge, judge_path, out, recipe)


def _judge_stage(train: GreyPictures, test: GreyPictures, path: Path, *, seed: int, epochs: int, width: int) -> Judge:
    if not path.exists():
        judge = train_judge(train, seed=seed, epochs=epochs, width=width)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, path)
        _record(path.with_suffix(".json"), measure_accuracy(judge, test, seed=seed))
    judge = Judge(width)
    judge.load_state_dict(load_file(path))
    return judge.eval()


def _vae_stage(train: GreyPictures, test: GreyPictures, features: Judge, folder: Path, recipe: Recipe) -> AutoencoderKL:
    if not (folder / "config.json").exists():

        def checkpoint(vae: AutoencoderKL, step: int) -> None:
            vae.save_pretrained(folder.with_name(f"vae-step-{step}"))

        vae = train_vae(train, features, seed=recipe.seed, steps=recipe.vae_steps, checkpoint=checkpoint)
        vae.save_pretrained(folder)
        _record(folder.with_suffix(".json"), {"psnr_db": measure_psnr(vae, test, seed=recipe.seed)})
    return AutoencoderKL.from_pretrained(folder).eval()


def _unet_stage(train: GreyPictures, vae: AutoencoderKL, tokenizer: CLIPTokenizer, out: Path, recipe: Recipe) -> None:
    """Train text encoder and UNet in two rounds; `out`/tiny holds the pipeline of the latest checkpoint, in float16."""

    def save_pipeline(model: Denoiser, step: int) -> None:
        pipeline = StableDiffusionPipeline(
            vae, model.text_encoder, tokenizer, model.unet, make_scheduler(), None, None, requires_safety_checker=False
        )
        _save_half(pipeline, out / "tiny")
        log.info("step %d: pipeline saved in %s", step, out / "tiny")

    latents = _latents(train, vae, out, recipe)
    model = None
    for index, settings in enumerate(unet_rounds(recipe), start=1):
        folder = out / f"unet-round-{index}"
        folder.mkdir(exist_ok=True)
        model = train_unet(latents, tokenizer, settings, folder=folder, on_checkpoint=save_pipeline, start=model)


def unet_rounds(recipe: Recipe) -> tuple[UNetRecipe, UNetRecipe]:
    """The second round starts from the first one's averaged weights, with a fresh optimiser at a lower rate."""
    checkpointing = recipe.gradient_checkpointing
    return (
        UNetRecipe(steps=recipe.unet_steps, seed=recipe.seed, gradient_checkpointing=checkpointing),
        UNetRecipe(
            steps=recipe.unet_second_steps,
            seed=recipe.seed + 1,
            learning_rate=5e-4,
            ema_decay=0.999,
            gradient_checkpointing=checkpointing,
        ),
    )


def _package_stage(
    train: GreyPictures,
    test: GreyPictures,
    features: Judge,
    judge: Judge,
    judge_path: Path,
    out: Path,
    recipe: Recipe,
) -> None:
    """Give the trained pipeline its better decoder, and write `out`/models as it ships: tiny, judge, statistics."""
    pipeline = StableDiffusionPipeline.from_pretrained(out / "tiny", torch_dtype=torch.float32)
    folder = out / "vae-finetuned"
    if not (folder / "config.json").exists():
        vae = channels_last(AutoencoderKL.from_pretrained(out / "vae"))
        finetune_decoder(vae, train, features, seed=recipe.seed, steps=recipe.decoder_steps).save_pretrained(folder)
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(folder))
    _save_half(pipeline, judge_path.parent / "tiny")
    vae = AutoencoderKL.from_pretrained(judge_path.parent / "tiny", subfolder="vae", torch_dtype=torch.float32).eval()
    statistics = make_statistics(test, judge, vae, judge_path, seed=recipe.seed)
    save_statistics(statistics, judge_path.with_name("statistics.safetensors"), seed=recipe.seed)
    _record(out / "statistics.json", statistics.figures)


def _latents(train: GreyPictures, vae: AutoencoderKL, out: Path, recipe: Recipe) -> LatentSet:
    path = out / "latents.safetensors"
    if not path.exists():
        latents = encode_pictures(vae, train, seed=recipe.seed)
        tensors = {name: torch.as_tensor(value) for name, value in vars(latents).items()}
        save_file(tensors, path)
    stored = load_file(path)
    labels = {name: stored[name].numpy() for name in ("garments", "colours", "backgrounds")}
    return LatentSet(stored["mean"], stored["deviation"], **labels)


def _save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save a copy of the pipeline in float16; the pipeline itself keeps its precision."""
    components = {
        name: copy.deepcopy(module).half() if isinstance(module, torch.nn.Module) else module
        for name, module in pipeline.components.items()
    }
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(folder)


def _record(path: Path, figures: dict[str, float]) -> None:
    log.info("%s: %s", path.stem, figures)
    path.write_text(json.dumps(figures, indent=2) + "\n")
