"""Statistics and the figures of whole runs, on pictures whose quality is known."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from whole_bundle import write_whole_bundle

from sdc.compiler.cli import eval as command
from sdc.compiler.evaluate.evaluate import evaluate
from sdc.compiler.evaluate.evaluation import Evaluation, summarize
from sdc.compiler.evaluate.figures import run_figures
from sdc.compiler.evaluate.gather import Record, gather
from sdc.compiler.evaluate.grid import LABEL_WIDTH_PX
from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB
from sdc.compiler.evaluate.report import format_evaluation
from sdc.compiler.evaluate.settings import TRIPLES, Settings, prompt_triples, prompts_of_triples
from sdc.compiler.evaluate.statistics import (
    Statistics,
    balanced_triples,
    load_statistics,
    make_statistics,
    save_statistics,
)
from sdc.compiler.evaluate.verdicts import load_judge
from sdc.compiler.tiny.captions import GARMENTS
from sdc.compiler.tiny.data import GreyPictures, render
from sdc.compiler.tiny.judge import Judge
from sdc.compiler.tiny.train_judge import train_judge
from sdc.engines.errors import InputError

SIDE = 28


def draw_shapes(seed: int, garments: np.ndarray) -> GreyPictures:
    """Stand-ins for garments that a judge learns in seconds: bars whose place and width tell the class, with noise."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 60, (len(garments), SIDE, SIDE)).astype(np.uint8)
    for picture, garment in zip(pixels, garments, strict=True):
        begin = 1 + 5 * (garment % 5)
        bar = picture[begin : begin + 5] if garment < 5 else picture[begin : begin + 5, 9:19]
        bar[...] = random.integers(180, 255, bar.shape)
    return GreyPictures(pixels, garments.astype(np.int64))


def draw_collection(seed: int, count: int) -> GreyPictures:
    return draw_shapes(seed, np.random.default_rng(seed).integers(len(GARMENTS), size=count))


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    judge = train_judge(draw_collection(1, 1280), seed=1, epochs=4, width=8, batch=64)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def judge(judge_path: Path) -> Judge:
    return load_judge(judge_path)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(2)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8, 12),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    return autoencoder.eval()


@pytest.fixture(scope="module")
def statistics(judge_path: Path, judge: Judge, autoencoder: AutoencoderKL) -> Statistics:
    return make_statistics(draw_collection(3, 402), judge, autoencoder, judge_path, seed=5, latents=7)


