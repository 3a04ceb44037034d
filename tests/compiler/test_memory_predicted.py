"""What `sdc plan` says beside what a process that is `sdc run` takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from minimal_pipeline import save_minimal_pipeline

from sdc.compiler.cli import main
from sdc.compiler.memory.engine_plan import Request
from sdc.compiler.memory.measure import measure_run
from sdc.compiler.memory.picture_plan import plan_pictures
from sdc.engines.bundle import open_bundle

pytestmark = pytest.mark.slow

TOLERANCE = 0.1
"""The aim of docs/memory.md, for whole processes."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random networks whose weights take far more than the libraries, and a text encoder that counts."""
    folder = tmp_path_factory.mktemp("wide")
    model = save_minimal_pipeline(folder, guidance_width=None, widening=32, text_layers=12)
    arguments = ["--precision", "fp32", "--target", "cpu", "--out", str(folder / "bundle")]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SDC_CACHE", str(folder / "cache"))
        assert main(["export", "--model", str(model), *arguments]) == 0
    return folder / "bundle"


def test_run_takes_what_is_planned_where_engines_are_loaded_in_turn(bundle: Path) -> None:
    request = Request(40, 40, 1, 5.0, prefetch=False)
    plan = plan_pictures(open_bundle(bundle), "cpu", request)
    assert plan.process_bytes is not None
    assert plan.released_bytes > 2 * plan.process_bytes, "else the libraries would decide"
    measured = measure_run(bundle, "cpu", request, steps=1)
    assert plan.run_bytes == pytest.approx(measured, rel=TOLERANCE), f"{plan.run_bytes / measured:.3f} of {measured}"


def test_run_takes_no_more_than_is_planned_where_the_unet_is_loaded_ahead(bundle: Path) -> None:
    """How much of it, the machine's load decides: the text encoder may be gone before the UNet has its weights."""
    opened, request = open_bundle(bundle), Request(40, 40, 1, 5.0)
    ahead = plan_pictures(opened, "cpu", request).run_bytes
    in_turn = plan_pictures(opened, "cpu", replace(request, prefetch=False)).run_bytes
    assert ahead > (1 + TOLERANCE) * in_turn, "else there would be nothing to tell"
    assert (1 - TOLERANCE) * in_turn <= measure_run(bundle, "cpu", request, steps=1) <= (1 + TOLERANCE) * ahead
