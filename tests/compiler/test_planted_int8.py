"""int8 survives what a small model does not have by nature: outlier channels cost it less than 2 dB."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import sdc.compiler
from sdc.compiler.calibration.options import CalibrationOptions
from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.evaluate import evaluate
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.tiny.outliers import plant_outliers
from sdc.engines.targets import parse_targets

SETTINGS = Settings(samples=16, guidance_scale=1.9)
ALLOWED_LOSS_DB = 2.0
UNSMOOTHED_LOSS_DB = 10.0
"""Without SmoothQuant it is far more: the outliers are there."""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "ort-cpu"])
def test_planted_outliers_cost_little(tmp_path: Path, target: str) -> None:
    trained = Path(sdc.compiler.__file__).parent / "models" / "tiny"
    planted = tmp_path / "planted" / "tiny"
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    plant_outliers(pipeline.unet, seed=0)
    pipeline.save_pretrained(planted)

    def export(source: str, precision: str, calibration: CalibrationOptions) -> Path:
        out = tmp_path / f"{Path(source).parent.name}-{precision}-{calibration.smoothing}"
        request = ExportRequest(
            Source(source), PrecisionRequest(precision), parse_targets(target), out, calibration=calibration
        )
        export_bundle(request)
        return out

    default = CalibrationOptions()
    reference = export("tiny", "fp32", default)

    def psnr_db(bundle: Path) -> float:
        rows = evaluate(bundle, reference, SETTINGS).paired
        return next(row.value.value for row in rows if row.name == "psnr_db")

    assert psnr_db(export(str(planted), "fp32", default)) > 90  # the same function
    plain = psnr_db(export("tiny", "int8", default))
    assert psnr_db(export(str(planted), "int8", default)) > plain - ALLOWED_LOSS_DB
    assert psnr_db(export(str(planted), "int8", CalibrationOptions(smoothing=None))) < plain - UNSMOOTHED_LOSS_DB
