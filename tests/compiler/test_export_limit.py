"""`sdc export --memory-limit`: what is told when it is kept, and what stays when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from minimal_pipeline import save_minimal_pipeline

from sdc.compiler.cli import main
from sdc.compiler.workshop.memory_watch import resident_tree


def test_export_keeps_the_old_bundle_where_the_limit_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDC_CACHE", str(tmp_path / "cache"))
    model, out = save_minimal_pipeline(tmp_path), tmp_path / "bundle"
    command = ["export", "--model", str(model), "--precision", "fp32", "--target", "ort-cpu", "--out", str(out)]
    assert main([*command, "--memory-limit", "1000GB", "--json"]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    stages = {stage["name"]: stage["held_bytes"] for stage in summary["stages"]}
    assert summary["memory_limit_bytes"] == 10**12
    assert summary["held_bytes"] == stages[summary["held_in_stage"]] == max(stages.values())
    assert resident_tree().held_bytes // 2 < summary["held_bytes"] < 10**11
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([*command, "--seed", "2", "--weights", "random", "--memory-limit", "20MiB"]) == 1
    assert "the stage 'load' needs more memory than 20 MiB: it held" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if "bundle" in path.name and path != out and path.is_dir()]
