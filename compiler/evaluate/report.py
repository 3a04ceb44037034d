"""An evaluation as text."""

from __future__ import annotations

from sdc.compiler.evaluate.epsilon import EpsilonRow
from sdc.compiler.evaluate.evaluation import AbsoluteRow, Evaluation, Figure, PairedRow
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.text_table import format_table

TITLES = {
    "garment": "right garment, %",
    "colour": "right colour, %",
    "background": "right background, %",
    "all": "all three right, %",
    "held_out": "all right, unseen pairs, %",
    "frechet_to_real": "Fréchet to real pictures",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "feature_distance": "feature distance",
    "frechet_to_reference": "Fréchet to reference",
}
"""What the tables call a figure; accuracies are shown in percent."""

DECIMALS = {"frechet_to_real": 3, "psnr_db": 2, "ssim": 5, "feature_distance": 4, "frechet_to_reference": 4}
"""Of figures that are no percentages, which have two."""


def format_evaluation(evaluation: Evaluation) -> str:
    """Tables of all figures, each with its noise and its floors, and what they mean."""
    parts = [_heading(evaluation)]
    if evaluation.absolute:
        parts.append(_absolute_table(evaluation.absolute))
    if evaluation.paired:
        parts.append(_paired_table(evaluation.paired))
    if not evaluation.absolute:
        model = evaluation.bundle["model"]
        parts.append(f"Accuracies and Fréchet distances need a judge, which there is for tiny, not for {model}.")
    parts.append(_epsilon_table(evaluation.epsilon))
    return "\n\n".join(parts)


def _heading(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    how = f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}, seed {settings.seed}"
    if settings != settings.without_shortcuts():
        how += f"; the bundle's {_shortcuts(settings)}"
    lines = [f"bundle     {_name(evaluation.bundle)}"]
    if evaluation.reference is not None:
        lines.append(f"reference  {_name(evaluation.reference)}")
    return "\n".join([*lines, f"{settings.samples} pictures: {how}", f"±: {evaluation.noise_method}"])


def _shortcuts(settings: Settings) -> str:
    parts = []
    if settings.guidance_steps is not None:
        parts.append("guided from step {} to before {}".format(*settings.guidance_steps))
    if settings.deepcache_center is not None:
        parts.append(f"with DeepCache {settings.deepcache} around step {settings.deepcache_center}")
    elif settings.deepcache != 1:
        parts.append(f"with DeepCache {settings.deepcache}")
    return ", ".join(parts)


def _name(description: dict[str, str]) -> str:
    return "{path} ({model}, {precision}, target {target})".format(**description)


def _absolute_table(rows: tuple[AbsoluteRow, ...]) -> str:
    compared = any(row.reference is not None for row in rows)
    table = format_table(
        [
            "pictures against their prompts",
            "bundle",
            *(("reference", "change") if compared else ()),
            "real pictures",
            "autoencoder",
        ],
        [
            [
                TITLES[row.name],
                _figure(row.name, row.bundle),
                *_against_reference(row, compared=compared),
                _number(row.name, row.real),
                _number(row.name, row.autoencoder),
            ]
            for row in rows
        ],
    )
    return f"{table}\nThe autoencoder's column is for real pictures, encoded and decoded: the floor of any UNet."


def _against_reference(row: AbsoluteRow, *, compared: bool) -> list[str]:
    return [_figure(row.name, row.reference), _figure(row.name, row.change, signed=True)] if compared else []


def _paired_table(rows: tuple[PairedRow, ...]) -> str:
    table = format_table(
        ["pictures against the reference's", "same seeds", "worst 5 %", "worst", "other seeds"],
        [
            [
                TITLES[row.name],
                _figure(row.name, row.value),
                _number(row.name, row.worst_5_percent),
                _number(row.name, row.worst),
                _number(row.name, row.other_seed),
            ]
            for row in rows
        ],
    )
    return (
        f"{table}\nOther seeds: the reference against itself with the same prompts and other seeds. "
        "Feature distance 1: as far as two arbitrary pictures."
    )


def _epsilon_table(rows: tuple[EpsilonRow, ...]) -> str:
    if all(row.reference_loss is None for row in rows):
        return format_table(
            ["UNet at timestep", "bundle's loss"], [[str(row.timestep), f"{row.bundle_loss:.5f}"] for row in rows]
        )
    return format_table(
        ["UNet at timestep", "error, %", "bundle's loss", "reference's loss"],
        [
            [
                str(row.timestep),
                "" if row.error is None else _with_noise(100 * row.error, row.noise, decimals=3, scale=100),
                f"{row.bundle_loss:.5f}",
                "" if row.reference_loss is None else f"{row.reference_loss:.5f}",
            ]
            for row in rows
        ],
    )


def _figure(name: str, figure: Figure | None, *, signed: bool = False) -> str:
    if figure is None:
        return ""
    scale = 1 if name in DECIMALS else 100
    return _with_noise(
        scale * figure.value, figure.noise, decimals=DECIMALS.get(name, 2), scale=scale, sign="+" if signed else ""
    )


def _with_noise(value: float, noise: float | None, *, decimals: int, scale: float, sign: str = "") -> str:
    tail = "" if noise is None else f" ± {scale * noise:.{decimals}f}"
    return f"{value:{sign}.{decimals}f}{tail}"


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f"{value if name in DECIMALS else 100 * value:.{DECIMALS.get(name, 2)}f}"
