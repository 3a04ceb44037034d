"""`sdc optimize` on graphs of other exporters: fused, equal, and never half written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdc.compiler.cli import main

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from equality import FP32, relative_error, run_model
from exported_graphs import feed, load_graph


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small autoencoder's decoder, with its weights in a file beside it."""
    path = tmp_path_factory.mktemp("source") / "decoder.onnx"
    ir.save(load_graph("vae_decoder"), path, external_data="decoder.onnx_data")
    return path


def whole(path: Path) -> ir.Model:
    return ir.external_data.load_to_model(ir.load(path))


@pytest.mark.parametrize("target", [None, "ort-cpu", "cpu", "rtx"])
def test_optimised_file_computes_the_same_with_fewer_nodes(source: Path, tmp_path: Path, target: str | None) -> None:
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    options = [] if target is None else ["--target", target]
    assert main(["optimize", str(source), "-o", str(out), "--report", str(report), *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx_data", "report.json"]
    feeds = feed("vae_decoder")
    expected = run_model(whole(source), feeds)
    optimised = whole(out)
    assert relative_error(optimised, expected, feeds) <= FP32
    fused = {node.op_type for node in optimised.graph if node.domain == "sdc"}
    assert ("AddGroupNormSilu" in fused) == (target is None)
    value = json.loads(report.read_text())
    assert value["nodes_after"] == len(optimised.graph)
    passes = {each["name"]: each["matched"] for each in value["phases"]["fusion"]}
    assert passes["fuse-add-group-norm-silu"] == 9
    assert ("lowering" in value["phases"]) == (target is not None)
    if target is None:
        assert value["nodes_after"] < 0.6 * value["nodes_before"]


@pytest.mark.parametrize("target", [None, "cpu"])
def test_low_ranks_make_the_file_smaller_and_change_its_results(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str | None
) -> None:
    """The more energy weights keep, the less; every layer is in the report, split or with the reason."""
    feeds, reports, errors = feed("vae_decoder"), {}, []
    expected = run_model(whole(source), feeds)
    for energy in ("0.8", "0.999"):
        out, report = tmp_path / f"{energy}.onnx", tmp_path / f"{energy}.json"
        options = [] if target is None else ["--target", target]
        command = ["optimize", str(source), "-o", str(out), "--report", str(report), "--low-rank", energy, *options]
        assert main(command) == 0
        errors.append(relative_error(whole(out), expected, feeds))
        reports[energy] = json.loads(report.read_text())["phases"]["low rank"][0]
        layers = (reports[energy]["details"] or {"layers": {}})["layers"].values()
        before, after = (sum(each[f"weights_{when}"] for each in layers) for when in ("before", "after"))
        line = f"low rank: {len(layers)} of 33 layers are two each, of {before:,} weights {after:,} are left"
        printed = capsys.readouterr().out
        assert f"{line}; --report says why others are not" in printed
        assert "factorise-weights left" not in printed
        assert len(reports[energy]["skipped"]) == 33 - len(layers)
        assert all("takes no fewer multiply-adds" in each["reason"] for each in reports[energy]["skipped"])
        assert after < before or not layers
        assert all(each["energy_lost"] <= 1.001 * (1 - float(energy)) for each in layers)
    assert reports["0.8"]["matched"] > reports["0.999"]["matched"]
    assert errors[0] > 10 * errors[1]
    assert (tmp_path / "0.8.onnx_data").stat().st_size < 0.9 * source.with_name("decoder.onnx_data").stat().st_size


def test_unusable_requests_write_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model at all")
    out = str(tmp_path / "out.onnx")
    for arguments, message in (
        (["optimize", str(tmp_path / "no.onnx"), "-o", out], "is no ONNX model"),
        (["optimize", str(source), "-o", str(source)], "is the file to optimise"),
        (["optimize", str(source), "-o", str(tmp_path)], "is a folder; name a file"),
        (["optimize", str(source), "-o", out, "--report", str(source)], "is the source; choose another --report"),
        (["optimize", str(source), "-o", out, "--report", out], "is the result; choose another --report"),
        (["optimize", str(source), "-o", out, "--report", f"{out}_data"], "is the result's weights"),
        (["optimize", str(tmp_path / "none.onnx"), "-o", out], "none.onnx is missing; give an .onnx file"),
        (["optimize", str(source), "-o", str(tmp_path / "missing" / "out.onnx")], "no such folder"),
        (["optimize", str(source), "-o", out, "--target", "cpu,rtx"], "2 targets were given"),
        (["optimize", str(source), "-o", out, "--target", "toaster"], "unknown target"),
        (
            ["optimize", str(source), "-o", out, "--low-rank", "1"],
            "must be between 0 and 1, found 1.0; give for example",
        ),
        (["optimize", str(source), "-o", out, "--low-rank", "nan"], "must be between 0 and 1, found nan"),
    ):
        assert main(arguments) != 0
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["no.onnx"]


def test_weights_of_the_source_are_not_overwritten(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = source.rename(source.with_name("original.onnx"))
    try:
        assert main(["optimize", str(renamed), "-o", str(source)]) != 0
        assert "holds those of" in capsys.readouterr().err
        assert not source.exists()
    finally:
        renamed.rename(source)
    assert np.isfinite(run_model(whole(source), feed("vae_decoder"))["sample"]).all()
