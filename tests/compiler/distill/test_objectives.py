"""The loss of a style's LoRA against its formula, and a run that learns with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdc.compiler.distill.consistency import Batch, Roles
from sdc.compiler.distill.distill import Reporting, distill_lora
from sdc.compiler.distill.objectives import DenoisingObjective
from sdc.compiler.distill.pictures import FolderPictures
from sdc.compiler.distill.settings import DENOISING, STYLE_OF_TINY, DistillSettings
from sdc.compiler.load import load_checkpoint
from sdc.compiler.load.lora import is_consistency_lora
from sdc.engines.errors import InputError
from sdc.engines.schedule import PREDICTION_TYPES
from sdc.engines.schedule_config import schedule_from_config

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SETTINGS = DistillSettings(
    rank=3, steps=60, batch=6, learning_rate=0.01, average_decay=0.9, objective=DENOISING, empty_captions=0.3
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_is_min_snr(prediction_type: str) -> None:
    schedule = schedule_from_config({**CONFIG, "prediction_type": prediction_type})
    objective = DenoisingObjective(schedule, SETTINGS, torch.device("cpu"))
    assert objective.levels == 1000
    steps, clean, noise = torch.tensor([3, 250, 700]), draw(1, 3, 5, 4, 6), draw(2, 3, 5, 4, 6)
    scale = torch.tensor(0.4, requires_grad=True)
    seen: list[tuple[Tensor, Tensor]] = []

    def student(sample: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        seen.append((timesteps, states))
        return scale * sample

    def never(sample: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        raise AssertionError("only the student learns to denoise")

    conditional, unconditional = draw(3, 3, 7, 11), draw(4, 1, 7, 11).expand(3, -1, -1)
    batch = Batch(clean, noise, steps, torch.ones(3), conditional, unconditional)
    loss = objective.loss(Roles(never, never, student), batch)
    assert torch.equal(seen[0][0], steps)
    assert torch.equal(seen[0][1], conditional)

    betas = np.linspace(CONFIG["beta_start"] ** 0.5, CONFIG["beta_end"] ** 0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)[steps.numpy()]
    alpha, sigma, snr = signal**0.5, (1 - signal) ** 0.5, signal / (1 - signal)
    x0, epsilon = clean.double().numpy(), noise.double().numpy()
    errors = []
    for row in range(3):
        x = alpha[row] * x0[row] + sigma[row] * epsilon[row]
        output = 0.4 * x
        # Source: Hang et al., arXiv:2303.09556, equation 8, and Salimans and Ho, arXiv:2202.00512, for v.
        wanted = {
            "epsilon": (epsilon[row], min(snr[row], 5) / snr[row]),
            "v_prediction": (alpha[row] * epsilon[row] - sigma[row] * x0[row], min(snr[row], 5) / (snr[row] + 1)),
            "sample": (x0[row], min(snr[row], 5)),
        }
        target, weight = wanted[prediction_type]
        errors.append(weight * np.square(output - target).mean())
    assert loss.item() == pytest.approx(np.mean(errors), rel=2e-4)
    loss.backward()
    assert scale.grad is not None
    assert scale.grad.item() != 0


def train(model: Path, pictures: Path, work: Path, settings: DistillSettings) -> list[float]:
    distill_lora(
        load_checkpoint(str(model)),
        FolderPictures(pictures, size_px=(40, 40)),
        settings,
        out=work.with_suffix(".safetensors"),
        reporting=Reporting(work, ["one prompt"], grid_every=100),
    )
    return [json.loads(line)["loss"] for line in (work / "losses.jsonl").read_text().splitlines()]


def test_a_run_learns_and_is_not_taken_for_one_of_few_steps(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    learning = train(model, picture_folder, tmp_path / "learning", SETTINGS)
    still = train(model, picture_folder, tmp_path / "still", dataclasses.replace(SETTINGS, learning_rate=1e-12))
    assert learning[0] == still[0]
    assert sum(learning[-15:]) < 0.8 * sum(still[-15:])
    assert (tmp_path / "learning/grid-000060.png").is_file()
    assert not is_consistency_lora(tmp_path / "learning.safetensors")


def test_empty_captions_change_the_loss(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    few = dataclasses.replace(SETTINGS, steps=2)
    some = train(model, picture_folder, tmp_path / "some", few)
    none = train(model, picture_folder, tmp_path / "none", dataclasses.replace(few, empty_captions=0.0))
    assert some != none


def test_the_recipe_of_the_style_is_one() -> None:
    assert STYLE_OF_TINY.objective == DENOISING
    assert STYLE_OF_TINY.empty_captions > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "beauty"}, "unknown objective 'beauty'; choose consistency or denoising"),
        ({"empty_captions": 1.0}, "share of empty captions must be in 0 to 1, found 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SETTINGS, **change)  # type: ignore[arg-type]
