"""What targets run, what a request stands for, and plans that go through a whole export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from minimal_pipeline import save_minimal_pipeline
from small_denoiser import make_fused_denoiser

from sdc.compiler.calibration.options import CalibrationOptions
from sdc.compiler.cli.export import summary_json
from sdc.compiler.compile import export_bundle
from sdc.compiler.export_plan import ExportRequest, component_precision, formats_on
from sdc.compiler.precision.budget import parse_budget
from sdc.compiler.precision.capabilities import check_formats, runnable_formats
from sdc.compiler.precision.planning import AUTO, PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.workshop.cache import StageCache
from sdc.engines.errors import InputError, TargetError
from sdc.engines.targets import TARGETS, parse_targets
from sdc.passes.pipeline import MIXED
from sdc.passes.precision.formats import Format
from sdc.passes.precision.plan import uniform_plan
from sdc.passes.precision.plan_file import read_plan


@pytest.mark.parametrize(
    ("target", "wanted", "message"),
    [
        ("cpu", Format.FP8, "does not run fp8; the nearest that it runs is int8$"),
        ("ort-cuda", Format.INT8, "does not run int8; the nearest that it runs is fp16$"),
        ("ort-cuda", Format.W4, "does not run w4; the nearest that it runs is fp16$"),
        ("ort-cuda", Format.FP8, "does not run fp8; the nearest that it runs is fp16$"),
        ("ort-cpu", Format.BF16, "does not run bf16; the nearest that it runs is fp16$"),
        ("rtx", Format.FP8, r"does not run fp8; the nearest that it runs is int8, and sm89\+sm120 would run it"),
        ("sm75", Format.W4, "does not run w4; the nearest that it runs is w8$"),
        ("sm75", Format.BF16, "the nearest that it runs is fp16$"),
        ("sm75", Format.FP32, "the nearest that it runs is fp16$"),
    ],
)
def test_what_a_target_does_not_run_has_a_nearest(target: str, wanted: Format, message: str):
    with pytest.raises(TargetError, match=message):
        check_formats(TARGETS[target], [Format.FP16, wanted])


def test_what_targets_run():
    assert runnable_formats(TARGETS["sm89"]) == set(Format)
    assert runnable_formats(parse_targets("sm75+sm89")[0]) == runnable_formats(TARGETS["sm75"])
    assert runnable_formats(TARGETS["ort-cuda"]) == {Format.FP32, Format.FP16}
    for target in TARGETS.values():
        check_formats(target, [Format.FP16])
        if target != TARGETS["ort-cuda"]:
            check_formats(target, [Format.INT8, Format.W8])


@pytest.mark.parametrize("name", ["int7", MIXED, AUTO])
def test_requests_that_mean_nothing_are_refused(name: str):
    with pytest.raises(InputError):
        PrecisionRequest(name)


def test_budget_beside_a_single_precision_is_refused():
    with pytest.raises(InputError, match="takes no --quality-budget"):
        PrecisionRequest("int8", budget=parse_budget("35dB"))


def test_plan_beside_a_single_precision_is_refused():
    with pytest.raises(InputError, match="do not go together"):
        PrecisionRequest("int8", uniform_plan(make_fused_denoiser(), Format.INT8))


def test_what_a_request_stands_for():
    assert PrecisionRequest("w4").formats() == {Format.W4, Format.FP16}
    assert not PrecisionRequest("w4").calibrates
    assert PrecisionRequest("fp8").calibrates
    cpu, other = TARGETS["cpu"], TARGETS["ort-cpu"]
    assert component_precision("vae_decoder", PrecisionRequest("int8"), other) == "fp16"
    assert component_precision("vae_decoder", PrecisionRequest("int8"), cpu) == "bf16"
    assert component_precision("unet", PrecisionRequest("int8"), cpu) == "int8"
    assert component_precision("vae_decoder", PrecisionRequest("fp16"), cpu) == "fp16"
    assert component_precision("vae_decoder", PrecisionRequest("bf16"), other) == "bf16"
    plan = uniform_plan(make_fused_denoiser(), Format.INT8, default=Format.BF16)
    mixed = PrecisionRequest(MIXED, plan)
    assert component_precision("vae_decoder", mixed, cpu) == "bf16"
    # ONNX Runtime computes in float32 what a quantised graph leaves alone.
    assert Format.BF16 not in formats_on(TARGETS["ort-cpu"], mixed)
    assert Format.BF16 in formats_on(TARGETS["ort-cpu"], PrecisionRequest("bf16"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageCache, str]:
    """A folder with a w8 bundle, the cache of its stages, and the model."""
    folder = tmp_path_factory.mktemp("plans")
    (folder / "model").mkdir()
    model = save_minimal_pipeline(folder / "model")
    cache = StageCache(folder / "cache")
    request = ExportRequest(
        Source(str(model)), PrecisionRequest("w8"), parse_targets("ort-cpu,cpu"), folder / "w8", hoist=False
    )
    summary = export_bundle(request, cache=cache)
    sizes = summary_json(summary)["engine_bytes"]
    assert set(sizes) == {"ort-cpu", "cpu"}
    assert sizes["cpu"]["unet"] == sum(each.stat().st_size for each in (folder / "w8" / "unet").glob("openvino*"))
    return folder, cache, str(model)


def test_edited_plan_goes_through_an_export(exported: tuple[Path, StageCache, str]):
    folder, cache, model = exported
    path = folder / "w8" / "precision" / "unet.toml"
    plan = read_plan(path)
    assert plan.formats() == {Format.W8}
    name = plan.layers[-1].name
    lines = path.read_text(encoding="utf-8").splitlines()
    edited = [line.replace('precision = "w8"', 'precision = "fp32"') if f'"{name}"' in line else line for line in lines]
    assert edited != lines
    (folder / "edited.toml").write_text("\n".join(edited), encoding="utf-8")
    request = ExportRequest(
        Source(model),
        PrecisionRequest(MIXED, read_plan(folder / "edited.toml")),
        parse_targets("ort-cpu,cpu"),
        folder / "mixed",
        hoist=False,
    )
    summary = export_bundle(request, cache=cache)
    assert summary.manifest.precision == MIXED
    written = read_plan(folder / "mixed" / "precision" / "unet.toml")
    assert written.by_name()[name].format is Format.FP32
    assert np.array_equal([each.name for each in written.layers], [each.name for each in plan.layers])


def test_automatic_plan_keeps_to_its_budget(exported: tuple[Path, StageCache, str]):
    pytest.importorskip("tensorrt_rtx")
    folder, cache, model = exported
    request = ExportRequest(
        Source(model),
        PrecisionRequest(AUTO, budget=parse_budget("50dB")),
        parse_targets("sm89"),
        folder / "auto",
        hoist=False,
    )
    summary = export_bundle(request, cache=cache)
    assert summary.manifest.precision == AUTO
    plan = read_plan(folder / "auto" / "precision" / "unet.toml")
    assert Format.INT8 in plan.formats()
    searched = [layer for layer in plan.layers if layer.format is not Format.W8]
    assert len(searched) > 0
    assert all("alone it changes epsilon by" in layer.reason for layer in searched)
    (entry,) = cache.root.glob("plan/*/entry.json")
    result = json.loads(entry.read_text(encoding="utf-8"))["result"]
    assert (result["measure"], result["limit"], result["chosen"]) == ("psnr", 50.0, "mixed")
    assert result["quality"] >= 50


def test_automatic_plan_decides_over_all_components(exported: tuple[Path, StageCache, str]):
    """A VAE in float16 that is in the cache must not take the place of one in float32."""
    folder, cache, model = exported

    def export(name: str) -> dict[str, Any]:
        # OpenVINO computes float16 graphs in bfloat16 or float16, neither of which keeps to so much.
        request = ExportRequest(
            Source(model),
            PrecisionRequest(AUTO, budget=parse_budget("99.9dB")),
            parse_targets("cpu,ort-cpu"),
            folder / name,
            hoist=False,
        )
        export_bundle(request, cache=cache)
        assert read_plan(folder / name / "precision" / "unet.toml").default is Format.FP32
        report = json.loads((folder / name / "reports" / "export.json").read_text(encoding="utf-8"))
        return dict(report["automatic"]["unet"])

    found = export("exact")
    types = {name: weight_types(folder / name / "vae_decoder" / "openvino_model.xml") for name in ("w8", "exact")}
    assert "f16" in types["w8"]
    assert "f16" not in types["exact"]
    assert found["candidates"]["fp16"]["quality"] < 99.9
    assert found["candidates"]["fp16"]["step_seconds"] is None
    assert found["candidates"]["fp32"]["quality"] == 100
    assert {"fp32", "int8"} <= found["candidates"].keys()
    chosen = found["candidates"][found["chosen"]]
    assert chosen["quality"] >= 99.9
    assert chosen["step_seconds"].keys() == {"cpu", "ort-cpu"}

    # Whatever is missing later is built for the same choice, not for one made anew.
    for entry in cache.root.glob("build/*"):
        shutil.rmtree(entry)
    assert export("again") == found


def weight_types(path: Path) -> set[str]:
    """Of OpenVINO's constants; ONNX Runtime's engines store the small weights of this network in float32."""
    constants = ElementTree.parse(path).getroot().iterfind("layers/layer[@type='Const']/data")
    return {each.attrib["element_type"] for each in constants}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["40dB", "fd=0.05"])
def test_automatic_plan_is_timed_where_the_target_runs(tmp_path: Path, budget: str):
    """No layer of the reduced network need be faster in integers; of `tiny`'s most are, on an idle machine."""
    cache = StageCache(tmp_path / "cache")
    request = ExportRequest(
        Source("tiny"), PrecisionRequest(AUTO, budget=parse_budget(budget)), parse_targets("ort-cpu"), tmp_path / "auto"
    )
    export_bundle(request, cache=cache)
    plan = read_plan(tmp_path / "auto" / "precision" / "unet.toml")
    (entry,) = cache.root.glob("plan/*/entry.json")
    result = json.loads(entry.read_text(encoding="utf-8"))["result"]
    assert (Format.INT8 in plan.formats()) == (result["chosen"] != "fp32")
    assert parse_budget(budget).allows(result["quality"])
    report = json.loads((tmp_path / "auto" / "reports" / "export.json").read_text(encoding="utf-8"))
    assert report["automatic"]["unet"] == result
    assert result["candidates"].keys() == {"fp32", "mixed", "int8"}
    seconds = {name: each["step_seconds"]["ort-cpu"] for name, each in result["candidates"].items()}
    assert seconds[result["chosen"]] <= 1.03 * min(seconds.values())


