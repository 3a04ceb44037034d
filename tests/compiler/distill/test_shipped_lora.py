"""The LoRA of `tiny` that ships, by the judge: few steps of LCM are nearly as good as twenty of DDIM."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.evaluate import evaluate
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.engines.targets import parse_targets

SAMPLES = 500


def figures(bundle: Path, sampler: str, steps: int, guidance: float) -> dict[str, float]:
    settings = Settings(samples=SAMPLES, sampler=sampler, steps=steps, guidance_scale=guidance)
    return {each.name: each.bundle.value for each in evaluate(bundle, None, settings).absolute}


@pytest.mark.slow
def test_few_steps_are_nearly_as_good_as_twenty(tmp_path: Path) -> None:
    plain, distilled = tmp_path / "plain", tmp_path / "lcm"
    for folder, loras in ((plain, ()), (distilled, ("tiny-lcm",))):
        request = ExportRequest(Source("tiny", loras=loras), PrecisionRequest("fp32"), parse_targets("cpu"), folder)
        export_bundle(request)
    full, short = figures(plain, "ddim", 20, 1.9), figures(plain, "ddim", 2, 1.9)
    four, two = figures(distilled, "lcm", 4, 1.0), figures(distilled, "lcm", 2, 1.0)
    noise = 0.9  # of a difference of two Fréchet distances of 500 pictures, over seeds
    for few in (four, two):
        assert few["frechet_to_real"] < full["frechet_to_real"] + 1 + noise < short["frechet_to_real"] - 10
        assert few["colour"] > full["colour"] - 0.02 > short["colour"] + 0.2
        assert few["garment"] > full["garment"] - 0.05 > short["garment"] + 0.1