def make_good_pictures(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """A perfect generator: renders what the prompt says, a little differently for each seed."""
    words = {prompt: triple for triple in ALL_TRIPLES for prompt in prompts_of_triples(triple[None])}
    rows = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        garment, colour, background = words[prompt]
        pixels = draw_shapes(seed, np.array([garment])).pixels
        rows.append((render(pixels, np.array([colour]), np.array([background])).numpy()[0] + 1) / 2)
    return np.stack(rows)


ALL_TRIPLES = prompt_triples(TRIPLES)


def with_noise(amount: float):  # type: ignore[no-untyped-def]
    def make(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        noise = np.random.default_rng(list(seeds)).standard_normal((len(prompts), 3, 32, 32), np.float32)
        return np.clip(make_good_pictures(prompts, seeds) + amount * noise, 0, 1).astype(np.float32)

    return make


def run(judge: Judge, amount: float, *, samples: int = 323, seed: int = 0) -> Record:
    return gather(
        prompts_of_triples(prompt_triples(samples)),
        Settings(samples=samples, seed=seed).picture_seeds(),
        bundle=with_noise(amount),
        reference=make_good_pictures,
        judge=judge,
        period=TRIPLES,
        batch=17,
        progress=lambda _: None,
    )


@pytest.fixture(scope="module")
def records(judge: Judge) -> dict[float, Record]:
    return {amount: run(judge, amount) for amount in (0.0, 0.02, 0.3)}


def test_statistics_survive_the_file(statistics: Statistics, judge_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    save_statistics(statistics, path, seed=5)
    first = path.read_bytes()
    save_statistics(statistics, path, seed=5)
    assert path.read_bytes() == first
    read = load_statistics(path, judge_path=judge_path)
    np.testing.assert_array_equal(read.real.covariance, statistics.real.covariance)
    np.testing.assert_array_equal(read.latents, statistics.latents)
    assert read.figures == statistics.figures
    assert read.real.count == 402
    assert statistics.latents.shape == (7, 4, 8, 8)


def test_statistics_of_real_pictures(statistics: Statistics, judge: Judge) -> None:
    assert statistics.figures["real_all"] > 0.4  # by chance 1/160
    assert statistics.figures["reconstructed_all"] < 0.3  # the autoencoder is untrained
    assert statistics.figures["reconstruction_frechet"] > 10 * 2 * statistics.figures["sampling_frechet"] / 402


def test_real_pictures_get_every_colour_and_background_equally_often() -> None:
    garments = np.random.default_rng(8).integers(3, size=3 * 7 * 16)
    triples = balanced_triples(garments, seed=9)
    np.testing.assert_array_equal(triples[:, 0], garments)
    counts = np.unique(triples, axis=0, return_counts=True)[1]
    assert len(counts) == 3 * 16
    for garment in range(3):
        each = np.unique(triples[garments == garment], axis=0, return_counts=True)[1]
        assert each.max() - each.min() <= 1
    assert (balanced_triples(garments, seed=10) != triples).any()


def test_statistics_of_another_judge_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    path, other = tmp_path / "statistics.safetensors", tmp_path / "judge.safetensors"
    save_statistics(statistics, path, seed=5)
    save_file({name: tensor.contiguous() for name, tensor in Judge(8).state_dict().items()}, other)
    with pytest.raises(InputError, match="another judge"):
        load_statistics(path, judge_path=other)


def test_damaged_files_are_refused(judge_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(judge_path.read_bytes()[:1000])
    with pytest.raises(InputError, match="judge's weights"):
        load_judge(broken)
    with pytest.raises(InputError, match="cannot be read"):
        load_statistics(broken, judge_path=judge_path)
    with pytest.raises(InputError, match="not found"):
        load_judge(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="format"):
        load_statistics(judge_path, judge_path=judge_path)


def test_equal_pictures_have_no_distance(records: dict[float, Record], statistics: Statistics) -> None:
    figures = run_figures(records[0.0], prompt_triples(323), statistics.real, np.arange(323))
    assert figures["paired.psnr_db"] == PSNR_CEILING_DB
    assert figures["paired.ssim"] == pytest.approx(1, rel=1e-9)
    assert figures["paired.feature_distance"] == 0
    assert figures["paired.frechet_to_reference"] < 1e-6
    assert {name for name in figures if name.startswith("change.") and figures[name] != 0} == set()
    assert figures["bundle.all"] > 0.4  # by chance 1/160


def test_damage_is_seen_by_every_paired_figure(records: dict[float, Record], statistics: Statistics) -> None:
    index, triples = np.arange(323), prompt_triples(323)
    little, much = (run_figures(records[amount], triples, statistics.real, index) for amount in (0.02, 0.3))
    assert little["paired.psnr_db"] == pytest.approx(-20 * np.log10(0.02), abs=3)  # half of it is clipped off
    assert much["paired.psnr_db"] < little["paired.psnr_db"] - 15
    assert much["paired.ssim"] < little["paired.ssim"]
    assert much["paired.feature_distance"] > 3 * little["paired.feature_distance"]
    assert much["paired.frechet_to_reference"] > 3 * little["paired.frechet_to_reference"]
    assert much["change.frechet_to_real"] > 0


def test_rows_carry_noise_floors_and_the_other_seed(records: dict[float, Record], statistics: Statistics) -> None:
    absolute, paired, method = summarize([records[0.02]], prompt_triples(323), statistics, period=TRIPLES)
    rows = {row.name: row for row in absolute}
    assert list(rows) == ["garment", "colour", "background", "all", "held_out", "frechet_to_real"]
    assert rows["garment"].real == statistics.figures["real_garment"]
    assert rows["frechet_to_real"].autoencoder == statistics.figures["reconstruction_frechet"]
    assert rows["frechet_to_real"].change is not None
    noise, change_noise = rows["frechet_to_real"].bundle.noise, rows["frechet_to_real"].change.noise
    assert noise is not None
    assert change_noise is not None
    assert 0 < change_noise < noise
    pairs = {row.name: row for row in paired}
    assert pairs["psnr_db"].worst is not None
    assert pairs["psnr_db"].worst_5_percent is not None
    assert pairs["psnr_db"].worst <= pairs["psnr_db"].worst_5_percent < pairs["psnr_db"].value.value
    assert pairs["psnr_db"].other_seed is not None
    assert pairs["psnr_db"].other_seed < pairs["psnr_db"].value.value
    assert pairs["frechet_to_reference"].other_seed is not None
    assert pairs["frechet_to_reference"].other_seed > pairs["frechet_to_reference"].value.value
    assert "jackknife" in method


def test_noise_over_real_seeds_is_of_the_estimate_s_size(judge: Judge, statistics: Statistics) -> None:
    runs = [run(judge, 0.1, samples=161, seed=seed) for seed in range(5)]
    triples = prompt_triples(161)
    _, measured, method = summarize(runs, triples, statistics, period=TRIPLES)
    _, estimated, _ = summarize(runs[:1], triples, statistics, period=TRIPLES)
    assert "5 runs" in method
    assert measured[0].value.noise == pytest.approx(estimated[0].value.noise, rel=0.9)


def test_without_a_reference_only_absolute_figures_remain(judge: Judge, statistics: Statistics) -> None:
    record = gather(
        prompts_of_triples(prompt_triples(11)),
        Settings(samples=11).picture_seeds(),
        bundle=make_good_pictures,
        reference=None,
        judge=judge,
        period=TRIPLES,
        batch=4,
        progress=lambda _: None,
    )
    absolute, paired, _ = summarize([record], prompt_triples(11), statistics, period=TRIPLES)
    assert paired == ()
    assert all(row.reference is None and row.change is None for row in absolute)


def test_json_has_null_for_what_is_not_finite() -> None:
    evaluation = Evaluation({}, None, Settings(), "", (), (), ())
    value = evaluation.to_json()
    assert value["settings"]["samples"] == 5000
    assert value["reference"] is None


def test_a_run_can_be_repeated(judge: Judge, statistics: Statistics, records: dict[float, Record]) -> None:
    again = run(judge, 0.02)
    index, triples = np.arange(323), prompt_triples(323)
    first = run_figures(records[0.02], triples, statistics.real, index)
    assert run_figures(again, triples, statistics.real, index) == first


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory, judge_path: Path, statistics: Statistics) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "judge.safetensors").write_bytes(judge_path.read_bytes())
    save_statistics(statistics, folder / "statistics.safetensors", seed=5)
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "tiny": write_whole_bundle(folder / "tiny", model="tiny"),
        "noisy": write_whole_bundle(folder / "noisy", model="tiny", noise=0.05),
        "noisier": write_whole_bundle(folder / "noisier", model="tiny", noise=0.5),
        "other": write_whole_bundle(folder / "other"),
    }


SHORT = Settings(samples=21, steps=3, guidance_scale=2.0)


def test_evaluation_of_bundles_end_to_end(bundles: dict[str, Path], models_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    arguments = {"models_folder": models_folder, "progress": lambda done, total: told.append((done, total))}
    found = evaluate(bundles["noisy"], bundles["tiny"], SHORT, **arguments)  # type: ignore[arg-type]
    again = evaluate(bundles["noisy"], bundles["tiny"], SHORT, models_folder=models_folder)
    assert found == again
    assert found.settings.batch == 4  # of eight rows, guidance takes two for each picture
    assert told[-1] == (21, 21)
    assert found.bundle["target"] == "ort-cpu"
    assert [row.name for row in found.paired] == ["psnr_db", "ssim", "feature_distance", "frechet_to_reference"]
    assert 10 < found.paired[0].value.value < 60
    assert len(found.epsilon) == 10
    assert all(row.error is not None and 0.005 < row.error < 0.2 for row in found.epsilon)
    worse = evaluate(bundles["noisier"], bundles["tiny"], SHORT, models_folder=models_folder)
    assert worse.paired[0].value.value < found.paired[0].value.value - 5
    for bad, good in zip(worse.epsilon, found.epsilon, strict=True):
        assert bad.error is not None
        assert good.error is not None
        assert bad.error > 3 * good.error


def test_a_bundle_against_itself_is_perfect(bundles: dict[str, Path], models_folder: Path) -> None:
    found = evaluate(bundles["tiny"], bundles["tiny"], SHORT, models_folder=models_folder)
    assert found.paired[0].value.value == PSNR_CEILING_DB
    assert all(row.error == 0 and row.bundle_loss == row.reference_loss for row in found.epsilon)
    assert all(row.change is not None and row.change.value == 0 for row in found.absolute)


def test_a_reference_is_drawn_without_shortcuts(bundles: dict[str, Path], models_folder: Path) -> None:
    some = replace(SHORT, guidance_steps=(1, 2))
    found = evaluate(bundles["tiny"], bundles["tiny"], some, models_folder=models_folder)
    assert found.paired[0].value.value < PSNR_CEILING_DB - 20
    assert "guidance 2, seed 0; the bundle's guided from step 1 to before 2" in format_evaluation(found)
    every = evaluate(bundles["tiny"], None, SHORT, models_folder=models_folder)
    assert [row.reference and row.reference.value for row in found.absolute] == [
        row.bundle.value for row in every.absolute
    ]


def test_without_a_judge_there_must_be_a_reference(bundles: dict[str, Path], models_folder: Path) -> None:
    with pytest.raises(InputError, match="can only be compared"):
        evaluate(bundles["other"], None, SHORT, models_folder=models_folder)
    found = evaluate(bundles["other"], bundles["tiny"], replace(SHORT, samples=5), models_folder=models_folder)
    assert found.absolute == ()
    assert [row.name for row in found.paired] == ["psnr_db", "ssim"]
    assert "need a judge" in format_evaluation(found)


def test_measured_noise_takes_runs_of_other_seeds(bundles: dict[str, Path], models_folder: Path) -> None:
    found = evaluate(bundles["tiny"], None, replace(SHORT, samples=8), models_folder=models_folder, noise_seeds=2)
    assert "3 runs" in found.noise_method
    assert found.paired == ()
    assert found.absolute[-1].bundle.noise is not None
    assert found.absolute[-1].bundle.noise > 0
    assert all(row.error is None and row.reference_loss is None for row in found.epsilon)
    assert "reference" not in format_evaluation(found)


def test_command(
    bundles: dict[str, Path],
    models_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out, grid = tmp_path / "out.json", tmp_path / "grid.png"
    arguments = [str(bundles["other"]), "--steps", "2", "--samples", "3", "--json", str(out), "--grid", str(grid)]
    assert command.run(parser.parse_args([*arguments, "--reference", str(bundles["other"])])) == 0
    captured = capsys.readouterr()
    assert "PSNR, dB" in captured.out
    assert "3 of 3 pictures" in captured.err
    value = json.loads(out.read_text())
    assert value["paired"][0]["value"]["value"] == PSNR_CEILING_DB
    assert value["settings"]["steps"] == 2
    guided = [*arguments, "--reference", str(bundles["other"]), "--guidance-steps", "1:2"]
    assert command.run(parser.parse_args(guided)) == 0
    assert "guided from step 1 to before 2" in capsys.readouterr().out
    with Image.open(grid) as picture:
        assert picture.size == (LABEL_WIDTH_PX + 2 * (6 * 68 + 12), 10 * 68)
        left = np.asarray(picture)[:, LABEL_WIDTH_PX : LABEL_WIDTH_PX + 6 * 68]
        assert left.std() > 20
    with pytest.raises(InputError, match="cannot be written"):
        command.run(parser.parse_args([*arguments, "--grid", str(tmp_path / "no/folder.png")]))
    with pytest.raises(InputError, match="--noise-seeds"):
        command.run(parser.parse_args([*arguments, "--noise-seeds", "-1"]))