def test_plan_of_another_model_stops_the_export(exported: tuple[Path, StageCache, str]):
    folder, cache, model = exported
    request = ExportRequest(
        Source(model),
        PrecisionRequest(MIXED, uniform_plan(make_fused_denoiser(), Format.W8)),
        parse_targets("ort-cpu"),
        folder / "other",
    )
    with pytest.raises(InputError, match="belongs to the graph"):
        export_bundle(request, cache=cache)
    assert not (folder / "other").exists()


def test_calibration_of_another_graph_stops_the_export(exported: tuple[Path, StageCache, str]):
    folder, cache, model = exported

    def export(name: str, calibration: CalibrationOptions, *, fuse: bool = True) -> None:
        request = ExportRequest(
            Source(model),
            PrecisionRequest("int8"),
            parse_targets("ort-cpu"),
            folder / name,
            hoist=False,
            fuse=fuse,
            calibration=calibration,
        )
        export_bundle(request, cache=cache)

    export("int8", CalibrationOptions(steps=2))
    given = CalibrationOptions(table_file=folder / "int8" / "calibration" / "unet.json")
    export("again", given)
    for file in ("model.onnx", "model.onnx_data"):
        assert (folder / "again" / "unet" / file).read_bytes() == (folder / "int8" / "unet" / file).read_bytes()
    with pytest.raises(InputError, match=r"unet\.json: the calibration table belongs to the graph"):
        export("other", given, fuse=False)
    assert not (folder / "other").exists()
