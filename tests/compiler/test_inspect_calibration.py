"""`sdc inspect` of a calibration, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_denoiser import make_feeds, make_fused_denoiser, measure_table

from sdc.compiler.cli import main
from sdc.passes.precision.range_rules import RangeRule


@pytest.fixture
def file(tmp_path: Path) -> Path:
    table = measure_table(make_fused_denoiser(), make_feeds()).with_ranges([RangeRule("mse")])
    first = next(iter(table.tensors))
    each = table.tensors[first]
    # Three timesteps, over which one tensor grows fourfold.
    tensors = {
        name: replace(value, minima=value.minima * 3, maxima=value.maxima * 3) for name, value in table.tensors.items()
    }
    low, high = each.minima[0], each.maxima[0]
    tensors[first] = replace(each, minima=(low / 4, low / 2, low), maxima=(high / 4, high / 2, high))
    path = tmp_path / "unet.json"
    table = replace(table, timesteps=(900.0, 500.0, 1.0), tensors=tensors)
    path.write_text(json.dumps(table.to_json()), encoding="utf-8")
    return path


def test_text_names_drift_outliers_and_timesteps(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "1 prompts from seed 3, ddim, 3 timesteps" in text
    assert "ranges stored for: mse, symmetric" in text
    assert ": 4 x" in text
    assert "  1: 100.0% (evenly spread:" in text


def test_json_and_page(file: Path, tmp_path: Path):
    assert main(["inspect", str(file), "--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "a.html")]) == 0
    value = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert value["choices"][0]["timesteps"] == [1.0]
    assert set(value["tensors"]) == set(value["ranges"]["mse, symmetric"])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("<svg") == min(12, len(value["tensors"]))
    assert 'id="drift"' in page


def test_what_is_no_calibration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "other.json"
    path.write_text("{}", encoding="utf-8")
    assert main(["inspect", str(path)]) == 2
    assert "is no calibration" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--report", str(tmp_path / "a.html")]) == 2
    assert "--report is for calibrations" in capsys.readouterr().err
