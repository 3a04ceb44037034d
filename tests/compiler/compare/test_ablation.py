"""What every pass is worth: a row for each that changes the lowered graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from broken_passes import ChangeEpsilon, Rename

from sdc.compiler.compare import ablation as ablation_module
from sdc.compiler.compare.ablation import ablate
from sdc.compiler.compare.exported import ExportedGraph
from sdc.compiler.compare.pass_report import format_ablation
from sdc.compiler.compare.variants import Phase, build_variants, phases_before_lowering
from sdc.engines.targets import TARGETS


def test_only_passes_that_change_the_lowered_graph_get_a_row(graph: ExportedGraph, tmp_path: Path) -> None:
    phases = [Phase("x", (Rename(), ChangeEpsilon(), Rename(), ChangeEpsilon()))]
    found = build_variants(graph, phases, TARGETS["ort-cpu"], tmp_path)
    assert [row.passes for row in found.rows] == [(), ("x: rename", "x: change-epsilon")]
    assert found.idle == ("x: rename", "x: change-epsilon")
    assert all(row.source is not None and row.engine_bytes > 0 for row in found.rows)


def test_what_runs_nowhere_is_not_built(graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdc.compiler.compare.variants.runnable", lambda _: "there is no GPU")
    found = build_variants(graph, [Phase("x", (ChangeEpsilon(),))], TARGETS["rtx"], tmp_path)
    assert [row.source for row in found.rows] == [None, None]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["cpu", "ort-cpu"])
def test_an_ablation_has_a_row_for_each_fusion(decoder: ExportedGraph, target: str) -> None:
    found = ablate(decoder, TARGETS[target], rounds=3, threads=1)
    assert found.shapes == {"latent_sample": (1, 5, 10, 10)}
    assert found.rows[0].passes == ()
    assert found.rows[0].relative_rms == 0
    assert found.rows[0].timing is not None
    assert found.rows[0].timing.ratio == 1
    named = [name for row in found.rows for name in row.passes] + list(found.idle)
    phases = phases_before_lowering("vae_decoder", "fp32", backend=TARGETS[target].backend)
    assert named == [f"{phase.name}: {each.name}" for phase in phases for each in phase.passes]
    assert any(row.passes[-1].startswith("fusion: ") for row in found.rows[1:])
    for row in found.rows:
        assert row.execution is not None
        assert row.execution.count > 10
        assert row.relative_rms is not None
        assert row.relative_rms < 1e-5
        assert row.psnr_db is not None
        assert row.psnr_db > 80
        assert (row.peak_memory_bytes or 0) > 20e6
    text = format_ablation(found)
    assert "as exported" in text
    value = found.to_json()
    assert [row["kernels"] for row in value["rows"]] == [
        sum(row["execution"]["kernels"].values()) for row in value["rows"]
    ]


def test_engines_that_do_not_fit_together_take_turns_in_memory(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = build_variants(graph, [Phase("x", (ChangeEpsilon(),))], TARGETS["ort-cpu"], tmp_path).rows
    feeds = {
        "sample": np.ones((2, 3, 6, 6), np.float32),
        "timestep": np.ones(1, np.float32),
        "encoder_hidden_states": np.ones((2, 5, 7), np.float32),
    }
    opened: list[int] = []
    together: list[int] = []
    real = ablation_module.open_session

    class Counted:
        def __init__(self, session: object) -> None:
            self.session = session

        def __enter__(self) -> object:
            opened.append(1)
            together.append(sum(opened))
            return self.session

        def __exit__(self, *_: object) -> None:
            opened.append(-1)

    monkeypatch.setattr(ablation_module, "open_session", lambda source, threads: Counted(real(source, threads=threads)))
    for factor, most, times in ((0, 2, 2), (1 << 40, 1, 6)):
        opened.clear()
        together.clear()
        monkeypatch.setattr(ablation_module, "MEMORY_OF_ENGINE", factor)
        seconds = ablation_module._time(variants, [feeds] * 2, rounds=3, threads=1)
        assert seconds.shape == (3, 2)
        assert (seconds > 0).all()
        assert (max(together), len(together), sum(opened)) == (most, times, 0)
